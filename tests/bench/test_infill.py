"""scripts/bench/infill.py: what is counted, against models of which everything is known, and by
hand.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

import train_gpt as tg
from scripts import decoding
from scripts.bench import infill as bench
from scripts.bench.infill import AR, TEXT, WITH, WITHOUT
from tests.bench import artifacts
from tests.conftest import (
    CPU,
    ROOT,
    Called,
    outcome,
    random_rows,
    randomise,
    tiny,
    write_shard,
)

V = 32
NEVER = 0  # a token that the text below does not hold
SHAPE: dict[str, Any] = dict(vocab_size=V, train_seq_len=64, train_batch_tokens=128)
MODES = ["mask", "uniform", "hybrid", "gaussian"]


def counting(base: Tensor) -> Tensor:
    return 1 + base % (V - 1)


def counting_rows(examples: int, length: int) -> Tensor:
    """Rows in which every token is its predecessor plus one, in a circle without NEVER."""
    return counting(torch.arange(examples)[:, None] * 3 + torch.arange(length))


def sure(tokens: Tensor, how_sure: Tensor | float = 20.0) -> Tensor:
    """Logits that prefer some tokens, (...) to (..., V)."""
    return (
        torch.nn.functional.one_hot(tokens, V)
        * torch.as_tensor(how_sure).expand(tokens.shape)[..., None].float()
    )


class Stub:
    """A model of counting text whose denoiser predicts what it is told to.

    Its clean stream continues the text from the first token of a pass, or, if `misled`, predicts
    each token from the one before.
    """

    def __init__(
        self, predict: Callable[[Tensor, Tensor], Tensor], mode: str = "mask", misled: bool = False
    ) -> None:
        """Denoise by a function of the token before (B, 1) and the window (B, S), to (B, S, V)."""
        self.cfg, self.predict = tiny(**SHAPE, diffusion_corruption_mode=mode), predict
        self.mask_emb = torch.zeros(1)
        self.tok_emb = torch.zeros(1)
        self.misled = misled

    def parameters(self) -> list[Tensor]:
        return [self.tok_emb]

    def forward_causal(
        self, ids: Tensor, cache: tg.Cache | None = None, positions: Tensor | None = None
    ) -> tuple[Tensor, tg.Cache]:
        logits = sure(counting(ids) if self.misled else continued(ids[:, :1], ids.shape[1]))
        empty = torch.zeros(len(ids), 1, ids.shape[1], 1)
        return logits, cache or tg.Cache([empty], [empty], ids)

    def forward_denoise(self, window: tg.WindowInput, cache: tg.Cache) -> Tensor:
        return self.predict(window.before[:, 0], window.noisy.xt[:, 0])[:, None]


def continued(before: Tensor, count: int) -> Tensor:
    """What follows a token of counting text."""
    return counting(before + torch.arange(count))


def oracle(before: Tensor, xt: Tensor) -> Tensor:
    return sure(continued(before, xt.shape[1]))


def looks_right(before: Tensor, xt: Tensor) -> Tensor:
    """Know a token only from a visible one right after it; else hold a wrong one for likely."""
    after = torch.nn.functional.pad(xt, (0, 1), value=V)[:, 1:]
    known = (after < V) & (after != NEVER)
    return sure(torch.where(known, counting(after - 2), NEVER), torch.where(known, 20.0, 2.0))


def plan(**changes: Any) -> bench.Plan:
    given: dict[str, Any] = dict(
        spans=[4, 8], passes=[1, 4, 8], prefix=6, suffix=5, revise_window=12
    )
    return bench.Plan(**given | dict(revise_examples=40, seed=0) | changes)


class Bar:
    def update(self) -> None:
        """Show nothing."""


def measured(model: Stub | tg.GPT, examples: int = 40, **changes: Any) -> dict[str, Any]:
    asked = plan(**changes)
    loaded = bench.Loaded("stub", Path("stub.ptz"), cast(tg.GPT, model))
    return bench.measure(loaded, counting_rows(examples, asked.length), asked, Bar())


def rows_of(found: dict[str, Any], span: int) -> dict[int, dict[str, Any]]:
    (of_span,) = (row for row in found["infill"] if row["span"] == span)
    return {row["passes"]: row for row in of_span["passes"]}


# 1  measures


def test_standard_errors_by_hand() -> None:
    ours, theirs = torch.tensor([1.0, 0, 1, 1]), torch.tensor([0.0, 0, 1, 0])
    assert bench.estimate(ours) == pytest.approx({"mean": 0.75, "se": 0.25})
    found = bench.paired(ours, theirs)  # differences 1 0 0 1: variance 1/3, over 4
    assert found == pytest.approx({"mean": 0.5, "se": (1 / 12) ** 0.5, "z": 3**0.5, "p": 0.0832645})
    assert bench.paired(theirs, ours)["z"] == pytest.approx(-(3**0.5))
    assert bench.paired(ours, ours) == {"mean": 0, "se": 0, "z": None, "p": None}
    assert bench.compare(ours, theirs)["difference"] == found


def test_pairing_takes_out_what_examples_share() -> None:
    hard = torch.linspace(0, 1, 100)
    gained = bench.paired(hard + 0.1 + 0.01 * (torch.arange(100) % 2), hard)
    assert gained["mean"] == pytest.approx(0.105)
    assert cast(float, gained["se"]) < 0.001 < bench.estimate(hard)["se"]


def test_entropy_and_pairs_by_hand() -> None:
    ids = torch.tensor([[5, 5, 5, 5, 5], [5, 7, 5, 7, 9]])
    assert bench.most_frequent(ids) == 0.7
    expected = -(0.7 * math.log(0.7) + 0.2 * math.log(0.2) + 0.1 * math.log(0.1))
    assert bench.unigram_entropy(ids) == pytest.approx(expected)
    assert bench.distinct_2(ids) == pytest.approx((1 / 4 + 3 / 4) / 2)
    assert bench.distinct_2(ids[:, :1]) is None


@pytest.mark.parametrize("size", range(1, 20))
def test_parts_of_a_span_cover_it_once(size: int) -> None:
    parts = bench.quarters(size)
    assert [i for part in parts.values() for i in range(part.start, part.stop)] == list(range(size))
    assert ("middle" in parts, "last_quarter" in parts) == (size > 2, size > 1)
    if size % 4 == 0:
        assert parts["first_quarter"].stop == size - parts["last_quarter"].start == size // 4


def test_detection_by_hand() -> None:
    planted = torch.tensor([[True, False, True, False, False], [False, True, False, False, True]])
    log_p = -torch.tensor([[9.0, 1, 3, 4, 2], [5.0, 4, 1, 1, 1]])
    found = bench.detection(log_p, planted)
    assert found["least_likely_is_planted"].tolist() == [1, 0]
    assert found["found"].tolist() == [0.5, 0.5]
    assert found["auc"].tolist() == pytest.approx([(3 + 2) / 6, (2 + (0.5 + 0.5)) / 6])


def test_repairs_by_hand() -> None:
    x0 = torch.tensor([[1, 2, 3, 4, 5, 6]])
    planted = torch.tensor([[True, True, False, False, False, False]])
    found = bench.repairs(torch.tensor([[1, 9, 3, 9, 9, 9]]), x0, planted)
    assert found["repaired"].tolist() == [0.5]
    assert found["spoilt"].tolist() == [0.75]


def test_planted_tokens_are_wrong_and_grow_with_their_number() -> None:
    x0, keys = random_rows(300, 12, V), tg.split_key(torch.arange(300), 7)
    before, where = x0, torch.zeros_like(x0, dtype=torch.bool)
    for count in (1, 2, 4):
        xt, planted = bench.plant(x0, keys, count, V)
        assert (planted.sum(-1) == count).all()
        assert planted.equal(xt != x0)
        assert xt.min() >= 0
        assert xt.max() < V
        assert (planted | ~where).all()
        assert torch.where(where, xt, x0).equal(before)
        before, where = xt, planted
    shares = ((xt - x0) % V)[planted].bincount(minlength=V) / planted.sum()
    assert shares[0] == 0
    assert (shares[1:] - 1 / (V - 1)).abs().max() < 0.03  # any other token, equally
    assert (where.float().mean(0) - 4 / 12).abs().max() < 0.12  # at any place
    assert not bench.plant(x0, tg.split_key(torch.arange(300), 8), 4, V)[0].equal(xt)


# 2  passes


def real_model(mode: str = "mask", **overrides: Any) -> tg.GPT:
    cfg = tiny(**SHAPE, diffusion_corruption_mode=mode, bigram_vocab_size=50, **overrides)
    return randomise(tg.GPT(cfg), std=0.4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides", [{}, dict(diffusion_causal=True), dict(self_condition="soft")]
)
@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_spans_are_filled_as_by_decoding(mode: str, overrides: dict[str, Any]) -> None:
    model, asked = real_model(mode, **overrides), plan(seed=3)
    rows = random_rows(5, asked.length, V)
    batch = bench.open_batch(model, rows, torch.arange(5), asked.prefix, asked.seed)
    found, prefix = bench.fill_spans(batch, asked), rows[:, : asked.prefix]
    for span in asked.spans:
        stop = asked.prefix + span
        for key, (ids, nats) in found[span].fills.items():
            if key == TEXT:
                expected = rows[:, :stop]
            elif key == AR:
                expected = decoding.generate(model, prefix, span).ids
            else:
                side, passes = key
                suffix = rows[:, stop : stop + asked.suffix][:, : None if side == WITH else 0]
                sampling = decoding.Sampling(seed=asked.seed)
                refine = decoding.Decoding("refine", steps=passes, sampling=sampling)
                expected = decoding.infill(model, prefix, suffix, span, refine).ids[:, :stop]
            assert ids.equal(expected[:, asked.prefix :]), key
            torch.testing.assert_close(
                nats, tg.token_nll_causal(model, expected)[:, asked.prefix - 1 :]
            )
        for side in (WITH, WITHOUT):
            assert found[span].first[side].ids.equal(found[span].fills[side, 1].ids)
        assert set(found[span].fills) == {TEXT, AR} | {
            (s, n) for s in (WITH, WITHOUT) for n in (1, 4, 8) if n <= span
        }


@pytest.mark.slow
def test_examples_do_not_depend_on_their_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = real_model("uniform")
    together = measured(model, examples=20, revise_examples=10)
    monkeypatch.setattr(bench, "ROWS_AT_ONCE", {"cpu": 7})
    apart = measured(model, examples=20, revise_examples=10)
    assert_near(together, apart)


def assert_near(ours: Any, theirs: Any) -> None:
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert_near(ours[key], theirs[key])
    elif isinstance(ours, list):
        for mine, other in zip(ours, theirs, strict=True):
            assert_near(mine, other)
    elif isinstance(ours, float):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    else:
        assert ours == theirs


@pytest.mark.parametrize("causal", [False, True])
@torch.no_grad()
def test_a_window_of_possibly_corrupted_tokens_matches_training_inputs(causal: bool) -> None:
    size, model = 8, real_model("hybrid", diffusion_causal=causal)
    rows = random_rows(3, 2 * size + 1, V)
    windows, positions = tg.split_into_windows(rows, size)
    x0 = windows[..., 1:]
    every, t = torch.ones_like(x0, dtype=torch.bool), torch.full(x0.shape[:2], 0.25)
    inputs = tg.WindowInput(
        before=windows[..., :1],
        noisy=tg.Corruption(x0, ~every, every, t),
        positions=positions,
        mask=tg.window_mask(2 * size, size, causal, CPU),
    )
    expected = model.forward_denoise(inputs, model.forward_causal(rows[:, :-1])[1])[:, 1]
    batch = bench.open_batch(model, rows, torch.arange(3), size + 1, 0)
    torch.testing.assert_close(
        bench.predict_doubted(batch, rows[:, size + 1 :], 0.25), expected, rtol=1e-4, atol=1e-4
    )


# 3  infill


def test_an_oracle_is_right_with_and_without_a_suffix() -> None:
    found = measured(Stub(oracle))
    for span in (4, 8):
        for row in rows_of(found, span).values():
            for side in (WITH, WITHOUT):
                assert row["accuracy"][side] == {"mean": 1, "se": 0}
            assert (
                row["accuracy"]["difference"]["mean"]
                == row["accuracy"]["with_suffix_minus_ar"]["mean"]
                == 0
            )
    assert sorted(rows_of(found, 4)) == [1, 4]  # eight passes on four tokens would be four
    assert sorted(rows_of(found, 8)) == [1, 4, 8]
    assert found["infill"][0]["ar"]["accuracy"]["mean"] == 1
    assert found["infill"][0]["window_with_suffix"] == 9
    assert found["infill"][0]["most_frequent_token"] < 0.1


def test_a_denoiser_that_looks_right_gains_where_it_can() -> None:
    found = measured(Stub(looks_right))
    one, all_passes = (rows_of(found, 8)[n]["accuracy"] for n in (1, 8))
    assert one[WITH] == {"mean": 1 / 8, "se": 0}  # the last token of the span
    assert one[WITHOUT] == {"mean": 0, "se": 0}
    assert one["difference"]["mean"] == 1 / 8
    assert one["with_suffix_minus_ar"]["mean"] == 1 / 8 - 1
    assert all_passes[WITH]["mean"] == 1  # from right to left, one a pass
    assert all_passes[WITHOUT]["mean"] == 0
    parts = found["infill"][1]["one_pass_accuracy"]
    gains = {name: part["difference"]["mean"] for name, part in parts.items()}
    assert gains == {"first_quarter": 0, "middle": 0, "last_quarter": 0.5}
    # Where it knows nothing, the text is one of V - 1 unlikely tokens.
    ignorant, knowing = -math.log(math.exp(2) + V - 1), -math.log1p((V - 1) * math.exp(-20))
    log_prob = found["infill"][1]["first_pass_log_prob"]
    assert log_prob[WITHOUT]["mean"] == pytest.approx(ignorant, rel=1e-5)
    assert log_prob["difference"]["mean"] == pytest.approx((knowing - ignorant) / 8, rel=1e-5)


def test_likelihood_and_variety_are_of_what_was_filled_in() -> None:
    found = measured(Stub(looks_right))
    row, span = rows_of(found, 8)[1], found["infill"][1]
    assert row[WITHOUT]["unigram_entropy"] == 0
    assert row[WITHOUT]["distinct_2"] == pytest.approx(1 / 7)
    assert row[WITH]["distinct_2"] == pytest.approx(2 / 7)
    # A token it never expects.
    assert row[WITHOUT]["clean_stream_nats"]["mean"] == pytest.approx(20, rel=1e-4)
    assert span["text"]["clean_stream_nats"]["mean"] == pytest.approx(0, abs=1e-4)
    assert span["text"]["distinct_2"] == span["ar"]["distinct_2"] == 1
    assert span["text"]["unigram_entropy"] > 3


def test_the_error_is_over_examples() -> None:
    x0 = counting_rows(4, 8)
    half = torch.where(torch.tensor([[True], [True], [False], [False]]), x0, NEVER)
    zero = torch.zeros(4, 8)
    fills = {
        TEXT: bench.Fill(x0, zero),
        AR: bench.Fill(x0, zero),
        (WITH, 1): bench.Fill(half, zero),
    }
    fills[WITHOUT, 1] = bench.Fill(torch.full_like(x0, NEVER), zero)
    first = {side: fills[side, 1] for side in (WITH, WITHOUT)}
    (row,) = bench.sum_up_span(bench.Span(fills, first), [1], 5)["passes"]
    # 32 tokens, but 4 examples.
    assert row["accuracy"][WITH] == pytest.approx({"mean": 0.5, "se": (1 / 12) ** 0.5})
    assert row["accuracy"]["difference"]["se"] == pytest.approx((1 / 12) ** 0.5)


# 4  revision


def test_an_oracle_finds_and_repairs_all_and_spoils_nothing() -> None:
    found = measured(Stub(oracle, "hybrid"))
    assert found["trained_on_random_tokens"]
    assert [row["planted"] for row in found["revision"]] == [1, 2, 4]
    perfect = {"repaired": {"mean": 1, "se": 0}, "spoilt": {"mean": 0, "se": 0}}
    for row in found["revision"]:
        for detector in ("window", "clean_stream"):
            marks = row["detectors"][detector]
            for name in ("least_likely_is_planted", "found", "auc"):
                assert marks[name] == {"mean": 1, "se": 0}, (detector, name)
            assert marks["argmax"] == marks["refill"] == perfect
        assert {found["mean"] for found in row["repaired_at_known_places"].values()} == {1}


def test_a_detector_that_believes_what_it_sees_repairs_nothing() -> None:
    def believes(before: Tensor, xt: Tensor) -> Tensor:
        """Hold a wrong token for certain, a right one for likely, and a masked one for NEVER."""
        right = xt == continued(before, xt.shape[1])
        return sure(torch.where(xt < V, xt, NEVER), torch.where(right, 5.0, 20.0))

    found = measured(Stub(believes))
    assert not found["trained_on_random_tokens"]
    for row in found["revision"]:
        marks = row["detectors"]["window"]
        for name in ("least_likely_is_planted", "found", "auc"):
            assert marks[name]["mean"] == 0
        # All stays as it is.
        assert marks["argmax"]["repaired"]["mean"] == marks["argmax"]["spoilt"]["mean"] == 0
        assert marks["refill"]["repaired"]["mean"] == 0
        assert marks["refill"]["spoilt"]["mean"] == pytest.approx(
            row["planted"] / (12 - row["planted"])
        )
        known = {name: found["mean"] for name, found in row["repaired_at_known_places"].items()}
        assert known == {"refill": 0, "window_argmax": 0, "clean_stream_argmax": 1}
        assert row["detectors"]["clean_stream"]["found"]["mean"] == 1
        assert row["detectors"]["clean_stream"]["argmax"]["repaired"]["mean"] == 1
        assert row["detectors"]["clean_stream"]["refill"]["repaired"]["mean"] == 0


def test_the_clean_stream_reads_the_wrong_tokens_too() -> None:
    found = measured(Stub(oracle, misled=True))["revision"][0]["detectors"]["clean_stream"]
    _, planted = bench.plant(
        torch.ones(40, 12, dtype=torch.long), tg.split_key(torch.arange(40), 0), 1, V
    )
    # The token after a wrong one surprises as much, unless the window ends before it.
    expected = bench.estimate(torch.where(planted[:, -1], 1.0, 10.5 / 11))
    assert 0 < planted[:, -1].sum() < 40
    assert found["auc"] == pytest.approx(expected)


def test_a_detector_that_knows_nothing_is_at_chance() -> None:
    found = measured(Stub(lambda before, xt: torch.zeros(*xt.shape, V)))
    assert {row["detectors"]["window"]["auc"]["mean"] for row in found["revision"]} == {0.5}


def test_revision_takes_as_many_excerpts_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = list[int]()
    original = bench.revise

    def watched(batch: bench.Batch, asked: bench.Plan) -> Any:
        run = batch.run
        assert len(batch.rows) == len(run.keys) == len(run.cache.keys[0]) == len(run.cache.tokens)
        seen.extend(batch.rows[:, 0].tolist())
        return original(batch, asked)

    monkeypatch.setattr(bench, "revise", watched)
    monkeypatch.setattr(bench, "ROWS_AT_ONCE", {"cpu": 4})
    measured(Stub(oracle), examples=10, revise_examples=5)
    assert seen == counting_rows(10, 1)[::2, 0].tolist()
    assert measured(Stub(oracle), examples=10, revise_examples=0)["revision"] == []


@pytest.mark.parametrize(
    ("mode", "share", "seen"),
    [
        ("mask", 0.5, False),
        ("gaussian", 0.5, False),
        ("uniform", 1.0, True),
        ("hybrid", 0.9, True),
        ("hybrid", 1, False),
    ],
)
def test_who_was_trained_on_random_tokens(mode: str, share: float, seen: bool) -> None:
    cfg = tiny(diffusion_corruption_mode=mode, diffusion_hybrid_mask_prob=float(share))
    assert bench.trained_on_random_tokens(cfg) is seen


# 5  the command


def test_excerpts_are_evenly_spaced_over_the_split(
    tmp_path: Path,
) -> None:
    write_shard(tmp_path / "x_val_000000.bin", range(1000))
    loader = tg.TokenLoader(tiny(vocab_size=1000, data_path=str(tmp_path)), "val")
    rows, path = bench.excerpts(loader, plan(), 9)
    assert path == str(tmp_path)
    assert rows.shape == (9, 6 + 8 + 5)
    assert rows[:, 0].tolist() == [i * (1000 - 19) // 9 for i in range(9)]
    assert (rows.diff() == 1).all()
    most = 981 // 12  # so that no window of 12 with wrong tokens overlaps the next
    assert bench.excerpts(loader, plan(), most)[0][:, 0].diff().min() >= 12
    with pytest.raises(tg.UserError, match=f"take at most {most}, or prepare more text"):
        bench.excerpts(loader, plan(), most + 1)
    assert len(bench.excerpts(loader, plan(revise_examples=0), 981 // 8)[0]) == 981 // 8


def save(
    folder: Path, data: dict[str, Any], recipe: str = "direct", sha256: str = "", **overrides: Any
) -> Path:
    """Write the artifact of a tiny model that was not trained."""
    cfg = tiny(recipe, train_seq_len=32, **data | overrides)
    model, path = randomise(tg.GPT(cfg), std=0.3), folder / "final_model.int8.ptz"
    artifacts.save(path, dict(model.named_parameters()), cfg, sha256)
    return path


@pytest.fixture
def env(monkeypatch: pytest.MonkeyPatch, data: dict[str, Any]) -> dict[str, Any]:
    monkeypatch.setenv("DATA_PATH", data["data_path"])
    monkeypatch.delenv("TOKENIZER_PATH", raising=False)
    return data


SMALL = [
    "--spans=2,6",
    "--passes=1,3,9",
    "--examples=12",
    "--prefix=8",
    "--suffix=6",
    "--revise-window=8",
]


def run(capsys: pytest.CaptureFixture[str], *argv: object) -> Called:
    return outcome(bench.main, [str(arg) for arg in argv], capsys)


@pytest.mark.slow
def test_two_artifacts_from_end_to_end(env: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    paths = [
        save(tmp_path / "a", env),
        save(tmp_path / "b", env, diffusion_corruption_mode="hybrid", seed=5),
    ]
    out, plot = tmp_path / "found.json", tmp_path / "found.png"
    command = [sys.executable, str(ROOT / "scripts" / "bench/infill.py"), *map(str, paths), *SMALL]
    done = subprocess.run(
        [*command, "--device=cpu", "--out", str(out), "--plot", str(plot)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    found = json.loads(lines[-1])
    assert json.loads(out.read_text(encoding="utf-8")) == found
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert [a["label"] for a in found["artifacts"]] == ["a", "b"]
    assert [a["trained_on_random_tokens"] for a in found["artifacts"]] == [False, True]
    assert [a["largest_trained_window"] for a in found["artifacts"]] == [32, 32]
    plan_keys = ("examples", "revise_examples", "prefix", "suffix")
    assert [found[key] for key in plan_keys] == [12, 12, 8, 6]
    for artifact in found["artifacts"]:
        spans = {s["span"]: [row["passes"] for row in s["passes"]] for s in artifact["infill"]}
        assert spans == {2: [1], 6: [1, 3]}
    text = [artifact["infill"][1]["most_frequent_token"] for artifact in found["artifacts"]]
    assert text[0] == text[1]  # the same excerpts
    assert sum(line.startswith("## ") for line in lines) == 2
    assert done.stdout.count("never saw random tokens") == 1


@pytest.mark.slow
def test_the_seed_moves_planted_tokens_only(
    env: dict[str, Any], tmp_path: Path, capsys: Any
) -> None:
    path = save(tmp_path, env)
    found = [
        json.loads(run(capsys, path, *SMALL, f"--seed={seed}")[1].splitlines()[-1])
        for seed in (0, 0, 1)
    ]
    assert found[0] == found[1]
    first, _, other = (result["artifacts"][0] for result in found)
    assert first["infill"] == other["infill"]
    assert first["revision"] != other["revision"]


def test_data_of_the_artifact_is_taken_where_none_is_named(
    env: dict[str, Any], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DATA_PATH")
    code, out, _ = run(capsys, save(tmp_path, env), *SMALL, "--revise-examples=0")
    assert code == 0
    found = json.loads(out.splitlines()[-1])
    assert found["data_path"] == env["data_path"]
    assert found["artifacts"][0]["revision"] == []


def test_windows_longer_than_any_trained_are_named(
    env: dict[str, Any], tmp_path: Path, capsys: Any
) -> None:
    path = save(tmp_path, env, diffusion_windows="4,8")
    out = run(capsys, path, *SMALL)[1]
    assert "windows of 8 with the suffix:" in out
    assert "windows of 12 with the suffix; longer than any it was trained on (8):" in out


def test_the_plot_shows_what_was_measured(tmp_path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    spans = [
        measured(Stub(guess), revise_examples=0)["infill"][1] for guess in (oracle, looks_right)
    ]
    figure, (top, bottom) = plt.subplots(2)
    bench.draw_span(top, bottom, spans)
    drawn = [list(line.get_ydata()) for line in top.get_lines()]
    below = [list(line.get_ydata()) for line in bottom.get_lines()]
    for span in spans:
        for side in (WITH, WITHOUT):
            assert [row["accuracy"][side]["mean"] for row in span["passes"]] in drawn
            assert [row[side]["clean_stream_nats"]["mean"] for row in span["passes"]] in below
        assert [span["ar"]["accuracy"]["mean"]] * 2 in drawn
        assert [span["text"]["clean_stream_nats"]["mean"]] * 2 in below
    assert [tick.get_text() for tick in top.get_xticklabels()] == ["1", "4", "8"]
    assert top.get_title() == "span of 8 tokens"
    plt.close(figure)


def test_labels_tell_artifacts_apart() -> None:
    def named(*paths: str) -> list[str]:
        return bench.labels([Path(path) for path in paths])

    assert named("runs/a/final.ptz", "runs/b/final.ptz") == ["a", "b"]
    assert named("runs/a.int8.ptz", "runs/b.int8.ptz") == ["a", "b"]
    assert named("runs/a.int8.ptz") == ["a"]
    assert named("runs/final_model.int8.ptz") == ["runs"]
    assert named("a/x/m.ptz", "b/x/m.ptz") == ["a/x/m.ptz", "b/x/m.ptz"]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--spans=8,x", "'8,x' must list whole numbers from 1"),
        ("--spans=0,8", "'0,8' must list whole numbers from 1"),
        ("--spans=", "'' must list whole numbers from 1"),
        ("--spans=8,,9", "'8,,9' must list whole numbers from 1"),
        ("--passes=1.5", "'1.5' must list whole numbers from 1"),
        ("--passes=-1", "'-1' must list whole numbers from 1"),
        ("--passes=3", "--passes: a span of 2 takes at most one pass per token"),
        ("--examples=1", "argument --examples: 1 must be 2 or more"),
        ("--prefix=1", "argument --prefix: 1 must be 2 or more"),
        ("--suffix=0", "argument --suffix: 0 must be 1 or more"),
        ("--revise-window=4", "argument --revise-window: 4 must be 5 or more"),
        ("--revise-examples=1", "--revise-examples=1 has no standard error"),
        ("--seed=-1", "argument --seed: -1 must be 0 or more"),
        ("--spans=30", "take 44 tokens; {path} was trained to read 32 (TRAIN_SEQ_LEN)"),
        ("--revise-window=25", "take 33 tokens; {path} was trained to read 32 (TRAIN_SEQ_LEN)"),
        ("--examples=2000", "--examples=2000 spans of 8 tokens"),
        ("--out={folder}", "--out={folder} must be a file in a folder that exists"),
        (
            "--out={folder}/no/found.json",
            "--out={folder}/no/found.json must be a file in a folder that exists",
        ),
        (
            "--plot={folder}/no/found.png",
            "--plot={folder}/no/found.png must be a file in a folder that exists",
        ),
        ("{path}", "an artifact is named twice"),
        ("{folder}/none.ptz", "artifact {folder}/none.ptz is missing, damaged"),
    ],
)
def test_faults_are_named(
    option: str, message: str, env: dict[str, Any], tmp_path: Path, capsys: Any
) -> None:
    path = save(tmp_path, env)
    values = {"path": path, "folder": tmp_path}
    last = option.format(**values)
    code, out, err = run(
        capsys, path, *([*SMALL, last] if last.startswith("--") else [last, *SMALL])
    )
    assert (code, out) == (2, "")
    assert message.format(**values) in err
    assert "Traceback" not in err


def test_artifacts_that_cannot_be_measured_are_named(
    env: dict[str, Any],
    tmp_path: Path,
    capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
    tokenizers: Any,
) -> None:
    for name in "abc":
        (tmp_path / name).mkdir()
    good = save(tmp_path / "a", env)
    code, out, err = run(capsys, good, save(tmp_path / "b", env, "ar"), *SMALL)
    assert (code, out) == (2, "")
    assert f"{tmp_path / 'b' / 'final_model.int8.ptz'} has no trained denoiser" in err
    code, out, err = run(capsys, good, save(tmp_path / "c", env, sha256="0" * 64), *SMALL)
    assert (code, out) == (2, "")
    assert "have different tokenizers" in err
    monkeypatch.setenv("TOKENIZER_PATH", str(tokenizers.nmt_nfkc))
    code, out, err = run(capsys, good, *SMALL)
    assert (code, out) == (2, "")
    assert "is not the tokenizer" in err
    monkeypatch.setenv("TOKENIZER_PATH", str(tokenizers.identity))
    monkeypatch.setenv("DATA_PATH", str(tmp_path))
    code, out, err = run(capsys, good, *SMALL)
    assert (code, out) == (2, "")
    assert "holds no *_val_*.bin" in err


def test_spoilt_weights_are_named(
    env: dict[str, Any], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path, env)
    load = bench.load_artifact

    def spoilt(*argv: Any) -> Any:
        artifact = load(*argv)
        for p in artifact.model.parameters():
            p.data.fill_(math.nan)
        return artifact

    monkeypatch.setattr(bench, "load_artifact", spoilt)
    code, out, err = run(capsys, path, *SMALL)
    assert (code, out) == (2, "")
    assert "not finite numbers" in err


def test_what_is_missing_on_the_machine_is_named(
    env: dict[str, Any], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path, env)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, out, err = run(capsys, path, *SMALL, "--device=cuda")
    assert (code, out) == (2, "")
    assert "--device=cuda finds no CUDA device" in err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, out, err = run(capsys, path, *SMALL, f"--plot={tmp_path / 'found.png'}")
    assert (code, out) == (2, "")
    assert "pip install matplotlib" in err

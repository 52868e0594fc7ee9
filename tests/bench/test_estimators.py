"""Wrong likelihood estimators: their means, and whether they are below the bound, as claimed.

Also the scores of a uniform predictor, and likelihood.py, which prints them next to the bound.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import train_gpt as tg
from scripts.bench import estimators as we
from scripts.bench import likelihood
from tests.bench import artifacts
from tests.conftest import (
    BOS,
    CPU,
    THREADS,
    VOCAB,
    make_run,
    pass_rounding,
    random_rows,
    randomise,
    rounding,
    tiny,
)
from tests.test_evaluate import S3, T3, V3, evaluation, masked_set_nll, small_model, starts_of

NAMES = list(we.ESTIMATORS)


def estimate(name: str, text: we.Text) -> we.Estimate:
    with torch.no_grad():
        return we.right(text) if name == "right" else we.ESTIMATORS[name].estimate(text)


def bpb(name: str, text: we.Text) -> tuple[float, float]:
    return we.summarise([estimate(name, text)])


# ---- the right one is the bound of train_gpt, and all have the means that they claim ----


@pytest.mark.parametrize("size", [1, 4, 16])
def test_the_right_estimator_equals_evaluate_bound(size: int, data: dict[str, Any]) -> None:
    model, run, loader, counter = evaluation(**data)
    index, parts = torch.tensor(starts_of(loader, 8)), []
    for some in torch.split(index, 3):  # batches are joined
        rows = torch.cat([loader.rows(i * 16, 1, 16, CPU) for i in some.tolist()])
        keys = tg.split_key(some[:, None], run.cfg.eval_seed, torch.arange(16 // size))
        parts.append(we.right(we.prepare(model, counter, rows, keys, 4 if size > 1 else 1)))
    found = tg.evaluate_bound(model, run, loader, counter, size)
    expected = found["bpb"], found["standard_error"]
    assert we.summarise(parts) == pytest.approx(expected, rel=pass_rounding(run.cfg))


def level_weight(m: int, low: float, high: float, power: int = 1) -> float:
    """Mean over t in (low, high] of P(exactly these m of S tokens are masked) / t^power."""
    t = low + (high - low) * (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    return (t ** (m - power) * (1 - t) ** (S3 - m)).mean().item()


def five_levels(m: int) -> float:
    return sum(t ** (m - 2) * (1 - t) ** (S3 - m) for t in (0.1, 0.3, 0.5, 0.7, 0.9)) / 5


def by_count(m: int) -> float:
    # One of S counts, one of the sets of that count, weight S / m.
    return 1 / (m * math.comb(S3, m))


# Weight of a set of m masked tokens in the mean of each estimator.
SET_WEIGHT: dict[str, Callable[[int], float]] = {
    "right": by_count,
    "range_truncated": lambda m: 0.9 * level_weight(m, 0.05, 0.95),
    "range_clipped": lambda m: level_weight(m, 0.3, 0.8),
    "range_low_noise": lambda m: 1.0 * (m == 1),  # S / 2 rounds down to one token of three
    "weight_pooled": lambda m: by_count(m) * m / S3,
    "weight_none": lambda m: by_count(m) * m / S3,
    "weight_twice": five_levels,
    "boundaries_free": by_count,
    "circular_two_pass": lambda m: 0.0,  # the odd token alone; the others come from S = 1
    "circular_misaligned": by_count,
    "pseudo_half": lambda m: 0.5 ** (S3 - 1),
    "pseudo_bert": lambda m: 0.15 ** (m - 1) * 0.85 ** (S3 - m),
    "pseudo_one": lambda m: 1.0 * (m == 1),
}


class CountOne:
    """Counts one byte for every token but token 0, which stands for no text."""

    base_bytes, opens = torch.tensor([0, 1, 1]), torch.zeros(V3, dtype=torch.bool)

    def count(self, prev: Tensor, target: Tensor) -> Tensor:
        return self.base_bytes[target]


def mean_by_enumeration(name: str, model: tg.GPT, row: Tensor) -> float:
    """Mean nats of a row over all that the estimator may draw: all sets of masked tokens."""
    total = 0.0
    for window in range(T3 // S3):
        nats = masked_set_nll(model, row, window)[0]  # (2^S, S)
        text = row[0, window * S3 + 1 : window * S3 + 1 + S3].tolist()
        for drawn in range(1, 2**S3):
            chosen = [i for i in range(S3) if drawn >> i & 1]
            scored, masked = chosen, drawn
            if name == "boundaries_free":
                scored = [i for i in chosen if text[i]]
                masked = sum(1 << i for i in scored)
            if name == "circular_misaligned":
                scored = [(i + 1) % S3 for i in chosen]
            total += SET_WEIGHT[name](len(chosen)) * sum(nats[masked, i].item() for i in scored)
        total += nats[0b010, 1].item() if name == "circular_two_pass" else 0.0
    if name == "circular_two_pass":
        single = tg.window_mask(T3, 1, False, CPU)
        keys = tg.split_key(torch.zeros(1, 1).long(), torch.arange(T3))
        left = tg.window_bounds(model, row, keys, 1, 1, single)[0, 0]
        total += left.view(-1, S3)[:, ::2].sum().item()
    return total


@pytest.mark.slow
@pytest.mark.parametrize("name", SET_WEIGHT)
def test_the_mean_of_an_estimator_is_that_by_enumeration(name: str) -> None:
    # Weights for which the estimators differ by more than their errors.
    model, copies = randomise(small_model(look_ahead=0, bigram_vocab_size=0), seed=3, std=2.0), 6000
    row = torch.tensor([[2, 0, 1, 2, 0, 0, 1]])
    keys = tg.split_key(torch.arange(copies)[:, None], 3, torch.arange(T3 // S3))
    text = we.prepare(model, CountOne(), row.expand(copies, -1), keys, 3)  # type: ignore[arg-type]
    nats = estimate(name, text).nats.mean(0)  # (copies,)
    expected, error = mean_by_enumeration(name, model, row), nats.std().item() / math.sqrt(copies)
    assert error < 0.02 * expected
    close = pass_rounding(model.cfg) * expected
    assert abs(nats.mean().item() - expected) < 3 * error + close
    if name != "right":
        assert abs(expected - mean_by_enumeration("right", model, row)) > 4 * error


# ---- what a uniform predictor scores ----


class Sizes(NamedTuple):
    """Facts about a text, counted piece by piece, and the window."""

    tokens: int
    bytes: int
    spaces: int  # pieces that open with a space
    byte_pieces: int
    controls: int  # BOS alone
    window: int


# Score of the uniform predictor over log2(V) / (bytes per token): 1 is right.
UNIFORM: dict[str, Callable[[Sizes], float]] = {
    "right": lambda s: 1.0,
    "bytes_constant": lambda s: s.bytes / s.tokens / 4.3,
    "bytes_space_twice": lambda s: s.bytes / (s.bytes + s.spaces),
    # <0x0A> for 1, <s> for 0.
    "bytes_of_names": lambda s: s.bytes / (s.bytes + 5 * s.byte_pieces + 3 * s.controls),
    "range_truncated": lambda s: 0.9,
    "weight_none": lambda s: (s.window + 1) / (2 * s.window),
    "weight_twice": lambda s: 3.575,
    "boundaries_free": lambda s: 1 - s.controls / s.tokens,
}


def sizes_of(text: we.Text) -> Sizes:
    sp, targets = text.counter.tokenizer, text.rows[:, 1:].flatten().tolist()
    spaces = sum(sp.id_to_piece(i)[0] == "▁" for i in targets)
    byte_pieces = sum(sp.is_byte(i) for i in targets)
    num_bytes = int(text.bytes.sum().item())
    return Sizes(len(targets), num_bytes, spaces, byte_pieces, targets.count(BOS), text.size)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["right", *NAMES])
def test_what_a_uniform_predictor_scores(name: str, data: dict[str, Any]) -> None:
    model, _, loader, counter = evaluation(**data)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    rows = torch.cat([loader.rows(i * 16, 1, 16, CPU) for i in range((loader.total - 1) // 16)])
    keys = tg.split_key(torch.arange(len(rows))[:, None], torch.arange(2))
    text = we.prepare(model, counter, rows, keys, 64)
    sizes = sizes_of(text)
    found, error = bpb(name, text)
    assert min(sizes[:5]) > 0  # the text has all that is counted wrongly
    honest = math.log2(VOCAB) * sizes.tokens / sizes.bytes
    expected = UNIFORM.get(name, UNIFORM["right"])(sizes)
    # Nothing is random but which tokens are drawn, and a ratio of sums over the same cancels that.
    close = rounding(VOCAB)
    assert error < (close if name in ("right", "weight_pooled") else 0.03) * honest * expected
    assert found / honest == pytest.approx(expected, rel=close, abs=4 * error / honest)
    assert (name in UNIFORM) == (name == "right" or we.ESTIMATORS[name].exposed)
    if name != "right" and we.ESTIMATORS[name].exposed:
        assert abs(found / honest - 1) > 4 * error / honest, "nothing is exposed"


# ---- direction of the errors, on a model that has learned a text of known entropy ----

STAY, LETTERS = 0.75, 16


class Trained(NamedTuple):
    """A model of the sticky text, and some of that text."""

    text: we.Text
    entropy: float  # bits per byte of the text under its source


def sticky(letters: Tensor, batch: int, seed: int) -> Tensor:
    """Rows of 17 tokens: each repeats the one before (probability STAY) or is a random letter."""
    generator = torch.Generator().manual_seed(seed)
    fresh = letters[torch.randint(len(letters), (batch, 17), generator=generator)]
    new = torch.rand(batch, 17, generator=generator) > STAY
    new[:, 0] = True
    return fresh.gather(1, (torch.arange(17) * new).cummax(-1).values)


def sticky_nats(rows: Tensor) -> float:
    """Nats of all tokens but the first of each row, given those before, under their source."""
    same = STAY + (1 - STAY) / LETTERS
    num_same, num = (rows[:, 1:] == rows[:, :-1]).sum().item(), rows[:, 1:].numel()
    return -num_same * math.log(same) - (num - num_same) * math.log((1 - STAY) / LETTERS)


def fit(model: tg.GPT, letters: Tensor, steps: int) -> None:
    """Train both passes, the denoising one with the loss that estimates the bound."""
    cfg, adam = model.cfg, torch.optim.Adam(model.parameters(), lr=5e-3)
    mask, places = tg.window_mask(16, 8, False, CPU), torch.arange(48).view(24, 2)
    for step in range(steps):
        rows, keys = sticky(letters, 24, 100 + step), tg.split_key(places, step)
        clean_logits, cache = model.forward_causal(rows[:, :-1])
        clean_loss = tg.token_nll(clean_logits, rows[:, 1:]).mean()
        tokens, positions = tg.split_into_windows(rows, 8)
        x0, t = tokens[..., 1:], tg.noise_level(cfg, keys, places + 48 * step, 0.0)
        noisy = tg.corrupt(x0, t, keys, cfg)
        window = tg.WindowInput(tokens[..., :1], noisy, positions, mask)
        logits = model.forward_denoise(window, cache)
        loss = clean_loss + tg.denoising_loss(logits, logits, x0, noisy, cfg)
        adam.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        adam.step()


@pytest.fixture(scope="module")
def trained(data: dict[str, Any]) -> Trained:
    torch.set_num_threads(THREADS)
    noise: dict[str, Any] = dict(diffusion_regions="iid", diffusion_full_prob=0.1)
    noise |= dict(diffusion_loss_clip=20.0, diffusion_windows="8")
    cfg = tiny(**data, **noise, model_dim=32, tied_embed_init_std=0.3)
    counter, model = tg.ByteCounter(cfg), tg.GPT(cfg)
    sp = counter.tokenizer
    words = [i for i in range(VOCAB) if not (sp.is_control(i) or sp.is_byte(i) or sp.is_unknown(i))]
    spaced = [i for i in words if sp.id_to_piece(i).startswith("▁") and len(sp.id_to_piece(i)) > 1]
    plain = [i for i in words if not sp.id_to_piece(i).startswith("▁")]
    byte_pieces = [i for i in range(VOCAB) if sp.is_byte(i)]
    letters = torch.tensor([BOS, *byte_pieces[:3], *spaced[:6], *plain[:6]])
    assert len(letters) == LETTERS
    fit(model, letters, 260)
    rows = sticky(letters, 64, 1)
    keys = tg.split_key(torch.arange(64)[:, None], torch.arange(2))
    text = we.prepare(model.eval(), counter, rows, keys, 32)
    return Trained(text, tg.bits_per_byte(sticky_nats(rows), text.bytes.sum().item()))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name for name in NAMES if we.ESTIMATORS[name].flatters is not None]
)
def test_an_estimator_errs_in_the_direction_claimed(name: str, trained: Trained) -> None:
    bound, bound_error = bpb("right", trained.text)
    found, error = bpb(name, trained.text)
    margin = 4 * math.hypot(bound_error, error)
    # The same tokens are drawn as for the bound: compare draw by draw.
    if name == "boundaries_free":
        saved = (estimate("right", trained.text).nats - estimate(name, trained.text).nats).sum(-1)
        assert saved.mean() > 4 * saved.std() / math.sqrt(len(saved))
    elif we.ESTIMATORS[name].flatters:
        assert found < bound - margin
    else:
        assert found > bound + margin


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["circular_two_pass", "circular_late_keys", "pseudo_bert", "pseudo_one"]
)
def test_reading_scored_tokens_gives_a_score_below_the_entropy(name: str, trained: Trained) -> None:
    text = trained.text
    nats = tg.token_nll_causal(text.model, text.rows).double().sum().item()
    exact = tg.bits_per_byte(nats, text.bytes.sum().item())
    bound, bound_error = bpb("right", text)
    assert trained.entropy < exact < bound - 2 * bound_error
    found, error = bpb(name, text)
    assert found < trained.entropy - 2 * error


def test_the_late_mask_adds_the_clean_keys_of_the_window_itself() -> None:
    rows, keys = random_rows(1, T3 + 1, V3), torch.zeros(1, 2).long()
    text = we.prepare(small_model(), CountOne(), rows, keys, 1)  # type: ignore[arg-type]
    allowed, late = text.mask.tolist(), we.late_mask(text).tolist()
    for query in range(2 * (S3 + 1)):
        window = query // (S3 + 1)
        for key in range(len(allowed[0])):
            # Its clean token before, and all of its tokens but the last.
            leaks = window * S3 <= key < (window + 1) * S3
            assert late[query][key] == (allowed[query][key] or leaks)


# ---- the command ----


@pytest.fixture
def artifact(data: dict[str, Any], tmp_path: Path) -> tuple[Path, tg.GPT]:
    """An artifact from another machine, whose data is not here, and its reloaded model."""
    model, _, _, counter = evaluation(**data)
    elsewhere = dataclasses.replace(
        model.cfg, data_path="/nowhere", tokenizer_path="/nowhere.model"
    )
    path = tmp_path / "model.ptz"
    artifacts.save(path, model.state_dict(), elsewhere, counter.sha256)
    return path, tg.load_artifact(path, CPU)[0]


@pytest.fixture
def environment(data: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("data_path", "tokenizer_path"):
        monkeypatch.setenv(name.upper(), data[name])


@pytest.mark.slow
@pytest.mark.usefixtures("environment")
def test_the_command_prints_the_scores_of_train_gpt(
    artifact: tuple[Path, tg.GPT], data: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    path, model = artifact
    argv = ["--rows", "8", "--samples", "4", "--windows", "1,4,T", "--window", "4", "--wrong"]
    argv = ["--artifact", str(path), *argv]
    assert likelihood.main(argv) == 0
    out = capsys.readouterr().out
    result = json.loads(out.splitlines()[-1])
    cfg = dataclasses.replace(model.cfg, **data)
    run, close = make_run(cfg), pass_rounding(cfg)
    loader, counter = tg.TokenLoader(cfg, "val"), tg.ByteCounter(cfg)
    for row, size in zip(result["bounds"], (1, 4, 16), strict=True):
        found = tg.evaluate_bound(model, run, loader, counter, size)
        same = {name: found[name] for name in ("bpb", "standard_error", "samples")}
        assert row == pytest.approx({"window": size, **same}, rel=close)
    assert (result["tokens"], result["bytes"]) == (found["tokens"], found["bytes"])
    assert result["left_to_right_bpb"] == result["bounds"][0]["bpb"]
    rows = torch.cat([loader.rows(i * 16, 1, 16, CPU) for i in starts_of(loader, 8)])
    exact = tg.bits_per_byte(tg.token_nll_causal(model, rows).double().sum().item(), found["bytes"])
    assert result["causal_bpb"] == pytest.approx(exact, rel=close)
    assert list(result["wrong"]) == ["right", *NAMES]
    bound = result["wrong"]["right"]["bpb"]
    assert bound == pytest.approx(result["bounds"][1]["bpb"], rel=close)
    for name, row in result["wrong"].items():
        assert row["percent_under"] == pytest.approx(100 * (bound - row["bpb"]) / bound, abs=1e-9)
        assert name in out.split("{")[0]


@pytest.mark.slow
@pytest.mark.usefixtures("environment")
def test_more_samples_reduce_the_error_and_keep_the_mean(
    artifact: tuple[Path, tg.GPT], capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--rows", "999", "--windows", "T", "--window", "T", "--samples", "64"]
    argv = ["--artifact", str(artifact[0]), *argv]
    assert likelihood.main(argv) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows, fewer = result["convergence"], result["rows"] / result["convergence_rows"]
    assert 3 < fewer < 4.1
    # What the spread over samples says of K = 1.
    of_one = result["bounds"][0]["standard_error"] * math.sqrt(64 * fewer)
    assert 0.5 * of_one < rows[0]["standard_error"] < 1.6 * of_one
    assert [row["samples"] for row in rows] == [1, 2, 4, 8, 16, 32, 64]
    assert rows[-1]["standard_error"] < rows[0]["standard_error"] / 3
    for row in rows[:-1]:
        margin = 4 * math.hypot(row["standard_error"], rows[-1]["standard_error"])
        assert 0 < abs(row["bpb"] - rows[-1]["bpb"]) < margin


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--artifact", "missing.ptz"], "missing.ptz"),
        (["--windows", "3"], "--windows='3'"),
        (["--windows", ""], "--windows=''"),
        (["--windows", "1,x"], "--windows='1,x'"),
        (["--window", "0"], "--window='0'"),
    ],
)
def test_errors_name_what_is_wrong(
    argv: list[str], says: str, artifact: tuple[Path, tg.GPT], capsys: pytest.CaptureFixture[str]
) -> None:
    assert likelihood.main(["--artifact", str(artifact[0]), *argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert says in err


def test_data_of_another_tokenizer_is_refused(
    artifact: tuple[Path, tg.GPT],
    data: dict[str, Any],
    tokenizers: Any,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DATA_PATH", data["data_path"])
    monkeypatch.setenv("TOKENIZER_PATH", str(tokenizers.nmt_nfkc))
    assert likelihood.main(["--artifact", str(artifact[0])]) == 2
    assert "TOKENIZER_PATH" in capsys.readouterr().err
    monkeypatch.delenv("TOKENIZER_PATH")  # the artifact's own is not there
    assert likelihood.main(["--artifact", str(artifact[0])]) == 2
    assert "/nowhere.model" in capsys.readouterr().err


@pytest.mark.usefixtures("environment")
def test_a_model_without_a_denoiser_has_no_bound(
    data: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = evaluation("ar", **data)[0]
    artifacts.save(tmp_path / "ar.ptz", model.state_dict(), model.cfg)
    assert likelihood.main(["--artifact", str(tmp_path / "ar.ptz")]) == 2
    assert "no denoiser" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        likelihood.main(["--samples", "1"])
    assert stopped.value.code == 2

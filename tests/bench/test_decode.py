"""scripts/bench/decode.py: what is counted, by hand and against tiny random models."""

from __future__ import annotations

import functools
import json
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import sentencepiece as spm
import torch

import train_gpt as tg
from scripts import decoding
from scripts.bench import decode as bench
from scripts.chain import Head
from tests.bench import artifacts
from tests.conftest import (
    ROOT,
    VOCAB,
    Called,
    outcome,
    random_rows,
    randomise,
    tiny,
    write_shard,
)

V = 64
PREFIX = 6
TARGET = 8
SUFFIX = 3


@pytest.fixture(autouse=True)
def no_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DATA_PATH", "TOKENIZER_PATH"):
        monkeypatch.delenv(name, raising=False)


def model_of(recipe: str = "direct", std: float = 0.4) -> tg.GPT:
    return randomise(tg.GPT(tiny(recipe, train_seq_len=32)), std=std)


def bench_of(rows: int = 6, judge: tg.GPT | None = None, repeats: int = 1) -> bench.Bench:
    return bench.Bench(
        model_of(),
        judge,
        None,
        random_rows(rows, PREFIX + TARGET + SUFFIX, V),
        PREFIX,
        TARGET,
        repeats,
    )


def jobs_of(
    modes: list[str], passes: list[int], batch: list[int], temperature: float = 0.0
) -> list[bench.Job]:
    options = Namespace(passes=passes, batch=batch, target=TARGET, temperature=temperature)
    options.no_lookup = False
    return bench.plan_jobs(modes, options)


def measured(at: bench.Bench, *args: Any) -> list[dict[str, Any]]:
    return bench.measure(at, jobs_of(*args), Namespace(update=lambda _=1: None))


def test_every_mode_has_the_passes_its_windows_can_take() -> None:
    jobs = jobs_of(["ar", "refine", "block", "threshold", "speculative"], [1, 6, 30], [3], 0.5)
    # 30 on eight tokens are eight.
    stepped = [(mode, n) for mode in ("refine", "block") for n in (1, 6, 8)]
    assert [job[:2] for job in jobs] == [("ar", 0), *stepped, ("threshold", 0), ("speculative", 0)]
    for job in jobs:
        mode = decoding.MODES[job.mode]
        sampling = decoding.Sampling(temperature=0.5)
        assert job.decoding == mode._replace(sampling=sampling, steps=job.passes or mode.steps)


@pytest.mark.slow
def test_modes_are_also_measured_with_a_head_and_without_lookup() -> None:
    options = Namespace(passes=[2], batch=[1], target=TARGET, temperature=0.0, no_lookup=True)
    head = Head(model_of(), 2)
    jobs = bench.plan_jobs(["ar", "block", "speculative"], options, head)
    heads = [job.decoding.head for job in jobs if job.decoding.head is not None]
    assert len({id(own.pair_cache) for own in heads}) == 3  # a row must not profit from another
    assert all(own.fc is head.fc for own in heads)
    found = {job.mode: (job.decoding.head is not None, job.decoding.lookup_ngram) for job in jobs}
    lookup = decoding.MODES["speculative"].lookup_ngram
    assert found == {
        "ar": (False, 0),
        "block": (False, 0),
        "block + head": (True, 0),
        "speculative": (False, lookup),
        "speculative, no lookup": (False, 0),
        "speculative + head": (True, lookup),
        "speculative + head, no lookup": (True, 0),
    }
    at = bench_of()
    rows = bench.measure(at, jobs, Namespace(update=lambda _=1: None))
    assert [row["identical"] for row in rows if "speculative" in row["mode"]] == [1.0] * 4


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_decoding_without_a_cache_gives_the_same(
    temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, prompt = model_of(), random_rows(5, PREFIX, V)
    sampling = decoding.Sampling(temperature=temperature, seed=3)
    ar = decoding.Decoding("ar", sampling=sampling)
    expected = decoding.generate(model, prompt, TARGET, ar)
    lengths, real = list[int](), tg.GPT.forward_causal

    def forward_causal(self: tg.GPT, ids: torch.Tensor, *rest: Any) -> Any:
        lengths.append(ids.shape[1])
        return real(self, ids, *rest)

    monkeypatch.setattr(tg.GPT, "forward_causal", forward_causal)
    found = bench.decode_uncached(model, prompt, TARGET, sampling)
    assert lengths == list(range(PREFIX, PREFIX + TARGET))
    assert found.ids.equal(expected.ids)
    assert len(found.ids[:, PREFIX:].unique(dim=0)) == 5


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [False, True])
def test_the_true_span_is_not_read(suffix: bool) -> None:
    at = bench_of()
    other = at.rows.clone()
    other[:, PREFIX : PREFIX + TARGET] = random_rows(6, TARGET, V, seed=9)
    for mode in decoding.MODES.values():
        decode = bench.decoder(at, mode, suffix)
        assert decode(at.rows, 0).ids.equal(decode(other, 0).ids)
        assert decode(at.rows, 0).ids.shape[1] == PREFIX + TARGET + suffix * SUFFIX


def test_speed_is_the_median_of_rounds_in_which_all_take_turns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    at, calls = bench_of(repeats=3), list[tuple[str, int]]()
    costs = {"a": iter([0] * 3 + [1, 1, 1, 2, 2, 2, 1, 2, 3]), "b": iter([0] * 3 + [5] * 9)}
    clock, done = [0.0], list[int]()
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def decode(name: str, rows: torch.Tensor, seed: int) -> decoding.Decoded:
        calls.append((name, seed))
        clock[0] += next(costs[name])
        return decoding.Decoded(rows, rows[:, :1] * 0 + len(rows))

    decoders = [functools.partial(decode, name) for name in "ab"]
    bar = Namespace(update=lambda n=1: done.append(n))
    both = bench.timed(at, decoders, 2, bar, lambda: calls.append(("round", 0)))
    assert sum(done) == 2 * 4  # what the bar counts to
    for found, _ in both:
        assert found.ids.equal(at.rows)
        assert found.forwards.unique().tolist() == [2]
    assert [seed for name, seed in calls if name == "a"] == [0, 2, 4] * 4
    assert "".join(name[0] for name, _ in calls) == "aaabbb" + "rabbaab" + "rbaabba" + "rabbaab"
    assert both[0][1] == {"tokens_per_second": 6 * TARGET / 6, "seconds": [3, 6, 6]}
    assert both[1][1] == {"tokens_per_second": 6 * TARGET / 15, "seconds": [15, 15, 15]}


@pytest.mark.slow
def test_speeds_are_by_ar_of_the_same_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    real, at = bench.timed, bench_of()
    costs = iter([2.0, 0.5, 1.0, 8.0, 2.0, 4.0])

    def timed(*args: Any) -> Any:
        speeds = [{"tokens_per_second": next(costs), "seconds": []} for _ in args[1]]
        return [(out, speed) for (out, _), speed in zip(real(*args), speeds, strict=True)]

    monkeypatch.setattr(bench, "timed", timed)
    rows = measured(at, ["ar", "speculative", "refine"], [2], [2, 3], 1.0)
    assert [row["times_cached_ar"] for row in rows] == [1, 0.25, 0.5, 1, 0.25, 0.5]
    assert rows[0]["identical"] == rows[1]["identical"] == 1 > rows[2]["identical"]
    assert [row["infill_accuracy"] is None for row in rows[:3]] == [True, True, False]


def test_a_wrong_token_makes_a_row_differ_and_rows_count_alike(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    at = bench_of(rows=4)
    outputs = [at.rows[:, : PREFIX + TARGET].clone() for _ in range(4)]
    forwards = torch.tensor([[2], [8], [8], [8]])
    for changed in (outputs[1], outputs[3]):  # a warm-up of each mode, then a round of both
        changed[0, -1] = (changed[0, -1] + 1) % V
    monkeypatch.setattr(
        bench,
        "decoder",
        lambda *a, **k: lambda rows, seed: decoding.Decoded(outputs.pop(0), forwards),
    )
    rows = measured(at, ["ar", "speculative"], [1], [4])
    assert [row["identical"] for row in rows] == [1, 0.75]
    assert [row["accuracy"] for row in rows] == [1, 1 - 1 / (4 * TARGET)]
    assert rows[0]["tokens_per_forward"] == (TARGET / 2 + 3 * TARGET / 8) / 4  # not 4 * TARGET / 26


def test_quality_by_hand() -> None:
    judge = model_of("ar", std=0.2)
    at, ids = bench_of(judge=judge, rows=40), random_rows(40, PREFIX + TARGET, V, seed=5)
    found = bench.quality(at, ids)
    for key, model in (("own_nats", at.model), ("judge_nats", judge)):
        rows = [tg.token_nll_causal(model, row[None])[0, -TARGET:].mean() for row in ids]
        nats = torch.stack(rows)
        assert found[key]["mean"] == pytest.approx(nats.mean().item(), rel=1e-5)
        assert found[key]["se"] == pytest.approx(nats.std().item() / 40**0.5, rel=1e-4)
    ids[:, PREFIX:] = torch.tensor([1, 2] * (TARGET // 2))
    found = bench.quality(at._replace(judge=None), ids)
    assert (found["judge_nats"], found["python"]) == (None, None)
    assert found["entropy_bits"] == pytest.approx(1)
    assert found["distinct_2"] == pytest.approx(2 / (TARGET - 1))


@pytest.mark.parametrize(
    ("decoded", "accepted"),
    [
        ("return x\n", True),
        ("return x\n    y = (1,\n        2", True),  # an open bracket: cut back to the return
        ("return x\n    if y:\n", True),  # a block without a body
        ("return x\n    '''goes on\n\n  and on\n", True),
        ("return x\n    y = = 1\n", False),
        ("return x\n    )\n    y = 1\n", False),  # not the end is wrong
        ("return '\\d'\n", True),
        ("return x", False),  # no complete line
        ("\n\n\n\n", False),  # nothing but blanks
    ],
)
def test_python_is_cut_back_to_what_can_be_judged(decoded: str, accepted: bool) -> None:
    for prompt in ("def f(x):\n    ", "@cache\ndef f(x):\n    x += 1\n    "):
        assert bench.parses(prompt + decoded, prompt) is accepted


def python_data(folder: Path, data: Any) -> spm.SentencePieceProcessor:
    sp = spm.SentencePieceProcessor(model_file=data["tokenizer_path"])
    write_shard(
        folder / "x_val_000000.bin", sp.encode((ROOT / "train_gpt.py").read_text(encoding="utf-8"))
    )
    return sp


def test_excerpts_are_spread_out_and_python_begins_with_a_definition(
    data: dict[str, Any], tmp_path: Path
) -> None:
    write_shard(tmp_path / "x_val_000000.bin", range(1000))

    def loader(vocab_size: int) -> tg.TokenLoader:
        return tg.TokenLoader(tiny(vocab_size=vocab_size, data_path=str(tmp_path)), "val")

    rows = bench.excerpts(loader(1000), 17, 9, None)
    assert rows[:, 0].tolist() == [i * 58 // 9 * 17 for i in range(9)]
    sp = python_data(tmp_path, data)
    rows = bench.excerpts(loader(VOCAB), 24, 30, sp)
    texts = {sp.decode(row) for row in rows.tolist()}
    assert len([text for text in texts if text.startswith(("def ", "class "))]) == 30


def save(
    folder: Path, data: dict[str, Any], recipe: str = "direct", name: str = "m", sha256: str = ""
) -> Path:
    cfg, path = tiny(recipe, **data | {"train_seq_len": 32}), folder / f"{name}.ptz"
    artifacts.save(path, dict(randomise(tg.GPT(cfg)).named_parameters()), cfg, sha256)
    return path


SMALL = [
    "--prefix=16",
    "--target=8",
    "--suffix=4",
    "--examples=4",
    "--passes=2",
    "--repeats=1",
    "--device=cpu",
]


def run(capsys: pytest.CaptureFixture[str], *argv: object) -> Called:
    return outcome(bench.main, [str(arg) for arg in argv], capsys)


@pytest.mark.slow
def test_all_modes_from_end_to_end(
    data: Any, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    python_data(tmp_path, data)
    monkeypatch.setenv("DATA_PATH", str(tmp_path))
    path, judge = save(tmp_path, data), save(tmp_path, data, "ar", "j")
    out, plot = tmp_path / "json", tmp_path / "png"
    more = ["--batch=1,4", "--python", "--predecessor", f"--judge={judge}"]
    more += [f"--out={out}", f"--plot={plot}"]
    _, printed, _ = run(capsys, path, *SMALL, *more)
    found = json.loads(printed.splitlines()[-1])
    assert json.loads(out.read_text(encoding="utf-8")) == found
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert [(row["batch"], row["mode"]) for row in found["rows"]] == [
        (n, mode) for n in (1, 4) for mode in decoding.MODES
    ]
    assert all(
        row["judge_nats"]["mean"] > 0 and row["python"] is not None
        for row in [*found["rows"], found["text"]]
    )
    slow, cached, *windows = found["predecessor"]
    assert (slow["times_uncached_ar"], cached["times_cached_ar"], slow["accuracy"]) == (
        1,
        1,
        cached["accuracy"],
    )
    assert [round(row["published_times_uncached_ar"], 1) for row in windows] == [21.9, 34.5, 97.3]
    assert all(f" {mode} | " in printed for mode in [*decoding.MODES, "the text", "1 pass, infill"])


@pytest.mark.slow
def test_a_compiled_pass_says_the_same(
    data: dict[str, Any], tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    artifact = save(tmp_path, data)
    compiled = list[Any]()
    whole = torch.compile

    def eager(function: Any, **how: Any) -> Any:  # as the default backend, but without a compiler
        compiled.append((function.__name__, how))
        return whole(function, backend="eager", **how)

    options = [*SMALL, "--batch=2", "--modes=ar,refine,speculative"]
    plain = json.loads(run(capsys, artifact, *options)[1].splitlines()[-1])
    monkeypatch.setattr(torch, "compile", eager)
    fast = json.loads(run(capsys, artifact, *options, "--compile")[1].splitlines()[-1])
    assert compiled == [("trunk", {"dynamic": True})]
    assert [row["accuracy"] for row in fast["rows"]] == [row["accuracy"] for row in plain["rows"]]


def test_modes_that_need_a_denoiser_are_left_out(
    data: dict[str, Any], tmp_path: Path, capsys: Any
) -> None:
    _, out, _ = run(
        capsys,
        save(tmp_path, data, "ar"),
        *SMALL,
        "--batch=2",
        "--modes=refine,ar",
        "--predecessor",
    )
    found = json.loads(out.splitlines()[-1])
    assert ([row["mode"] for row in found["rows"]], len(found["predecessor"])) == (["ar"], 2)
    assert "has no trained denoiser: refine.\nNo --judge" in out
    assert "judge nats" not in out


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--modes=specultive", "--modes='specultive' is unknown; closest: speculative"),
        ("--passes=0,2", "'0,2' must list whole numbers from 1"),
        ("--batch=3", "--examples=4 must be a multiple of --batch=3"),
        ("--target=40", "take 60 tokens; {path} was trained to read 32 (TRAIN_SEQ_LEN)"),
        ("--examples=4000", "hold only"),
        ("--python", "top-level def or class"),
        ("--judge={path}", "is the model to be judged"),
        ("--judge={other}", "has another tokenizer than"),
    ],
)
def test_mistakes_are_named(
    option: str, message: str, data: dict[str, Any], tmp_path: Path, capsys: Any
) -> None:
    path, other = save(tmp_path, data), save(tmp_path, data, "ar", "other", "0" * 64)
    option, message = (text.format(path=path, other=other) for text in (option, message))
    code, out, err = run(capsys, path, *SMALL, "--batch=2", option)
    assert (code, out, err[:7]) == (2, "", "error: ")
    assert message in err

"""scripts/sample.py and its page: what is decoded, shown and refused."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import math
import os
import re
import time
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import sentencepiece as spm
import torch

import train_gpt as tg
from scripts import chain, common, decoding, sample
from scripts.sample_page import Cell, Recording, character, join, page, spell
from tests.conftest import (
    BOS,
    CPU,
    HARD_TEXTS,
    IDENTITY,
    Called,
    Tokenizers,
    facts,
    make_run,
    outcome,
    randomise,
    tiny,
    train_tokenizer,
)

PROMPT = "def f(x):\n    "


def export(data: dict[str, Any], path: Path, recipe: str = "direct") -> Path:
    cfg = tiny(recipe, **data, train_seq_len=64, train_batch_tokens=256)
    return save(cfg, path)


def save(cfg: tg.Config, path: Path) -> Path:
    run = make_run(cfg)
    run.identity = {"tokenizer_sha256": tg.ByteCounter(cfg).sha256}
    tg.save_artifact(path, randomise(tg.GPT(cfg)).state_dict(), run)
    return path


@pytest.fixture(scope="module")
def artifact(data: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(data, tmp_path_factory.mktemp("artifact") / "model.ptz")


@pytest.fixture
def call(artifact: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Called]:
    """Run the command; `artifact` may be another."""

    def run(*argv: str, artifact: Path = artifact) -> Called:
        return outcome(sample.main, ["--artifact", str(artifact), "--device", "cpu", *argv], capsys)

    return run


@pytest.fixture
def at(artifact: Path) -> sample.Loaded:
    return sample.load(artifact, None, CPU)


# ---- decoding ----


@pytest.mark.parametrize("mode", decoding.MODES)
def test_the_command_decodes_as_decoding_does(
    call: Callable[..., Called], at: sample.Loaded, mode: str
) -> None:
    argv = ("--prompt", PROMPT, "--tokens", "12", "--mode", mode)
    found = facts(call(*argv, "--temperature", "1", "--seed", "5"))
    ids = [BOS, *at.tokenizer.encode(PROMPT)]
    sampling = decoding.Sampling(temperature=1.0, seed=5, end=BOS)
    settings = decoding.MODES[mode]._replace(sampling=sampling)
    expected = decoding.generate(at.model, torch.tensor([ids]), 12, settings)
    assert found["text"] == PROMPT + found["completion"]
    assert found["text"] == at.tokenizer.decode(expected.ids[0].tolist())
    assert (found["mode"], found["forwards"]) == (mode, int(expected.forwards))


@pytest.mark.slow
def test_compiled_passes_give_the_same_text(
    call: Callable[..., Called], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = facts(call("--prompt", PROMPT, "--tokens", "12", "--mode", "speculative"))
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    again = facts(call("--prompt", PROMPT, "--tokens", "12", "--mode", "speculative", "--compile"))
    assert again["text"] == plain["text"]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["block", "refine", "speculative", "auto"])
def test_a_head_joins_the_tokens_of_a_pass(
    call: Callable[..., Called], at: sample.Loaded, mode: str, artifact: Path, tmp_path: Path
) -> None:
    head, path = chain.Head(at.model, 2), tmp_path / "head.ptz"
    for p in head.parameters():
        torch.nn.init.normal_(p)
    about = {"artifact_sha256": common.sha256_of(artifact), "width": 2}
    chain.save_head(path, head, about)
    argv = ("--prompt", PROMPT, "--tokens", "12", "--mode", mode)
    argv += ("--latency", "1000") if mode == "auto" else ("--window", "12")
    found = facts(call(*argv, "--head", str(path)))
    if mode != "auto":
        ids = [BOS, *at.tokenizer.encode(PROMPT)]
        sampling = decoding.Sampling(end=BOS)
        loaded = chain.load_head(path, at.model, artifact)
        settings = decoding.MODES[mode]._replace(sampling=sampling, window=12, head=loaded)
        expected = decoding.generate(at.model, torch.tensor([ids]), 12, settings)
        assert found["text"] == at.tokenizer.decode(expected.ids[0].tolist())
        without = facts(call(*argv))
        assert (found["text"] == without["text"]) == (mode == "speculative")  # lossless
    other = tmp_path / "other.ptz"
    save(dataclasses.replace(at.cfg, eval_seed=1), other)
    status, _, err = call(*argv, "--head", str(path), artifact=other)
    assert status == 2
    assert "belongs to another artifact" in err


def test_a_suffix_is_read_and_kept(call: Callable[..., Called]) -> None:
    texts = [
        facts(call("--prompt", PROMPT, "--suffix", end, "--tokens", "9"))
        for end in (" return x", "\n)]:\n")
    ]
    assert texts[0]["text"] == PROMPT + texts[0]["completion"] + " return x"
    assert texts[0]["completion"] != texts[1]["completion"]
    at_start = facts(call("--prompt", "", "--suffix", "x", "--tokens", "4"))
    assert at_start["text"].endswith("x")
    empty = facts(call("--prompt", "x", "--suffix", "", "--tokens", "4", "--mode", "ar"))
    assert empty["mode"] == "ar"


def test_a_continuation_stops_where_the_document_ends(
    call: Callable[..., Called], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    full = facts(call("--prompt", PROMPT, "--tokens", "12"))
    chosen = [0]
    real = decoding.choose_tokens

    def choose_tokens(logits: torch.Tensor, *rest: Any) -> Any:
        chosen[0] += logits.shape[1]
        tokens, log_p = real(logits, *rest)
        return (tokens if chosen[0] <= 3 else torch.full_like(tokens, BOS)), log_p

    monkeypatch.setattr(decoding, "choose_tokens", choose_tokens)
    found = facts(call("--prompt", PROMPT, "--tokens", "12", "--html", str(tmp_path / "a.html")))
    assert found["forwards"] == 4
    assert full["completion"].startswith(found["completion"])
    (recording,) = recordings(tmp_path / "a.html")
    last = recording["frames"][-1][1]
    assert len(last) == 4  # three tokens and the end; nothing after it
    assert recording["units"][last[-1]][1] == "<s>"


def test_a_revision_fills_improbable_tokens_again(
    call: Callable[..., Called], at: sample.Loaded
) -> None:
    text, threshold = "def f(x):\n    return  x\n", 0.0005
    found = facts(call("--prompt", text, "--edit", "--remask-threshold", str(threshold)))
    ids = torch.tensor([[BOS, *at.tokenizer.encode(text)]])
    low = tg.token_nll_causal(at.model, ids)[0] > -math.log(threshold)
    settings = decoding.MODES["draft_refine"]._replace(remask_threshold=threshold)
    edited = decoding.edit(at.model, ids, 1, ids.shape[1], settings).ids
    assert 0 < found["masked"] == int(low.sum()) < len(low)
    assert found["changed"] == int((edited != ids).sum()) > 0
    assert not ((edited != ids)[0, 1:] & ~low).any()  # what was probable stays
    assert found["text"] == at.tokenizer.decode(edited[0].tolist())
    marked = found["changes"]
    assert re.sub(r"\[-(.*?)-\]\{\+(.*?)\+\}", r"\1", marked, flags=re.DOTALL) == text
    assert re.sub(r"\[-(.*?)-\]\{\+(.*?)\+\}", r"\2", marked, flags=re.DOTALL) == found["text"]


@pytest.mark.slow
def test_auto_and_guard(call: Callable[..., Called], tmp_path: Path) -> None:
    argv = ("--prompt", PROMPT, "--tokens", "12")
    found = facts(call(*argv, "--mode", "auto", "--latency", "60"))
    assert found["mode"] in decoding.MODES
    assert 0 < found["auto"]["seconds"] < 60
    status, _, err = call(*argv, "--nats", "1e-9")
    assert status == 2
    assert err.startswith("error: --nats=1e-09: ")
    ar = facts(call(*argv))["completion"]
    path = tmp_path / "a.html"
    # Random windows are poor.
    found = facts(call(*argv, "--mode", "refine", "--steps", "1", "--guard", "--html", str(path)))
    assert (found["fell_back"], found["completion"]) == (True, ar)
    (recording,) = recordings(path)
    assert recording["frames"][-1][0] == "left to right instead"
    assert "".join(recording["units"][index][0] for index in recording["frames"][-1][1]) == ar
    assert facts(call(*argv, "--guard"))["fell_back"] is False


# ---- passes ----


@pytest.mark.parametrize("mode", decoding.MODES)
def test_a_recording_ends_with_what_was_decoded(at: sample.Loaded, mode: str) -> None:
    recording = Recording(4, 12)
    recording.add("masked")
    suffix = [] if mode in decoding.LOSSLESS else [100, 101]
    ids = torch.tensor([[BOS, 100, 101, 102, *[0] * 12, *suffix]])
    out = decoding.decode(at.model, ids, 4, 16, decoding.MODES[mode], recording)
    assert [cell.token for cell in recording.cells] == out.ids[0, 4:16].tolist()
    assert not any(cell.masked for cell in recording.cells)
    assert {cell.chosen for cell in recording.cells} <= set(range(1, recording.passes + 1))
    assert len(recording.frames) == 1 + recording.passes <= 1 + int(out.forwards)
    for before, after in itertools.pairwise(cells for _, cells in recording.frames):
        for old, new in zip(before, after, strict=True):
            if not old.masked and not new.masked and old.token == new.token:
                assert old == new  # a token keeps the probability it was chosen with
    if mode == "ar":
        p = tg.token_nll_causal(at.model, out.ids)[0, 3:].neg().exp()
        assert [cell.p for cell in recording.cells] == pytest.approx(p.tolist(), rel=1e-3)
        assert [cell.chosen for cell in recording.cells] == list(range(1, 13))


@pytest.mark.parametrize("text", [text for text in HARD_TEXTS if "<s>" not in text])
def test_tokens_are_spelled_as_they_were(at: sample.Loaded, text: str) -> None:
    assert spell(at.tokenizer, at.tokenizer.encode(text)) == text


def test_bytes_of_a_character_are_shown_as_one(at: sample.Loaded) -> None:
    confidence = (0.5, 0.2, 0.9, 0.4, 0.3, 0.8, 0.7)
    data = "日".encode() + b"\xf0\x9f" + b"A\xff"
    tokens = [at.tokenizer.piece_to_id(f"<0x{byte:02X}>") for byte in data]
    pairs = zip(tokens, confidence, strict=True)
    cells = [Cell(*pair, False, i) for i, pair in enumerate(pairs)]
    units = join(at.tokenizer, cells)
    assert [(unit.text, unit.p, unit.chosen) for unit in units] == [
        ("日", 0.2, 2), ("\ufffd", 0.3, 4), ("A", 0.8, 5), ("\ufffd", 0.7, 6)]  # fmt: skip
    assert units[0].label == "<0xE6> <0x97> <0xA5>"
    gap = join(at.tokenizer, [cells[0], Cell(-1, 0.0, True, 0), *cells[1:3]])
    assert [(unit.text, unit.masked) for unit in gap] == [
        ("\ufffd", False),
        ("", True),
        *[("\ufffd", False)] * 2,
    ]
    assert character("é".encode() + b"\xe6") == ("é", 2)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_is_redrawn_in_place(at: sample.Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("LINES", "50")
    text = "a = (1,\n\t日本) # " + "x" * 60
    done = [Cell(token, 0.9, False, 1) for token in at.tokenizer.encode(text)]
    frames = [("masked", [cell._replace(masked=True) for cell in done]), ("pass 1", done)]
    stream = Terminal()
    slept = list[float]()
    monkeypatch.setattr("time.sleep", slept.append)
    screen = sample.Screen(at.tokenizer, ["\x1b[2Jb", "\nc"], 0.5, stream)
    for name, cells in frames:
        screen(name, cells)
    screen.close()
    frame = screen.frame(*frames[1])
    shown = "\\x1b[2Jba = (1,↵\n    日本) # " + "x" * 60 + "\nc"
    assert frame.plain == f"--- pass 1: 0 of {len(done)} tokens masked\n{shown}"
    written = stream.getvalue()
    assert "\\x1b[2J" in written
    assert "\x1b[2J" not in written  # a model cannot steer the terminal
    assert re.search(r"\x1b\[\d*A", written)  # the cursor moves up, so the first frame is gone
    last = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", written[written.rindex("--- pass 1") :])
    assert max(map(len, last.splitlines())) <= 40
    assert slept == [0.5, 0.5]


def test_without_colours_passes_are_written_in_turn(
    at: sample.Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    plain = Terminal()
    screen = sample.Screen(at.tokenizer, ["", ""], 0.0, plain)
    for name in ("masked", "pass 1"):
        screen(name, [Cell(token, 0.9, False, 1) for token in at.tokenizer.encode("a\x07b")])
    screen.close()
    assert "\x1b" not in plain.getvalue()
    assert "\x07" not in plain.getvalue()
    assert plain.getvalue().count("---") == 2


def test_colours_go_from_red_to_green() -> None:
    found = [re.findall(r"\d+", sample.colour(i / 10)) for i in range(11)]
    red, green = ([int(rgb[channel]) for rgb in found] for channel in (0, 1))
    assert red == sorted(red, reverse=True)
    assert green == sorted(green)
    assert (red[0], green[0], red[10]) == (225, 0, 0)


def test_watching_needs_rich(call: Callable[..., Called], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    status, _, err = call("--prompt", "x", "--watch")
    assert status == 2
    assert "error: --watch needs rich: pip install rich" in err


@pytest.mark.slow
def test_watching_changes_nothing_and_leaves_the_last_line(
    call: Callable[..., Called], monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ("--prompt", PROMPT, "--suffix", "x", "--tokens", "6", "--steps", "3")
    slept = list[float]()
    wait = time.sleep
    monkeypatch.setattr("time.sleep", lambda seconds: (slept.append(seconds), wait(0.2)))
    status, out, err = call(*argv, "--watch", "--delay", "9")
    watched = facts((status, out, err))
    assert sum(slept) == 0  # no terminal, so nothing waits
    assert 0 < watched["seconds"] < 0.6  # four frames took longer, but that is not the model's time
    assert watched | {"seconds": 0} == facts(call(*argv)) | {"seconds": 0}
    names, left = ("masked", "pass 1", "pass 2", "pass 3"), (6, 4, 2, 0)
    expected = [f"{name}: {n} of 6 tokens masked" for name, n in zip(names, left, strict=True)]
    assert re.findall(r"^--- (.*)$", err, re.MULTILINE) == expected
    assert "\x1b" not in err
    assert err.split("---")[1].count(sample.BLOCK) == 6


# ---- the page ----


class Parsed(HTMLParser):
    """Tags with their attributes, and the text of scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.scripts = list[tuple[str, dict[str, str | None]]](), list[str]()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags[-1:] and self.tags[-1][0] == "script" and data.strip():
            self.scripts.append(data)


def recordings(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(Parsed(path.read_text(encoding="utf-8")).scripts[0])
    return found


def test_the_page_holds_every_pass(call: Callable[..., Called], tmp_path: Path) -> None:
    path, prompt = tmp_path / "a.html", 'x = "</script><b>&amp;\n\t日本"'
    suffix = " <!--\n"
    argv = ("--prompt", prompt, "--suffix", suffix, "--tokens", "6", "--steps", "3")
    found = facts(call(*argv, "--html", str(path)))
    (recording,) = recordings(path)
    around = [recording[key] for key in ("before", "after", "title")]
    assert around == [prompt, suffix, "Infill"]
    assert [name for name, _ in recording["frames"]] == ["masked", "pass 1", "pass 2", "pass 3"]
    last = [recording["units"][index] for index in recording["frames"][-1][1]]
    assert "".join(text for text, *_ in last) == found["completion"]
    assert all(0 <= unit[2] <= 1 and not unit[3] and 1 <= unit[4] <= 3 for unit in last)


def test_the_page_needs_nothing_else_and_names_its_controls() -> None:
    text = page([{"title": "</script><script>alert(1)</script>"}])
    parsed = Parsed(text)
    assert [tag for tag, _ in parsed.tags].count(
        "script"
    ) == 2  # data and program; text cannot add one
    assert json.loads(parsed.scripts[0]) == [{"title": "</script><script>alert(1)</script>"}]
    assert not re.search(
        r"https?:|//|@import|url\(|\b(src|href)=", text.replace("behind", "").split("<script>")[0]
    )
    assert not any({"src", "href"} & set(attributes) for _, attributes in parsed.tags)
    for tag, attributes in parsed.tags:
        # The program names that one.
        if tag in ("button", "input", "select") and attributes["id"] != "play":
            assert attributes["aria-label"]
    named = set(re.findall(r'\$\("(\w+)"\)', parsed.scripts[1]))
    assert named <= {attributes.get("id") for _, attributes in parsed.tags}
    assert "prefers-color-scheme: dark" in text


def test_the_demo_shows_two_recordings(
    call: Callable[..., Called], data: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "a.html"
    found = facts(call("--demo", data["data_path"], "--tokens", "4", "--html", str(path)))
    titles = [recording["title"] for recording in recordings(path)]
    assert titles == ["Infill", "Continuation"]
    assert found["infill"]["original"]
    assert found["continuation"]["mode"] == "ar"


def test_the_demo_compares_random_weights_training_and_the_packaged_model(
    call: Callable[..., Called],
    at: sample.Loaded,
    data: dict[str, Any],
    tokenizers: Tokenizers,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    argv = ("--demo", data["data_path"], "--tokens", "4", "--compare")
    monkeypatch.setattr(common, "PACKAGED", tmp_path / "none" / "python.ptz")
    status, out, err = call(*argv)
    assert (status, err) == (0, "")
    missing = (
        "--- shipped model (none/python.ptz)\nnone/python.ptz is not there; make model trains it"
    )
    assert out.count(missing) == 2
    found = facts((status, out, err))
    for name in ("infill", "continuation"):
        compared = found["compared"][name]
        assert compared["trained"] == found[name]["completion"]
        assert compared["random"] != compared["trained"]
        assert compared["shipped"] is None
    # Another model has another tokenizer and length, and gets the same text.
    settings = {**data, "tokenizer_path": str(tokenizers.nmt_nfkc), "vocab_size": 400}
    cfg = tiny("direct", **settings, train_seq_len=32, train_batch_tokens=64)
    package(save(cfg, tmp_path / "other.ptz"), settings, tmp_path, monkeypatch)
    again = facts(call(*argv))
    assert again["compared"]["infill"]["shipped"]
    assert again["compared"]["infill"]["random"] == found["compared"]["infill"]["random"]
    common.PACKAGED.write_bytes(b"damaged")
    assert "left out: artifact" in call(*argv)[1]


def test_a_job_in_other_tokens_is_the_same_text(at: sample.Loaded, tokenizers: Tokenizers) -> None:
    other = spm.SentencePieceProcessor(model_file=str(tokenizers.nmt_nfkc))
    there = at._replace(tokenizer=other)
    prompt, suffix = (at.tokenizer.encode(text) for text in ("def f(x):\n    ", " return x\n"))
    moved = sample.translate(sample.Job("Infill", prompt, 4, suffix), at, there)
    assert moved is not None
    assert (moved.prompt, moved.num) == (sample.encode(other, "def f(x):\n    "), 4)
    assert other.decode(moved.suffix).strip() == "return x"
    long = sample.translate(sample.Job("Infill", prompt * 30, 4, suffix * 30), at, there)
    assert long is not None
    assert 1 + len(long.prompt) + 4 + len(long.suffix) == at.cfg.train_seq_len
    job = sample.Job("Infill", prompt, at.cfg.train_seq_len, suffix)
    assert sample.translate(job, at, there) is None


def test_models_are_compared_each_with_its_own_head(
    at: sample.Loaded,
    artifact: Path,
    data: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    heads = list[Any]()

    def complete(model: sample.Loaded, *_: object) -> sample.Completion:
        heads.append(model.head)
        return sample.Completion({"completion": ""}, {})

    packaged = package(artifact, data, tmp_path, monkeypatch)
    about = {"artifact_sha256": common.sha256_of(packaged), "width": 2}
    chain.save_head(packaged.with_suffix(".head"), chain.Head(at.model, 2), about)
    monkeypatch.setattr(sample, "complete", complete)
    at = at._replace(head=chain.Head(at.model, 2))
    found = {"infill": {"completion": "", "original": ""}}
    for no_head in (False, True):
        args = argparse.Namespace(no_head=no_head)
        sample.compare(at, [sample.Job("Infill", [BOS, 5], 4, [6])], found, args)
    assert [head is not None for head in heads] == [False, True, False, False]


# ---- what is refused ----


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ("--tokens 0", "argument --tokens: 0 must be 1 or more"),
        (
            "--tokens 999999",
            r"--tokens=999999 \+ suffix of 0 exceed the 64 .* use --tokens=62 or fewer",
        ),
        ("--top-p 0", "argument --top-p: 0 must be between"),
        ("--temperature nan", "argument --temperature: nan must be between 0 and"),
        ("--steps 3", "--steps: mode ar has no windows"),
        ("--mode refine --remask-threshold 0.1", "--remask-threshold: mode refine does not read"),
        ("--mode speculative --steps 3", "--steps: mode speculative does not read that; leave it"),
        ("--head x.ptz", "--head changes passes over windows, and mode ar has none"),
        ("--head nowhere.ptz --mode block", r"head nowhere\.ptz is missing, damaged or not ours"),
        ("--latency 1 --window 4", "--window: mode auto chooses that"),
        ("--mode auto", "--latency and --nats"),
        ("--latency 1 --nats 1", "--latency and --nats"),
        ("--mode block --nats 1", "--mode block has no target"),
        ("--mode ar --suffix x", "--mode ar cannot read the text of --suffix"),
        ("--edit --tokens 3", "leave --tokens=3 out"),
        ("--edit --remask-threshold 0", "--edit with --remask-threshold=0"),
        ("--edit --guard", "--guard"),
        ("--html /nowhere/a.html", "--html=/nowhere/a.html: there is no folder"),
        ("--html .", "--html=. cannot be written"),
        ("--no-such-option", "--no-such-option"),
    ],
)
def test_a_wrong_command_says_what_to_do(
    call: Callable[..., Called], argv: str, expected: str
) -> None:
    status, _, err = call("--prompt", "x", *argv.split())
    assert status == 2
    assert re.fullmatch(rf"error: .*{expected}.*\n", err), err


def test_text_that_does_not_fit(call: Callable[..., Called]) -> None:
    for argv, expected in (
        (("--prompt", "x" * 400, "--tokens", "1"), "shorten prompt or suffix by"),
        (("--prompt", "x" * 400, "--edit"), "revise a part"),
        (("--prompt", "", "--edit"), "--edit has nothing to revise"),
        (("--prompt", "\ud800", "--tokens", "1"), "not valid UTF-8"),
    ):
        status, _, err = call(*argv)
        assert status == 2
        assert re.fullmatch(rf"error: .*{expected}.*\n", err), err


class Input:
    """Standard input that holds bytes."""

    def __init__(self, data: bytes) -> None:
        self.buffer = io.BytesIO(data)

    def isatty(self) -> bool:
        return False


def test_a_prompt_comes_from_bytes_of_any_terminal(
    call: Callable[..., Called], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    expected = facts(call("--prompt", "é日", "--tokens", "2"))["text"]
    file = tmp_path / "prompt.txt"
    file.write_bytes("\ufeffé日".encode())
    undecoded = "é日".encode().decode("ascii", "surrogateescape")  # as of LC_ALL=C
    monkeypatch.setattr("sys.stdin", Input("\ufeffé日".encode()))
    for argv in ((), ("--prompt-file", str(file)), ("--prompt", undecoded)):
        assert facts(call(*argv, "--tokens", "2"))["text"] == expected
    suffix = facts(call("--prompt", "x", "--suffix", undecoded, "--tokens", "2"))["text"]
    assert suffix.endswith("é日")


def test_a_prompt_that_cannot_be_read_is_named(
    call: Callable[..., Called], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("sys.stdin", None)
    assert call() == (2, "", "error: standard input is closed; give --prompt TEXT or "
                             "--prompt-file PATH\n")  # fmt: skip
    monkeypatch.setattr("sys.stdin", Input(b"a\xff"))
    for argv, named in (
        ((), "the prompt in standard input is not UTF-8 (byte 1)"),
        (("--prompt", "a\udcff"), "the text of --prompt is not valid UTF-8"),
        (("--prompt", "a", "--suffix", "a\udcff"), "the text of --suffix is not valid UTF-8"),
        (("--prompt-file", str(tmp_path)), f"the prompt in {tmp_path} cannot be read"),
    ):
        status, _, err = call(*argv)
        assert status == 2
        assert err.startswith(f"error: {named}")


def test_control_characters_are_escaped_on_a_terminal_only(
    call: Callable[..., Called], monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ("--prompt", "a\x1b[2J\tb\u202e\n", "--tokens", "1")
    assert "a\x1b[2J\tb\u202e\n" in call(*argv)[1]
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    text = "".join(call(*argv)[1].splitlines(keepends=True)[:-1])
    assert "a\\x1b[2J\tb\\u202e\n" in text
    assert "\x1b" not in text


def test_a_tokenizer_that_cannot_serve_is_named(
    call: Callable[..., Called], data: dict[str, Any], texts: list[str], tmp_path: Path
) -> None:
    """Also where the artifact was trained with it, by a program that did not look."""
    whole = Path(data["tokenizer_path"]).read_bytes()
    without_bos = tmp_path / "no_bos.model"
    train_tokenizer(without_bos, texts, bos_id=-1)
    for model, expected in (
        (without_bos.read_bytes(), "has no BOS piece"),
        (whole.replace(b"\xe2\x96\x81", b"\xe2\xff\x81"), "no SentencePiece model"),
        (whole[:500], "no SentencePiece model"),
        (b"", "no SentencePiece model"),
    ):
        path = tmp_path / "tokenizer.model"
        path.write_bytes(model)
        run = make_run(tiny(**data, train_seq_len=64, train_batch_tokens=256))
        run.identity = {"tokenizer_sha256": hashlib.sha256(model).hexdigest()}
        weights = randomise(tg.GPT(run.cfg)).state_dict()
        tg.save_artifact(tmp_path / "a.ptz", weights, run)
        argv = ("--prompt", "x", "--tokenizer", str(path))
        status, out, err = call(*argv, artifact=tmp_path / "a.ptz")
        assert (status, out) == (2, "")
        assert re.fullmatch(f"error: .*{re.escape(str(path))}.*{expected}.*\n", err), err


def test_a_model_without_a_denoiser_says_so(
    call: Callable[..., Called], data: dict[str, Any], tmp_path: Path
) -> None:
    plain = export(data, tmp_path / "ar.ptz", "ar")
    assert facts(call("--prompt", "x", "--tokens", "3", artifact=plain))["mode"] == "ar"
    for argv, name in (
        (("--suffix", "y"), "--mode=refine"),
        (("--edit",), "--edit"),
        (("--mode", "block"), "--mode=block"),
    ):
        status, _, err = call("--prompt", "x", *argv, artifact=plain)
        assert status == 2
        assert err.startswith(f"error: {name} needs a denoiser")


def test_what_the_tokenizer_cannot_read_is_said(
    tokenizers: Tokenizers, texts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    strict = train_tokenizer(tmp_path / "strict.model", texts, **IDENTITY, byte_fallback=False)
    sample.encode(strict, "a ☃ b")
    assert "no token for '☃'" in capsys.readouterr().err
    folding, exact = (
        spm.SentencePieceProcessor(model_file=str(path))
        for path in (tokenizers.nmt_nfkc, tokenizers[0])
    )
    sample.encode(folding, "a  b\nc")
    assert "folds" in capsys.readouterr().err
    for tokenizer, text in ((folding, "a b c\n"), (folding, " return x"), (exact, "a ☃  b\n\tc")):
        sample.encode(tokenizer, text, continues=True)
    assert capsys.readouterr().err == ""


def test_the_newest_artifact_of_the_folder_is_the_default(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common, "PACKAGED", tmp_path / "models" / "python.ptz")
    argv = ["--device", "cpu", "--prompt", "x", "--tokens", "2"]
    status, _, err = outcome(sample.main, argv, capsys)
    assert status == 2
    assert err == (
        "error: models/python.ptz is not there, and the current folder holds neither "
        "final_model.int6.ptz nor final_model.int8.ptz; "
        "name one by --artifact FILE, or train one: python train_gpt.py\n"
    )
    (tmp_path / "final_model.int9.ptz").mkdir()  # no file
    for name, age in (("final_model.int8.ptz", 20), ("final_model.int6.ptz", 30)):
        (tmp_path / name).write_bytes(artifact.read_bytes())
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    assert common.newest_artifact() == Path("final_model.int8.ptz")
    os.utime(tmp_path / "final_model.int6.ptz", (1e9, 1e9))
    assert common.default_artifact() == Path("final_model.int6.ptz")
    assert facts(outcome(sample.main, argv, capsys))["mode"] == "ar"


def test_the_packaged_model_is_the_first_default(
    artifact: Path,
    data: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    """Its tokenizer lies beside it; an artifact of the folder has to be named."""
    packaged = package(artifact, data, tmp_path, monkeypatch)
    monkeypatch.chdir(tmp_path)
    Path("final_model.int8.ptz").write_bytes(b"not read")
    argv = ["--device", "cpu", "--prompt", "x", "--tokens", "2"]
    status, out, err = outcome(sample.main, argv, capsys)
    assert (status, err) == (0, "--- model: models/python.ptz, as no --artifact is named\n")
    named = outcome(sample.main, ["--artifact", str(packaged), *argv], capsys)
    assert (named[1].splitlines()[0], named[2]) == (out.splitlines()[0], "")
    packaged.with_suffix(".model").write_bytes(b"another")
    assert outcome(sample.main, argv, capsys)[0] == 2
    assert outcome(sample.main, [*argv, "--artifact", "final_model.int8.ptz"], capsys)[0] == 2


def package(
    artifact: Path, data: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """Make an artifact the packaged one, with its tokenizer beside it."""
    packaged = folder / "models" / "python.ptz"
    packaged.parent.mkdir()
    packaged.write_bytes(artifact.read_bytes())
    packaged.with_suffix(".model").write_bytes(Path(data["tokenizer_path"]).read_bytes())
    monkeypatch.setattr(common, "PACKAGED", packaged)
    return packaged


def test_another_tokenizer_is_refused(call: Callable[..., Called], tokenizers: Tokenizers) -> None:
    status, _, err = call("--prompt", "x", "--tokenizer", str(tokenizers.nmt_nfkc))
    assert status == 2
    assert "is not the tokenizer" in err

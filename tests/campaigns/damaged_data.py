"""Campaigns shards and tokenizers: damaged data, before a run starts and while it reads them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

from scripts import prepare_data, sample
from tests.campaigns.inputs import Inputs, copy_tree
from tests.campaigns.mutations import change_json_text, damage
from tests.campaigns.processes import Limits
from tests.campaigns.tries import Try, result
from tests.conftest import BOS, IDENTITY, VOCAB, program_like, train_tokenizer

HEADER_BYTES = 1024
MANIFEST = "manifest.json"
LIMITS = Limits(seconds=60.0, mib=2000.0)
# Every token of the training shards is read.
READ_ALL = {"train_batch_tokens": 1024, "micro_batches": 1, "iterations": 16}
Change = Callable[[], object]  # does to a file what was drawn


def write_over(path: Path, data: bytes) -> None:
    """Change a file in place: whoever has it open sees the new bytes."""
    with open(path, "r+b") as file:
        file.truncate(len(data))
        file.write(data)


def replace(path: Path, data: bytes) -> None:
    """Put another file in its place: whoever has it open sees the old bytes."""
    new = path.with_name(path.name + ".new")
    new.write_bytes(data)
    os.replace(new, path)


def set_header(t: Try, data: bytes) -> tuple[str, bytes]:
    place = t.draw.randrange(4)
    value = t.draw.choice((0, 1, 2, -1, 2**31 - 1, -(2**31), 20240520, 20240521, len(data) // 2))
    changed = data[: 4 * place] + struct.pack("<i", value) + data[4 * place + 4 :]
    return f"header[{place}] = {value}", changed


def set_tokens(t: Try, data: bytes) -> tuple[str, bytes]:
    count, changed = t.draw.choice((1, 10, 1000)), bytearray(data)
    value = t.draw.choice((0, BOS, 2, 3, 5, VOCAB - 1, VOCAB, 65535))
    for _ in range(count):
        place = HEADER_BYTES + 2 * t.draw.randrange((len(data) - HEADER_BYTES) // 2)
        changed[place : place + 2] = value.to_bytes(2, "little")
    return f"{count} tokens = {value}", bytes(changed)


def only_header(t: Try, data: bytes) -> tuple[str, bytes]:
    count = t.draw.choice((0, 1, 2))
    size = (len(data) - HEADER_BYTES) // 2 if t.draw.random() < 0.5 else count
    header = data[:8] + struct.pack("<i", size) + data[12:HEADER_BYTES]
    return f"{count} tokens, {size} announced", header + data[HEADER_BYTES:][: 2 * count]


def draw_bytes(t: Try, path: Path) -> Change:
    """Draw other content for a shard or the manifest; return what puts it there."""
    data, draw = path.read_bytes(), t.draw
    if path.name == MANIFEST:
        what, changed = change_json_text(data.decode(), draw)
    else:
        kinds = (set_header, set_tokens, only_header, lambda t, data: damage(data, t.draw))
        what, changed = draw.choice(kinds)(t, data)
    write = draw.choice((write_over, replace))
    t.note(f"{path.name}: {what} ({write.__name__})")
    return lambda: write(path, changed)


def put(path: Path, make: Change) -> None:
    """Make something else of a file's name."""
    path.unlink()
    make()


def draw_file(t: Try, path: Path) -> Change:
    """Draw something else than content: the file is gone, a folder, another shard."""
    others = sorted(p for p in path.parent.glob("*.bin") if p != path)
    other = t.draw.choice(others)
    foreign = t.draw.choice(sorted(t.inputs.other_data.glob("*.bin")))
    kinds: dict[str, Change] = {
        "removed": path.unlink,
        "a folder": lambda: put(path, path.mkdir),
        "a dangling link": lambda: put(path, lambda: path.symlink_to("nowhere")),
        "a pipe": lambda: put(path, lambda: os.mkfifo(path)),
        f"a copy of {other.name}": lambda: shutil.copy(other, path),
        "of other data": lambda: shutil.copy(foreign, path),
        "the folder removed": lambda: shutil.rmtree(path.parent),
    }
    what = t.draw.choice(list(kinds))
    t.note(f"{path.name}: {what}")
    return kinds[what]


class AtStep:
    """Does something once the log holds so many training steps."""

    def __init__(self, folder: Path, steps: int, change: Change) -> None:
        self.log, self.steps = folder / "out" / "logs" / "run.jsonl", steps
        self.change, self.done = change, False

    def __call__(self, pid: int) -> None:
        if self.done or not self.log.exists():
            return
        if self.log.read_bytes().count(b'"event": "train"') >= self.steps:
            self.done = True
            self.change()


def shards(t: Try) -> None:
    """Damage a shard or the manifest, before a run or during it."""
    folder, _ = t.inputs.local("read_all", **READ_ALL)
    data = copy_tree(t.inputs.data, t.folder / "data")
    path = t.draw.choice(sorted([*data.glob("*.bin"), data / MANIFEST]))
    live, steps = t.draw.random() < 0.4, t.draw.randrange(17)
    kinds = (draw_bytes, draw_bytes, draw_file)
    change, watch = t.draw.choice(kinds)(t, path), None
    if live:
        t.note(f"after step {steps}")
        watch = AtStep(t.folder, steps, change)
    else:
        change()
    outcome = t.train(t.inputs.env(data=Path("data"), **READ_ALL), LIMITS, watch)
    t.judge_run(outcome, [path.name, "DATA_PATH", "data/"])
    if outcome.status == 0:
        t.same(result(folder), "silent", but="artifact")


def piece_damaged(t: Try, model: bytes) -> tuple[str, bytes]:
    """Change letters of one piece, so that the file is still a model."""
    words = [word for word in (b"self", b"return", b"def", b"mask", b"the") if word in model]
    word = t.draw.choice(words)
    new = t.draw.choice((bytes(len(word)), b"\xff" * len(word), b"q" * len(word), b" " * len(word)))
    return f"piece {word!r} spelled {new!r}", model.replace(word, new, 1)


def other_tokenizer(t: Try, model: bytes) -> tuple[str, bytes]:
    return "of other data", (t.inputs.other_data / "tokenizer.model").read_bytes()


def without_bos(t: Try, model: bytes) -> tuple[str, bytes]:
    path = t.folder / "without_bos.model"
    train_tokenizer(path, program_like(1000), **IDENTITY, bos_id=-1, eos_id=-1, unk_id=1)
    return "without BOS", path.read_bytes()


def draw_model(t: Try, model: bytes) -> tuple[str, bytes]:
    if t.draw.random() < 0.5:
        return damage(model, t.draw)
    return t.draw.choice((piece_damaged, other_tokenizer, without_bos))(t, model)


def draw_manifest(t: Try, data: Path, model: bytes) -> bool:
    """Keep the manifest, remove it or make it name the model; return whether it was kept."""
    path, kind = data / MANIFEST, t.draw.choice(("kept", "removed", "made to fit"))
    t.note(f"manifest {kind}")
    if kind == "removed":
        path.unlink()
    if kind == "made to fit":
        manifest = json.loads(path.read_text("utf-8"))
        manifest["tokenizer"]["sha256"] = hashlib.sha256(model).hexdigest()
        path.write_text(json.dumps(manifest), "utf-8")
    return kind == "kept"


def tokenizers(t: Try) -> None:
    """Damage the tokenizer and train, sample or prepare data with it."""
    folder, _ = t.inputs.local()
    data = copy_tree(t.inputs.data, t.folder / "data")
    path = data / "tokenizer.model"
    what, model = draw_model(t, path.read_bytes())
    path.write_bytes(model)
    t.note(f"tokenizer.model: {what}")
    command = t.draw.choice(("train", "train", "sample", "prepare"))
    t.note(command)
    if command == "train":
        kept = draw_manifest(t, data, model)
        outcome = t.train(t.inputs.env(data=Path("data")), LIMITS)
        t.judge_run(outcome, ["TOKENIZER_PATH", "tokenizer.model"])
        if outcome.status == 0 and kept:
            t.same(result(folder), "silent", but="artifact")
    elif command == "sample":
        t.judge(t.call(lambda: sample.main(sample_args(folder, path))), ["tokenizer"])
    else:
        argv = prepare_args(t.inputs, path)
        t.judge(t.call(lambda: prepare_data.main(argv)), ["tokenizer"])


def sample_args(folder: Path, tokenizer: Path) -> list[str]:
    (artifact,) = (folder / "out").glob("*.ptz")
    argv = ["--artifact", str(artifact), "--tokenizer", str(tokenizer), "--device", "cpu"]
    return [*argv, "--prompt", "def mask(self):", "--tokens", "4"]


def prepare_args(inputs: Inputs, tokenizer: Path) -> list[str]:
    source = str(inputs.data) + ".jsonl"
    argv = ["--source", "files", source, "--tokenizer", str(tokenizer), "--out", "prepared"]
    return [*argv, "--val-percent", "20"]

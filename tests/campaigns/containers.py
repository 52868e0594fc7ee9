"""Campaigns artifacts and checkpoints: damaged files, below their checksum and above it."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import lzma
import math
import shutil
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import train_gpt as tg
from scripts import sample
from tests.campaigns.inputs import Inputs, copy_tree
from tests.campaigns.interruptions import OFTEN
from tests.campaigns.mutations import ODD_VALUES, change_json, damage
from tests.campaigns.processes import Limits, Outcome, fork
from tests.campaigns.tries import Try, result
from tests.conftest import random_rows

CPU = torch.device("cpu")
LIMITS = Limits(seconds=60.0, mib=6000.0)
# What a hostile file may cost: so many seconds more than so many times a sound one, and so much
# more memory.
MOST_SECONDS, TIMES = 2.0, 3.0
MOST_MIB = 300.0
KINDS = ("zlib", "xz")
BOMB_BYTES = {"zlib": 512 << 20, "xz": 400 << 20}  # each made in seconds
SHAPES: tuple[str, ...] = (
    "vocab_size",
    "num_layers",
    "model_dim",
    "num_heads",
    "num_kv_heads",
    "mlp_mult",
)
SHAPES += ("tie_embeddings", "bigram_vocab_size")
HUGE = (10**6, 10**9, 2**31, 2**63, 32768, 8192)
# Large enough that one matrix of the artifact is of integers with scales.
LARGE = {"bigram_vocab_size": 8192}


class Damaged(NamedTuple):
    """A file's new content."""

    what: str
    data: bytes
    sealed: bool  # its checksum is right, so another result is none of the program's faults
    must_fail: bool = False  # no reader may accept it


# ==============================================================================
# 1  STRUCTURE -- what pack_tensors writes, taken apart and put together again
# ==============================================================================


def parts(packed: bytes) -> tuple[dict[str, Any], bytes]:
    """Return the header and the data of what pack_tensors wrote."""
    body = packed[40:]
    at = 8 + int.from_bytes(body[:8], "little")
    header = json.loads(body[8:at])
    if seal(json.dumps(header).encode(), body[at:]) != packed:
        raise RuntimeError("pack_tensors writes another format; change parts and seal")
    return header, body[at:]


def seal(header: bytes, data: bytes) -> bytes:
    """Put header and data together with a right size and checksum."""
    body = len(header).to_bytes(8, "little") + header + data
    return len(body).to_bytes(8, "little") + hashlib.sha256(body).digest() + body


ODD_DTYPES = ("<f8", "<i8", "|O", "|V8", "<U9", "<M8[s]", "|S0", "", "x", "f4,f4", None, 7)
# fmt: off
ODD_SHAPES: tuple[Any, ...] = (
    [2**40], [-1], [0], [2**63, 2**63], [], [1] * 200, [1.5], ["1"], None, "text", [[1]], [2**70],
)
# fmt: on
DEEP = b"[" * 200_000


def change_header(packed: bytes, t: Try) -> Damaged:
    """Change the description of one tensor, or any place of it, checksum made right."""
    header, data = parts(packed)
    new, place = copy.deepcopy(header), t.draw.randrange(len(header["tensors"]))
    row, kind = new["tensors"][place], t.draw.randrange(5)
    what = f"{row[0]}: "
    if kind == 0:
        new["tensors"].append(row)
        what, data = f"{what}twice", data + data[:64]
    elif kind == 1:
        row[1] = t.draw.choice(ODD_DTYPES)
        what += f"dtype {row[1]}"
    elif kind == 2:
        row[2] = t.draw.choice([*ODD_SHAPES, [*row[2], 1]])
        what += f"shape {str(row[2])[:40]}"
    elif kind == 3:
        what, new["tensors"] = change_json(new["tensors"], t.draw)
    else:
        return Damaged("header nested 200,000 deep", seal(DEEP, data), True, True)
    must_fail = bool(new != header)
    return Damaged(what, seal(json.dumps(new).encode(), data), True, must_fail)


def change_tensor(packed: bytes, t: Try) -> Damaged:
    """Change one tensor, checksum made right."""
    about, tensors = tg.unpack_tensors(packed)
    name = t.draw.choice(list(tensors))
    w = tensors[name]
    flat = w.reshape(-1).clone()
    changes: dict[str, Callable[[], object]] = {
        "removed": lambda: tensors.pop(name),
        "renamed": lambda: tensors.update({name + "x": tensors.pop(name)}),
        "empty": lambda: tensors.update({name: w.new_zeros(0)}),
        "of shape (n, 1)": lambda: tensors.update({name: flat[:, None]}),
        "longer": lambda: tensors.update({name: torch.cat((flat, flat[:1]))}),
        "a number": lambda: tensors.update({name: flat[0]}),
        "an extra tensor": lambda: tensors.update({"extra": w}),
    }
    if w.is_floating_point():
        for value in (math.nan, math.inf, -math.inf):
            changes[f"{value}"] = functools.partial(set_number, tensors, name, value)
    what = t.draw.choice(list(changes))
    before = {key: (value.shape, value.dtype) for key, value in tensors.items()}
    changes[what]()
    same = before == {key: (value.shape, value.dtype) for key, value in tensors.items()}
    must_fail = not same or what in ("nan", "inf", "-inf")
    return Damaged(f"{name}: {what}", tg.pack_tensors(about, tensors), True, must_fail)


def set_number(tensors: dict[str, Tensor], name: str, value: float) -> None:
    changed = tensors[name].clone()
    changed.view(-1)[0] = value
    tensors[name] = changed


def change_about(packed: bytes, t: Try) -> Damaged:
    """Change what the file says of itself, checksum made right."""
    about, tensors = tg.unpack_tensors(packed)
    what, changed = change_json(about, t.draw)
    return Damaged(what, tg.pack_tensors(changed, tensors), True)


def ask_for_more(packed: bytes, t: Try) -> Damaged:
    """Let the settings ask for a larger model than the tensors are."""
    about, tensors = tg.unpack_tensors(packed)
    name = t.draw.choice(SHAPES)
    value = t.draw.choice([value for value in HUGE if value != about["config"][name]])
    about["config"][name] = value
    return Damaged(f"config.{name} = {value}", tg.pack_tensors(about, tensors), True, True)


def unknown_setting(packed: bytes, t: Try) -> Damaged:
    about, tensors = tg.unpack_tensors(packed)
    about["config"]["no_such_setting"] = t.draw.choice((1, "text", None))
    return Damaged("config.no_such_setting", tg.pack_tensors(about, tensors), True)


def damage_packed(packed: bytes, t: Try) -> Damaged:
    """Change bytes below the checksum."""
    what, data = damage(packed, t.draw)
    return Damaged(f"content: {what}", data, False)


STRUCTURE = (change_header, change_tensor, change_about, ask_for_more, unknown_setting)


# ==============================================================================
# 2  ARTIFACTS
# ==============================================================================


def compressor(kind: str) -> Any:
    """An object with compress and flush."""
    if kind == "zlib":
        return zlib.compressobj(1)
    return lzma.LZMACompressor(lzma.FORMAT_XZ, preset=0)


def compress(data: bytes, kind: str, zeros: int = 0) -> bytes:
    """Compress data and then so many zeros."""
    packer, block = compressor(kind), bytes(1 << 20)
    found = [packer.compress(data)]
    found += [packer.compress(block) for _ in range(zeros >> 20)]
    return b"".join([*found, packer.flush()])


@functools.cache
def bomb(inputs: Inputs, kind: str, start: str) -> bytes:
    """A small file that becomes gigabytes of zeros."""
    packed, size = sound_artifact(inputs)[1], BOMB_BYTES[kind]
    starts = {
        "zeros": b"",
        "content and zeros": packed,
        "a size of all": size.to_bytes(8, "little"),
        "the largest size": b"\xff" * 7 + b"\x7f",
    }
    return compress(starts[start], kind, size)


@functools.cache
def sound_artifact(inputs: Inputs) -> tuple[Path, bytes]:
    """The folder of a run, and the content of its artifact."""
    folder, _ = inputs.run("artifact", **LARGE)
    (path,) = (folder / "out").glob("*.ptz")
    return folder, tg.decompress(path.read_bytes())


def score(path: Path) -> int:
    """Load an artifact as scripts do and score fixed tokens."""
    try:
        model, _ = tg.load_artifact(path, CPU)
    except tg.UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    ids = random_rows(2, 16, min(model.cfg.vocab_size, 64))
    with torch.no_grad():
        print(f"nats {tg.token_nll_causal(model, ids).double().sum().item():.6f}")
    return 0


def reader(inputs: Inputs, target: str, path: str) -> tuple[Callable[[], int], dict[str, str]]:
    """A command that reads an artifact, and its environment."""
    if target == "load":
        return lambda: score(Path(path)), {}
    if target == "train":
        return tg.main, inputs.env(init_from=path, nelbo_sequences=1, **LARGE)
    argv = ["--artifact", path, "--prompt", "def mask", "--tokens", "4", "--device", "cpu"]
    return lambda: sample.main(argv), {}


@functools.cache
def read_sound(inputs: Inputs, target: str, kind: str) -> tuple[Path, Outcome]:
    """What a command does with the undamaged file."""
    folder = inputs.folder / f"{target}_{kind}"
    outcome = read_in(folder, inputs, target, compress(sound_artifact(inputs)[1], kind))
    if outcome.status:
        raise RuntimeError(f"{target}: status {outcome.status}: {outcome.err[-2000:]}")
    return folder, outcome


def read_in(folder: Path, inputs: Inputs, target: str, data: bytes) -> Outcome:
    """Let a command read an artifact in a new folder."""
    folder.mkdir(parents=True)
    (folder / "artifact.bin").write_bytes(data)
    body, env = reader(inputs, target, "artifact.bin")
    return fork(body, folder, env, LIMITS)


def damage_artifact(t: Try, kind: str) -> Damaged:
    """Draw a damaged artifact."""
    packed = sound_artifact(t.inputs)[1]
    level = t.draw.choice(("file", "content", *("structure",) * 4, "bomb"))
    if level == "file":
        what, data = damage(compress(packed, kind), t.draw)
        return Damaged(f"file: {what}", data, False)
    if level == "bomb":
        start = t.draw.choice(("zeros", "content and zeros", "a size of all", "the largest size"))
        return Damaged(f"bomb: {start}", bomb(t.inputs, kind, start), False, True)
    change = damage_packed if level == "content" else t.draw.choice(STRUCTURE)
    found = change(packed, t)
    return found._replace(data=compress(found.data, kind))


def artifacts(t: Try) -> None:
    """Load, sample from, or start from a damaged artifact."""
    kind, target = t.draw.choice(KINDS), t.draw.choice(("load", "load", "sample", "train"))
    found = damage_artifact(t, kind)
    t.note(f"{kind} artifact: {found.what}; {target}")
    folder, sound = read_sound(t.inputs, target, kind)
    outcome = t.count(read_in(t.folder / "first", t.inputs, target, found.data))
    judge = t.judge_run if target == "train" else t.judge
    judge(outcome, ["artifact", "INIT_FROM", "not finite"])
    if outcome.status == 0 and found.must_fail:
        t.fault("accepted")
    elif outcome.status == 0 and not found.sealed:
        if target == "train":
            t.same(result(folder), "silent")
        elif answer(outcome, target) != answer(sound, target):
            t.fault(f"silent: {answer(outcome, target)} is not {answer(sound, target)}")

    def again() -> tuple[Outcome, Outcome]:
        data = compress(sound_artifact(t.inputs)[1], kind)
        first = read_in(t.folder / "second", t.inputs, target, found.data)
        return first, read_in(t.folder / "sound", t.inputs, target, data)

    check_cost(t, outcome, sound, again)


def answer(outcome: Outcome, target: str) -> str:
    """What a command printed, without times."""
    lines = outcome.out.splitlines()
    return "\n".join(lines[:-1] if target == "sample" else lines)


def is_costly(here: Outcome, sound: Outcome) -> bool:
    longer = here.seconds > MOST_SECONDS + TIMES * sound.seconds
    return longer or here.mib > MOST_MIB + sound.mib


def check_cost(
    t: Try, here: Outcome, sound: Outcome, again: Callable[[], tuple[Outcome, Outcome]]
) -> None:
    """A damaged file costs little more than a sound one; a busy machine may only seem so, once."""
    if is_costly(here, sound):
        here, sound = again()
    if is_costly(here, sound):
        took = f"{here.seconds:.1f} s and {here.mib:.0f} MiB"
        t.fault(f"costs {took}; undamaged {sound.seconds:.1f} s and {sound.mib:.0f} MiB")


# ==============================================================================
# 3  CHECKPOINTS
# ==============================================================================

REFUSED = ("step", "seconds", "data_sha256", "tokenizer_sha256")  # whatever other value they get


def damage_checkpoint(t: Try, packed: bytes) -> Damaged:
    """Draw a damaged checkpoint."""
    if t.draw.random() < 0.35:
        what, data = damage(packed, t.draw)
        return Damaged(f"file: {what}", data, False)
    if t.draw.random() < 0.3:
        return change_place(t, packed)
    return t.draw.choice((change_header, change_tensor, change_about))(packed, t)


def change_place(t: Try, packed: bytes) -> Damaged:
    """Give step, time or identity a value that cannot be or is another's, checksum made right."""
    about, tensors = tg.unpack_tensors(packed)
    name = t.draw.choice(REFUSED)
    odd = [value for value in ODD_VALUES if not is_plausible(name, value)]
    about[name] = value = t.draw.choice([*odd, "0" * 64] if name.endswith("256") else odd)
    return Damaged(f"{name} = {value!r:.60}", tg.pack_tensors(about, tensors), True, True)


def is_plausible(name: str, value: Any) -> bool:
    """Whether a checkpoint of the run may hold this number of steps or seconds."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return name in ("step", "seconds") and 0 <= value <= 8 and (name != "step" or value % 1 == 0)


class Other(NamedTuple):
    """A sound checkpoint where it does not belong, and the settings it is resumed with."""

    what: str
    env: dict[str, str]
    must_fail: bool = True


def other_checkpoint(t: Try) -> Other:
    """Use the checkpoint before the last one, or that of another seed, settings or data."""
    kind, env = t.draw.randrange(6), t.inputs.env(**OFTEN)
    path, previous = (t.folder / name for name in t.inputs.checkpoints())
    if kind == 0:
        shutil.copy(previous, path)
        return Other("the previous checkpoint", env, False)
    if kind == 1:
        other = t.inputs.interrupted("interrupted_other", seed=7, **OFTEN)
        shutil.copy(other / path.relative_to(t.folder), path)
        return Other("of another seed", env)
    if kind == 2:
        return Other("other settings", env | {"MATRIX_LR": "0.011"})
    if kind == 3:
        data = t.inputs.other_data
        return Other("other data and tokenizer", t.inputs.env(data=data, **OFTEN))
    path.unlink()
    if kind == 4:
        return Other("only the previous checkpoint", env, False)
    path.mkdir()
    return Other("a folder", env)


def checkpoints(t: Try) -> None:
    """Resume from a damaged checkpoint, or from one of another run."""
    source, env = t.inputs.interrupted(**OFTEN), t.inputs.env(**OFTEN)
    copy_tree(source, t.folder)
    name, comparable = t.inputs.checkpoints()[0], True
    path = t.folder / name
    if t.draw.random() < 0.15:
        other = other_checkpoint(t)
        what, env = other.what, other.env
        must_fail = other.must_fail
    else:
        found = damage_checkpoint(t, path.read_bytes())
        path.write_bytes(found.data)
        what, must_fail = found.what, found.must_fail
        comparable = not found.sealed
    t.note(f"checkpoint: {what}")
    outcome = t.train(env, LIMITS)
    t.judge_run(outcome, ["checkpoint", "RESUME", "MATRIX_LR", "not finite"])
    if outcome.status == 0 and must_fail:
        t.fault("accepted")
    elif outcome.status == 0 and comparable:
        t.same(result(t.inputs.run("undisturbed", **OFTEN)[0]), "silent")

    def again() -> tuple[Outcome, Outcome]:
        folders = [copy_tree(source, t.folder / name) for name in ("again", "sound")]
        if path.is_file():
            shutil.copy(path, folders[0] / name)
        first, second = (fork(tg.main, folder, env, LIMITS) for folder in folders)
        return first, second

    check_cost(t, outcome, sound_resume(t.inputs), again)


@functools.cache
def sound_resume(inputs: Inputs) -> Outcome:
    """What resuming from the undamaged checkpoint takes."""
    folder = copy_tree(inputs.interrupted(**OFTEN), inputs.folder / "resumed")
    outcome = fork(tg.main, folder, inputs.env(**OFTEN))
    if outcome.status:
        raise RuntimeError(f"resume: status {outcome.status}: {outcome.err[-2000:]}")
    return outcome

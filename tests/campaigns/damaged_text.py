"""Campaigns logs and prompts: files that scripts/study reads, and options of sample.py."""

from __future__ import annotations

import functools
import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import train_gpt as tg
from scripts import sample
from scripts.decoding import MODES
from scripts.study import compare, report, sweep
from tests.campaigns.inputs import Inputs
from tests.campaigns.mutations import change_json, damage
from tests.campaigns.processes import Limits, Outcome, fork
from tests.campaigns.tries import Try, last_line
from tests.conftest import HARD_TEXTS, ROOT, program_like

LIMITS = Limits(seconds=60.0, mib=2000.0)
RUNS = ROOT / "logs" / "record_cpu" / "logs"  # of the record protocol, with equal settings:
LOGS = ("ar_1337_6925c866", "ar_42_8b485ed7", "retrograde_1337_975350f1")
VICTIM = "direct_1337_e9f5c2e8"  # the log that is damaged
FILES = ("docs/recipes.md", "submission.json", "logs/results.json", "ladder.toml")
Lines = list[bytes]


# ==============================================================================
# 1  LOGS
# ==============================================================================


def change_event(t: Try, lines: Lines) -> str:
    place = t.draw.randrange(len(lines))
    what, changed = change_json(json.loads(lines[place]), t.draw)
    lines[place] = json.dumps(changed).encode()
    return f"line {place + 1}: {what}"


def cut_line(t: Try, lines: Lines) -> str:
    place = t.draw.randrange(len(lines))
    lines[place] = lines[place][: t.draw.randrange(len(lines[place]))]
    if t.draw.random() < 0.5 and place + 1 < len(lines):
        lines[place] += lines.pop(place + 1)
        return f"line {place + 1} cut and joined with the next"
    return f"line {place + 1} cut"


def odd_line(t: Try, lines: Lines) -> str:
    kinds: list[bytes] = [
        b"\0" * 4096,
        b"[" * 100_000,
        b"\xff\xfe",
        b"null",
        b"[]",
        b'"text"',
        b"{}",
        b"1e999",
    ]
    kinds += [b'{"event": "final", "bpb": NaN}', b'{"event": []}', b'{"event": "x"}', b"9" * 9999]
    place, new = t.draw.randrange(len(lines) + 1), t.draw.choice(kinds)
    lines.insert(place, new)
    return f"line {place + 1}: {new[:40]!r}"


def other_order(t: Try, lines: Lines) -> str:
    kind, place = t.draw.randrange(4), t.draw.randrange(len(lines))
    if kind == 0:
        del lines[place]
        return f"line {place + 1} removed"
    if kind == 1:
        lines.insert(t.draw.randrange(len(lines)), lines[place])
        return f"line {place + 1} twice"
    if kind == 2:
        del lines[0]
        return "without its header"
    lines.reverse()
    return "lines in reverse"


def other_run(t: Try, lines: Lines) -> str:
    """Mix in the lines of another run."""
    name = t.draw.choice(LOGS)
    others = (RUNS / f"{name}.jsonl").read_bytes().splitlines()
    if t.draw.random() < 0.5:
        lines.extend(others)
        return f"followed by {name}"
    lines[:] = [line for pair in zip(lines, others, strict=False) for line in pair]
    return f"mixed with {name}"


CHANGES: tuple[Callable[[Try, Lines], str], ...] = (
    change_event,
    change_event,
    cut_line,
    odd_line,
    other_order,
    other_run,
)


def damage_log(t: Try, path: Path) -> None:
    """Change the log in one or two ways, or put something else in its place."""
    if t.draw.random() < 0.1:
        path.unlink()
        path.mkdir()
        t.note(f"{path.name}: a folder")
        return
    if t.draw.random() < 0.2:
        what, data = damage(path.read_bytes(), t.draw)
        path.write_bytes(data)
        t.note(f"{path.name}: {what}")
        return
    lines = path.read_bytes().splitlines()
    t.note(f"{path.name}: {t.draw.choice(CHANGES)(t, lines)}")
    path.write_bytes(b"\n".join(lines) + b"\n")


def damage_file(t: Try, path: Path) -> None:
    """Change a file that stands beside the logs."""
    what, data = damage(path.read_bytes(), t.draw)
    path.write_bytes(data)
    t.note(f"{path.name}: {what}")


def make_study(folder: Path) -> Path:
    """Put four logs and the files that the scripts read into a folder."""
    for name in ("logs", "docs"):
        (folder / name).mkdir(parents=True)
    for name in (*LOGS, VICTIM):
        shutil.copy(RUNS / f"{name}.jsonl", folder / "logs")
    for name in FILES[:3]:
        shutil.copy(ROOT / name, folder / name)
    shutil.copy(ROOT / "scripts" / "study" / "ladder.toml", folder)
    return folder


def command(name: str) -> Callable[[], int]:
    """Return a command that reads the current folder's files."""
    logs = ["--logs", "logs"]
    files = [*logs, "--readme", "docs/recipes.md", "--submission", "submission.json"]
    calls: dict[str, tuple[Callable[[list[str]], int], list[str]]] = {
        "report": (report.main, files),
        "check": (report.main, [*files, "--check"]),
        "compare": (compare.main, [*logs, "--against", "ar"]),
        "sweep": (sweep.main, ["defects", "--dry-run"]),
    }
    main, argv = calls[name]

    def body() -> int:
        tg.LADDER_FILE = Path("ladder.toml").resolve()
        return main(argv)

    return body


@functools.cache
def sound(inputs: Inputs) -> Outcome:
    """What report.py prints for undamaged logs."""
    outcome = fork(command("report"), make_study(inputs.folder / "study"), {})
    if outcome.status:
        raise RuntimeError(f"report: status {outcome.status}: {outcome.err[-2000:]}")
    return outcome


def rows_of(printed: str, recipe: str) -> list[list[str]]:
    """Numbers of a recipe in the table of scores; columns that it has nothing for are left out."""
    found = list[list[str]]()
    for line in printed.splitlines():
        cells = [cell.strip() for cell in line.strip("| ").split("|")]
        if cells[0].startswith(f"`{recipe}`") and len(cells) > 3 and cells[3].isdecimal():
            found.append([cell for cell in cells[3:] if cell != "-"])
    return found


def logs(t: Try) -> None:
    """Damage one log or one file; no other run's numbers change, and what is left out is named."""
    make_study(t.folder)
    by_log = t.draw.random() < 0.75
    if by_log:
        name = f"{VICTIM}.jsonl"
        damage_log(t, t.folder / "logs" / name)
        call = t.draw.choice(("report", "report", "check", "compare"))
    else:
        name = t.draw.choice(FILES)
        damage_file(t, t.folder / name)
        call = t.draw.choice(("check", "check", "report", "compare", "sweep"))
    t.note(call)
    outcome = t.call(command(call), {}, LIMITS)
    t.judge(outcome, [Path(name).name], (0, 1, 2))
    if by_log and call == "report" and outcome.status == 0:
        check_report(t, outcome, name)


def check_report(t: Try, outcome: Outcome, name: str) -> None:
    before = sound(t.inputs).out
    for recipe in ("ar", "retrograde"):
        if rows_of(outcome.out, recipe) != rows_of(before, recipe):
            t.fault(f"numbers of {recipe} changed: {rows_of(outcome.out, recipe)}")
    left_out = not rows_of(outcome.out, "direct")
    if left_out and Path(name).stem not in outcome.err + outcome.out:
        t.fault(f"{name} is left out and not named")


# ==============================================================================
# 2  PROMPTS
# ==============================================================================

# fmt: off
ODD_TEXTS = (
    "", " ", "\n", "\n\n\n", "\t", "<s>", "</s>", "<unk>", "<0x0A>", "\u2581", "\u202eabc",
    "\ufeff", "\x1b[31mred\x1b[0m", "\x07\x08", "e\u0301" * 20, "\U0001f468\u200d\U0001f469" * 5,
    "a" * 20_000, "\u65e5\u672c" * 3000, "\udcff\udcfe", "x\udc80y", "\r\n", "\u2028",
)
USUAL: dict[str, tuple[str, ...]] = {
    "--tokens": ("1", "2", "5", "16", "40"), "--steps": ("1", "2", "5", "64"),
    "--window": ("1", "2", "4", "8", "16"), "--threshold": ("0", "0.5", "1"),
    "--remask-threshold": ("1e-9", "0.5", "1"), "--temperature": ("0", "1e-9", "0.7", "1", "1e6"),
    "--top-k": ("0", "1", "2", "399", "400", "401"), "--top-p": ("1e-9", "0.5", "1"),
    "--seed": ("0", "1", "2147483647"), "--latency": ("0", "1e-9", "0.01", "10"),
    "--nats": ("0", "1", "5", "1e6"),
}
ODD: tuple[str, ...] = (
    "", "0", "-1", "1.5", "x", "nan", "inf", "-inf", "1e-300", "1e7", "3", "17", "100000",
    "2147483647", "2147483648", "9" * 400, "\u0661",
)
# fmt: on
WINDOWED = ("--steps", "--window", "--threshold", "--remask-threshold", "--latency", "--nats")
TOKENS_SECONDS = Limits(seconds=30.0, mib=3000.0, slow=True)  # many tokens may take long


def draw_text(t: Try) -> str:
    """Draw a text: usual, odd, or random characters."""
    kind = t.draw.randrange(4)
    if kind == 0:
        return t.draw.choice(ODD_TEXTS)
    if kind == 1:
        return t.draw.choice(HARD_TEXTS)
    if kind == 2:
        return "".join(chr(t.draw.choice((65, 0x3B1, 0x4E00, 0x1F600)) + i) for i in range(20))
    return "\n".join(program_like(40)[t.draw.randrange(20) :][: t.draw.randint(1, 6)])


def draw_options(t: Try) -> list[str]:
    argv, mode = list[str](), t.draw.choice(["", "", "auto", *MODES])
    if mode:
        argv += ["--mode", mode]
    # Each of these needs a mode with windows, or mode auto.
    unfit = {"": WINDOWED, "ar": WINDOWED, "auto": WINDOWED[:4]}.get(mode, WINDOWED[4:])
    unfit += tuple(f"--{name.replace('_', '-')}" for name in sample.UNREAD.get(mode, ()))
    fitting = [name for name in USUAL if name not in unfit or t.draw.random() < 0.05]
    for name in t.draw.sample(fitting, t.draw.randrange(4)):
        value = t.draw.choice(ODD if t.draw.random() < 0.15 else USUAL[name])
        argv.append(f"{name}={value}")
    if mode == "auto" and t.draw.random() < 0.9:
        argv.append(t.draw.choice(("--latency=0.05", "--nats=5")))
    if mode not in ("ar", "speculative") and t.draw.random() < 0.4:
        argv.append(f"--suffix={draw_text(t)}")
    if t.draw.random() < 0.1:
        argv.append(t.draw.choice(("--edit", "--guard", "--watch", "--html=page.html")))
    if not any(part.startswith("--tokens") for part in argv) and "--edit" not in argv:
        argv.append("--tokens=6")
    return argv


def prompts(t: Try) -> None:
    """Ask sample.py for random text with random options, by argument, file or standard input."""
    long = {"train_seq_len": 128, "train_batch_tokens": 256, "micro_batches": 1}
    folder, _ = t.inputs.run("sampler", **long)
    (artifact,) = (folder / "out").glob("*.ptz")
    prompt, way = draw_text(t), t.draw.choice((*("argument", "file", "stdin") * 3, "demo"))
    raw = prompt.encode("utf-8", "surrogateescape")
    argv = ["--artifact", str(artifact), "--device", "cpu", "--delay=0", *draw_options(t)]
    argv += [f"--prompt={prompt}"] if way == "argument" else []
    if way == "demo":
        argv += ["--demo", str(t.inputs.data)]
    if way == "file":
        (t.folder / "prompt.txt").write_bytes(raw)
        argv += ["--prompt-file", "prompt.txt"]
    t.note(f"{way}: {ascii(prompt)[:80]} {ascii(argv[5:])[:300]}")
    stdin = raw if way == "stdin" else b""
    outcome = t.call(lambda: sample.main(argv), {}, TOKENS_SECONDS, stdin=stdin)
    options = [part.split("=")[0] for part in argv if part.startswith("--")]
    t.judge(outcome, [*options, "prompt", "suffix", "tokens", "text", "--latency"])
    if outcome.status == 0 and not outcome.ended:
        check_answer(t, outcome)


def check_answer(t: Try, outcome: Outcome) -> None:
    """The last line is one JSON object of finite numbers."""
    try:
        found = json.loads(last_of(outcome.out))
    except ValueError:
        t.fault(f"the last line is no JSON: {last_line(outcome.out)}")
        return
    if wrong := [key for key, value in found.items() if not is_finite(value)]:
        t.fault(f"not finite: {', '.join(wrong)}")


def last_of(printed: str) -> str:
    return (printed.splitlines() or [""])[-1]


def is_finite(value: Any) -> bool:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return all(map(is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)

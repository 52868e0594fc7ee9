"""Continue, fill in or revise text with an exported model: decode in any mode, show before and
after, and every pass.

    python scripts/sample.py --prompt 'def area(radius):' --tokens 40
    python scripts/sample.py --prompt 'def area(radius):' --suffix 'return result' --tokens 16 --steps 8 --watch
    python scripts/sample.py --prompt 'def area(radius):' --mode block --html pass_by_pass.html
    python scripts/sample.py --edit --redo 0.002 <draft.py      tokens that the model finds unlikely are filled in again
    python scripts/sample.py --prompt 'import os' --mode auto --latency 0.1
    python scripts/sample.py --demo data/stdlib           one function filled in and one continued, beside the original

Without --prompt or --prompt-file, the prompt is read from standard input. The last line is one JSON
object.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import shutil
import sys
import time
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, TextIO

if TYPE_CHECKING:
    import sentencepiece as spm
    import torch

    from train_gpt import GPT, Config, Decoding

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository

from scripts.sample_page import SPACE_MARK, Cell, Film, join, page, spell

DEFAULT_TOKENS, DEMO_TOKENS = 64, 24
DEMO_SCAN = 2_000_000  # validation tokens searched for a function
BLOCK, LINE_END = (
    "\u2591",
    "\u21b5\n",
)  # a token that is still masked; a decoded line end, to be seen
CONTEXT = 240  # characters of prompt and suffix that --watch shows

LIMITS = {  # options that are numbers, and what they may be
    "tokens": (1, sys.maxsize),
    "steps": (1, sys.maxsize),
    "window": (1, sys.maxsize),
    "temperature": (0, 1e6),
    "threshold": (0, 1),
    "redo": (0, 1),
    "top_k": (0, sys.maxsize),
    "top_p": (1e-9, 1),
    "seed": (0, 2**31 - 1),
    "delay": (0, 60),
    "latency": (0, 1e6),
    "nats": (0, 1e6),
}
SAMPLING = ("temperature", "top_k", "top_p", "seed")
DENOISING = ("steps", "window", "threshold", "redo")


def fail(message: str) -> NoReturn:
    """Raise the error that `main` prints without a traceback."""
    from train_gpt import UserError

    raise UserError(message)


def warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as every other error here, and not all options before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (--help lists all options)\n")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; exits with 2 on a wrong one."""
    from scripts.policy import MODES

    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, redo = parser.add_argument, MODES["draft_refine"].redo
    add("--artifact", type=Path, default=Path("final_model.int8.ptz"), help="default %(default)s")
    add(
        "--adapter",
        type=Path,
        metavar="FILE",
        help="of scripts/finetune.py, trained beside the artifact",
    )
    add("--tokenizer", type=Path, metavar="MODEL", help="default: the one the artifact names")
    given = parser.add_mutually_exclusive_group()
    given.add_argument("--prompt", metavar="TEXT", help="text to begin with; may be empty")
    given.add_argument("--prompt-file", type=Path, metavar="PATH", help="file with the prompt")
    given.add_argument(
        "--demo",
        type=Path,
        metavar="DATA_PATH",
        help="take a Python function of this validation data",
    )
    add(
        "--suffix",
        metavar="TEXT",
        help="text after the hole: fill --tokens between prompt and this",
    )
    add(
        "--edit",
        action="store_true",
        help=f"revise the prompt: fill in tokens less probable than --redo ({redo})",
    )
    add(
        "--tokens",
        type=int,
        help=f"tokens to decode (default: up to {DEFAULT_TOKENS}; demo {DEMO_TOKENS})",
    )
    add(
        "--mode",
        choices=("auto", *MODES),
        help="default ar; with a suffix refine; auto: see --latency and --nats",
    )
    add("--latency", type=float, metavar="SECONDS", help="the likeliest mode that takes no longer")
    add("--nats", type=float, help="the fastest mode whose text has at most this many nats a token")
    add(
        "--guard",
        action="store_true",
        help="check the result; decode left to right instead where it is poor",
    )
    add("--steps", type=int, help="denoising passes a window (default: the mode's)")
    add("--window", type=int, help="tokens a window (default: the mode's)")
    add("--threshold", type=float, help="commit tokens at least this probable sooner")
    add("--redo", type=float, help="mask again what the clean stream finds less probable than this")
    add("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default)")
    add("--top-k", type=int, default=0, help="sample among the k likeliest; 0: all (default)")
    add(
        "--top-p",
        type=float,
        default=1.0,
        help="sample among the likeliest with this mass (default 1)",
    )
    add("--seed", type=int, default=0, help="fixes the draw (default %(default)s)")
    add(
        "--watch",
        action="store_true",
        help="show every pass on standard error, coloured by confidence",
    )
    add(
        "--delay",
        type=float,
        default=0.15,
        help="seconds a pass stays on the terminal (default %(default)s)",
    )
    add("--html", type=Path, metavar="PATH", help="write a page that plays the passes in a browser")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add(
        "--compile",
        action="store_true",
        help="compile passes first: takes a minute, pays for long outputs (mode ar)",
    )
    args = parser.parse_args(argv)
    for name, (low, high) in LIMITS.items():
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            rule = f"{low} or more" if high == sys.maxsize else f"between {low:g} and {high:g}"
            parser.error(
                f"--{name.replace('_', '-')}={value} must be {rule}; leave it out for the default"
            )
    for fault, message in faults(args):
        if fault:
            parser.error(message)
    return args


def faults(args: argparse.Namespace) -> Iterator[tuple[object, str]]:
    """Yield what must not hold of options together, and what to say where it does."""
    goal, mode = args.latency is not None or args.nats is not None, args.mode
    alone = mode or ("auto" if goal else "refine" if args.suffix else "ar")
    idle = [
        f"--{name}"
        for name in DENOISING
        if getattr(args, name) is not None and not args.edit and not args.demo
    ]
    blind = f"--mode {mode} cannot read the text of --suffix; use --mode refine or leave --mode out"
    yield args.suffix and mode in ("ar", "speculative"), blind
    yield args.demo and args.suffix is not None, "--demo brings its own suffix; leave --suffix out"
    yield (
        args.demo and args.edit,
        "--edit revises a prompt and --demo has none; leave one of them out",
    )
    yield (
        args.edit and args.tokens,
        f"--edit keeps the number of tokens; leave --tokens={args.tokens} out",
    )
    yield (
        args.edit and (mode or goal or args.guard),
        "--edit goes without --mode, --latency, --nats and --guard",
    )
    yield (
        args.edit and args.redo == 0,
        "--edit with --redo=0 would change nothing; give a probability above 0",
    )
    yield (
        idle and alone == "ar",
        f"{', '.join(idle)}: mode ar has no windows; add --mode refine or leave it out",
    )
    yield (
        idle and alone == "auto",
        f"{', '.join(idle)}: mode auto chooses that; name another mode or leave it out",
    )
    yield (
        goal and mode not in (None, "auto"),
        f"--mode {mode} has no goal; leave it out, or --latency and --nats",
    )
    yield (
        alone == "auto" and (args.latency is None) == (args.nats is None),
        "auto takes one of --latency and --nats",
    )
    folder = args.html.parent if args.html else Path()
    yield (
        not folder.is_dir(),
        f"--html={args.html}: there is no folder {folder}; make it, or name another",
    )


# ==============================================================================
# 1  MODEL AND TEXT
# ==============================================================================


class Loaded(NamedTuple):
    """A model with what is needed to talk to it."""

    model: GPT
    cfg: Config
    tokenizer: spm.SentencePieceProcessor
    device: torch.device


def pick_device(name: str) -> torch.device:
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        fail("--device=cuda finds no CUDA device; use --device=cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def load(
    artifact: Path, tokenizer: Path | None, device: torch.device, adapter: Path | None = None
) -> Loaded:
    """Read an artifact, the tokenizer it was trained with, and an adapter that was trained beside
    it, if any.

    Raises:
        UserError: one is missing or damaged, the tokenizer is another one, or the adapter another
        artifact's.
    """
    import train_gpt as tg

    model, expected = tg.load_artifact(artifact, device)
    if adapter is not None:
        from scripts.finetune import load_adapter

        load_adapter(adapter, model, artifact)
    cfg = model.cfg
    path = tokenizer or Path(cfg.tokenizer_path)
    if not path.is_file():
        fail(
            f"tokenizer {path} is not there; name the one {artifact} was trained with: --tokenizer "
            "MODEL"
        )
    counter = tg.ByteCounter(dataclasses.replace(cfg, tokenizer_path=str(path)))
    if counter.sha256 != expected:
        fail(
            f"tokenizer {path} (SHA-256 {counter.sha256[:12]}) is not the one {artifact} was trained with "
            f"({expected[:12]}); name that one: --tokenizer MODEL"
        )
    return Loaded(model, cfg, counter.tokenizer, device)


def encode(tokenizer: spm.SentencePieceProcessor, text: str, continues: bool = False) -> list[int]:
    """Turn text into tokens; a text that continues another keeps a leading space even if the
    tokenizer drops it.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        fail(f"the text is not valid UTF-8 (character {error.start}); convert it")
    ids: list[int] = tokenizer.encode(text)
    unknown = tokenizer.unk_id()
    if unknown in ids:
        strange = "".join(sorted(c for c in set(text) if unknown in tokenizer.encode(c)))
        warn(f"the tokenizer has no token for {strange!r}; the model reads an unknown token there")
    elif tokenizer.decode(ids).strip() != text.strip():
        warn(
            "the tokenizer folds white space or characters of the text; the result shows what the "
            "model reads"
        )
    space = tokenizer.piece_to_id(SPACE_MARK)
    kept = tokenizer.id_to_piece(ids[:1] or [0])[0].startswith(SPACE_MARK)
    return (
        [space, *ids]
        if continues and text.startswith(" ") and not kept and not tokenizer.is_unknown(space)
        else ids
    )


def read_prompt(args: argparse.Namespace) -> str:
    """Return the prompt of --prompt, --prompt-file or standard input; nothing from a terminal."""
    if args.prompt is not None:
        return str(args.prompt)
    try:
        if args.prompt_file is not None:
            return bytes.decode(args.prompt_file.read_bytes())
        return "" if sys.stdin.isatty() else sys.stdin.read()
    except (OSError, UnicodeDecodeError) as error:
        fail(
            f"the prompt in {args.prompt_file or 'standard input'} cannot be read ({error}); name "
            "a UTF-8 text file"
        )


# ==============================================================================
# 2  SCREEN -- passes on a terminal
# ==============================================================================


def lay_out(parts: Iterable[tuple[str, str]], columns: int) -> list[str]:
    """Break styled text into rows of at most `columns` cells of a terminal. A style is an SGR code,
    or empty.
    """
    rows, width = [""], 0
    for text, style in parts:
        for c in text.replace("\t", "    "):
            kind = unicodedata.category(c)
            wide = (
                2
                if unicodedata.east_asian_width(c) in "WF"
                else int(kind not in ("Mn", "Me", "Cf"))
            )
            if c == "\n" or width + wide > columns:
                rows, width = [*rows, ""], 0
            if c != "\n":
                safe = "\ufffd" if kind == "Cc" else c  # a model may not steer the terminal
                rows[-1] = rows[-1] + (f"\x1b[{style}m{safe}\x1b[0m" if style else safe)
                width = width + wide
    return rows


def colour(p: float) -> str:
    """SGR code of a confidence, black on red where it is low, on green where it is high."""
    red, green = min(1.0, 2 - 2 * p), min(1.0, 2 * p)
    if os.environ.get("COLORTERM") in ("truecolor", "24bit"):
        return f"30;48;2;{round(225 * red)};{round(195 * green)};40"
    return f"30;48;5;{16 + 36 * round(5 * red) + 6 * round(4 * green)}"


class Screen:
    """Draws frames: in place and in colours on a terminal; elsewhere, or with NO_COLOR, one after
    another.
    """

    def __init__(
        self, tokenizer: Any, before: str, after: str, delay: float, stream: TextIO
    ) -> None:
        self.tokenizer = tokenizer
        self.before = before[-CONTEXT:]
        self.after = after[:CONTEXT]
        self.stream = stream
        self.delay = delay if stream.isatty() else 0.0
        self.rows = 0
        self.plain = (
            not stream.isatty()
            or bool(os.environ.get("NO_COLOR"))
            or os.environ.get("TERM") == "dumb"
        )

    def __call__(self, name: str, cells: Sequence[Cell]) -> None:
        units = join(self.tokenizer, cells)
        body = [
            (BLOCK, "90") if unit.open else (unit.text.replace("\n", LINE_END), colour(unit.p))
            for unit in units
        ]
        parts = [(self.before, "2"), *body, (self.after, "2")]
        columns, lines = shutil.get_terminal_size()
        if self.plain:
            columns = sys.maxsize
            lines = sys.maxsize
            parts = [(text, "") for text, _ in parts]
        rows = [f"--- {name}: {sum(cell.open for cell in cells)} of {len(cells)} tokens open"]
        rows += lay_out(parts, columns - 1)[-max(lines - 3, 1) :]
        back = f"\x1b[{self.rows}F\x1b[J" if self.rows else ""
        self.stream.write(back + "\n".join(rows) + "\n")
        self.stream.flush()
        self.rows = 0 if self.plain else len(rows)
        time.sleep(self.delay)


# ==============================================================================
# 3  DECODING -- with what stands around the result
# ==============================================================================


class Job(NamedTuple):
    """What to decode: `num` tokens between others (BOS left out). `draft`: they stand there, to be
    revised.
    """

    title: str
    prompt: list[int]
    num: int
    suffix: list[int]
    draft: list[int] | None = None


class Completion(NamedTuple):
    """What was decoded and what it cost, for the last line; and its passes, for the page."""

    facts: dict[str, Any]
    reel: dict[str, Any]


def check_length(at: Loaded, job: Job) -> None:
    """Raise UserError where prompt, span and suffix are longer than what the model was trained to
    read.
    """
    over = 1 + len(job.prompt) + job.num + len(job.suffix) - at.cfg.train_seq_len
    if over <= 0:
        return
    remedies = [f"use --tokens={job.num - over} or fewer"] * (over < job.num)
    span = f"--tokens={job.num}"
    if job.draft:
        remedies, span = [f"revise a part, {over} tokens shorter"], f"--edit of {job.num}"
    elif over <= len(job.prompt) + len(job.suffix):
        remedies.append(f"shorten prompt or suffix by {over} tokens")
    fail(
        f"prompt of {len(job.prompt) + 1} tokens (BOS included) + {span} + suffix of {len(job.suffix)} exceed the "
        f"{at.cfg.train_seq_len} this model was trained to read (TRAIN_SEQ_LEN); {' or '.join(remedies)}"
    )


def settle(
    at: Loaded, job: Job, ids: torch.Tensor, args: argparse.Namespace
) -> tuple[str, Decoding, dict[str, Any]]:
    """Choose the mode and its settings; return also what `--mode auto` expects of it."""
    import train_gpt as tg

    start = len(job.prompt) + 1
    goal = (args.latency, args.nats)
    more = dict[str, Any]()
    mode = args.mode or ("auto" if goal != (None, None) else "refine" if job.suffix else "ar")
    mode = "draft_refine" if job.draft else mode
    from scripts.policy import MODES, choose

    names = SAMPLING if mode in ("ar", "auto") else SAMPLING + DENOISING
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if not job.suffix and not job.draft:
        given["end"] = (
            at.tokenizer.bos_id()
        )  # text that continues ends where the model begins another document
    if mode == "auto":
        like = tg.AR._replace(**given)
        try:
            found = choose(
                at.model,
                ids,
                start,
                start + job.num,
                seconds=args.latency,
                nats=args.nats,
                like=like,
            )
        except tg.UserError as error:
            fail(
                f"{f'--nats={args.nats}' if args.latency is None else f'--latency={args.latency}'}: {error}; raise it"
            )
        mode = found.mode
        how = found.how
        more["auto"] = {"seconds": found.seconds, "nats": found.nats}
        print(
            f"--- auto: {mode}, {found.seconds:.3g} s, {found.nats:.3f} nats a token, of "
            f"{len(found.table)} tried"
        )
    else:
        how = MODES[mode]._replace(**given)
    if how.window > 0 and at.model.mask_emb is None:
        fail(
            f"{'--edit' if job.draft else f'--mode={mode}'} needs a denoiser, and this model was trained without one "
            "(DIFFUSION_LOSS_WEIGHT=0); continue text with --mode ar, or name another --artifact"
        )
    return mode, how, more


def make_film(
    at: Loaded, job: Job, ids: torch.Tensor, redo: float, args: argparse.Namespace
) -> Film:
    """Begin to keep passes; a draft first as it stands, then with its holes."""
    import train_gpt as tg

    before, after = (spell(at.tokenizer, part) for part in (job.prompt, job.suffix))
    screen = Screen(at.tokenizer, before, after, args.delay, sys.stderr) if args.watch else None
    film = Film(len(job.prompt) + 1, [Cell(-1, 0.0, True, 0)] * job.num, screen)
    start = len(job.prompt)
    if job.draft:
        film.put("before", job.draft, tg.score(at.model, ids)[0, start : start + job.num].tolist())
        film.cells = [cell._replace(open=cell.p < redo) for cell in film.cells]
    film.add("masked")
    return film


def complete(at: Loaded, job: Job, args: argparse.Namespace) -> Completion:
    """Decode or revise the span of a job. UserError: it is too long, or needs a denoiser and the
    model has none.
    """
    import torch

    import train_gpt as tg

    check_length(at, job)
    tokenizer, prefix, start = (
        at.tokenizer,
        [at.tokenizer.bos_id(), *job.prompt],
        1 + len(job.prompt),
    )
    ids = torch.tensor([[*prefix, *(job.draft or [0] * job.num), *job.suffix]], device=at.device)
    from scripts.policy import edit, guard

    span = (at.model, ids, start, start + job.num)
    with (
        torch.autocast("cuda", torch.bfloat16)
        if at.device.type == "cuda"
        else contextlib.nullcontext()
    ):
        mode, how, more = settle(at, job, ids, args)
        film, began = make_film(at, job, ids, how.redo, args), time.perf_counter()
        how = how._replace(watch=film if args.watch or args.html else None)
        if args.guard:
            out, fell_back, _ = guard(*span, how)
            more["fell_back"] = bool(fell_back[0])
        else:
            out = edit(*span, how) if job.draft else tg.decode(*span, how)
        result: list[int] = out.ids[0].tolist()  # waits for the device
        seconds = time.perf_counter() - began - film.seconds
        hole = result[start : start + job.num]
        if more.get("fell_back"):
            film.put(
                "left to right instead", hole, tg.score(at.model, out.ids)[0, start - 1 :].tolist()
            )
    hole = hole[: hole.index(how.end)] if how.end in hole else hole
    before, upto, text = (
        tokenizer.decode(part) for part in (prefix, prefix + hole, prefix + hole + job.suffix)
    )
    completion = upto.removeprefix(before) if upto.startswith(before) else tokenizer.decode(hole)
    facts = {
        "mode": mode,
        "text": text,
        "completion": completion,
        "forwards": int(out.forwards[0, 0]),
    }
    facts |= {
        "seconds": seconds,
        **more,
        **(revision(tokenizer, job.draft, hole, film) if job.draft else {}),
    }
    note = f"{mode}, {facts['forwards']} forward passes, {seconds:.2f} s"
    around = {"before": spell(tokenizer, job.prompt), "after": spell(tokenizer, job.suffix)}
    return Completion(
        facts, film.reel(tokenizer, len(hole) + 1, title=job.title, note=note, **around)
    )


def revision(tokenizer: Any, draft: list[int], tokens: list[int], film: Film) -> dict[str, Any]:
    """Say how many tokens of a draft were masked and changed, and mark where: [-before-]{+after+}."""
    pairs, marked = list(zip(draft, tokens, strict=True)), ""
    for same, run in itertools.groupby(pairs, lambda pair: pair[0] == pair[1]):
        old, new = (spell(tokenizer, side) for side in zip(*run, strict=True))
        marked += old if same else f"[-{old}-]{{+{new}+}}"
    masked = sum(cell.open for cell in film.frames[1][1])
    return {"masked": masked, "changed": sum(old != new for old, new in pairs), "changes": marked}


def show(title: str, text: str) -> None:
    print(f"--- {title}\n{text}")


def show_completion(facts: dict[str, Any], before: str, hole: str, after: str) -> None:
    show("before", f"{before}{hole}{after}")
    guarded = {
        None: "",
        False: ", kept by the guard",
        True: ", replaced by the guard: left to right",
    }
    cost = (
        f"{facts['forwards']} forward passes, {facts['seconds']:.2f} "
        f"s{guarded[facts.get('fell_back')]}"
    )
    show(f"after ({facts['mode']}, {cost})", facts["text"])


# ==============================================================================
# 4  DEMO -- a function nobody trained on, with a hole and without its end
# ==============================================================================


def functions(text: str) -> Iterator[str]:
    """Yield the source of every function in a Python text: its `def` line and the deeper lines
    below.
    """
    lines = text.split("\n")
    for first, line in enumerate(lines):
        if not line.lstrip().startswith("def "):
            continue
        indent = len(line) - len(line.lstrip())
        last = first + 1
        while last < len(lines) and (
            not lines[last].strip() or len(lines[last]) - len(lines[last].lstrip()) > indent
        ):
            last += 1
        yield "\n".join(lines[first:last]).rstrip() + "\n"


def find_function(at: Loaded, data_path: Path, hole: int) -> list[int]:
    """Return the tokens of the first validation function that a hole of `hole` tokens fits into.

    One that fits the model's length is preferred; else the beginning of a longer one.

    Raises:
        UserError: the data cannot be read, or holds no such function.
    """
    import numpy as np
    import torch

    import train_gpt as tg

    loader = tg.TokenLoader(dataclasses.replace(at.cfg, data_path=str(data_path)), "val")
    stream = loader.rows(0, 1, min(loader.total, DEMO_SCAN) - 1, torch.device("cpu"))[0].numpy()
    longer: list[int] = []
    for document in np.split(stream, np.flatnonzero(stream == at.tokenizer.bos_id())):
        for source in functions(at.tokenizer.decode(document.tolist())):
            ids = encode(at.tokenizer, source)
            if 4 * hole <= len(ids) < at.cfg.train_seq_len:
                return ids
            if len(ids) >= at.cfg.train_seq_len:
                longer = longer or ids[: at.cfg.train_seq_len - 1]
    if len(longer) >= 3 * hole:
        return longer
    fail(
        f"--demo={data_path} holds no Python function of {4 * hole} tokens or more in its validation data; prepare the "
        "standard library (python scripts/prepare_data.py), lower --tokens, or use --prompt"
    )


def middle(at: Loaded, ids: list[int], hole: int) -> int:
    """Choose where a hole begins: at the start of a line nearest to the middle, or at the middle."""
    newline, centre = at.tokenizer.piece_to_id("\n"), (len(ids) - hole) // 2
    starts = [
        i + 1
        for i, token in enumerate(ids)
        if token == newline and len(ids) // 4 <= i < len(ids) - hole - 1
    ]
    return min(starts, key=lambda i: abs(i - centre), default=centre)


def demo(at: Loaded, args: argparse.Namespace) -> tuple[dict[str, Any], list[Completion]]:
    """Fill a hole in one validation function, continue it from its first half, and show both beside
    the original.
    """
    hole, decode = args.tokens or min(DEMO_TOKENS, at.cfg.train_seq_len // 4), at.tokenizer.decode
    ids = find_function(at, args.demo, hole)
    start = middle(at, ids, hole)
    half = len(ids) // 2
    result = dict[str, Any]()
    done = list[Completion]()
    count = min(2 * hole, len(ids) - half)
    jobs = [
        (f"infill: {hole} tokens inside", Job("Infill", ids[:start], hole, ids[start + hole :])),
        (
            f"continuation: {count} tokens after the first half of",
            Job("Continuation", ids[:half], count, []),
        ),
    ]
    if not at.cfg.diffusion:
        print(
            "=== infill: left out, this model was trained without a denoiser "
            "(DIFFUSION_LOSS_WEIGHT=0)"
        )
    for title, job in jobs if at.cfg.diffusion else jobs[1:]:
        print(f"=== {title} a function of the validation data")
        done.append(complete(at, job, args))
        stop = len(job.prompt) + job.num
        show_completion(
            done[-1].facts, decode(job.prompt), f"[... {job.num} tokens ...]", decode(job.suffix)
        )
        show("original", decode(ids if job.suffix else ids[:stop]))
        result[job.title.lower()] = done[-1].facts | {
            "original": decode(ids[len(job.prompt) : stop])
        }
    return {"mode": "demo", "infill": None, **result}, done


def sample(at: Loaded, args: argparse.Namespace) -> tuple[dict[str, Any], list[Completion]]:
    """Continue the prompt, fill the hole before --suffix, or revise the prompt, and show before and
    after.
    """
    text = read_prompt(args)
    prompt = encode(at.tokenizer, text)
    suffix = encode(at.tokenizer, args.suffix or "", continues=True)
    count = args.tokens or max(
        min(DEFAULT_TOKENS, at.cfg.train_seq_len - 1 - len(prompt) - len(suffix)), 1
    )
    job = Job("Infill" if suffix else "Continuation", prompt, count, suffix)
    hole = f"[... {count} tokens ...]"
    if args.edit:
        if not prompt:
            fail(
                "--edit has nothing to revise: the text is empty; give some with --prompt, or on "
                "standard input"
            )
        job, hole = Job("Revision", [], len(prompt), suffix, prompt), ""
    done = complete(at, job, args)
    show_completion(done.facts, text, hole, args.suffix or "")
    if args.edit:
        show(
            f"changes: {done.facts['changed']} of {done.facts['masked']} masked tokens",
            done.facts["changes"],
        )
    return done.facts, [done]


def write_page(path: Path, done: list[Completion]) -> None:
    try:
        path.write_text(page([each.reel for each in done]), encoding="utf-8")
    except OSError as error:
        fail(f"--html={path} cannot be written ({error.strerror}); name another file")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0, or 2 after an error the user can repair."""
    args = parse_args(argv)
    from train_gpt import UserError  # here, so that --help and a mistyped option answer at once

    try:
        loaded = load(args.artifact, args.tokenizer, pick_device(args.device), args.adapter)
        if args.compile:
            from scripts.policy import compiled

            compiled(loaded.model)
        result, done = (sample if args.demo is None else demo)(loaded, args)
        if args.html:
            write_page(args.html, done)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())

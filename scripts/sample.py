"""Continue, infill or revise text with an exported model, and show every pass.

    python scripts/sample.py --prompt 'def area(radius):' --tokens 40
    python scripts/sample.py --prompt 'def area(radius):' --suffix 'return' --tokens 16 --watch
    python scripts/sample.py --prompt 'def area(radius):' --mode block --html pass_by_pass.html
    python scripts/sample.py --edit --remask-threshold 0.002 <draft.py
    python scripts/sample.py --prompt 'import os' --mode auto --latency 0.1
    python scripts/sample.py --demo data/stdlib               infill and continue one function
    python scripts/sample.py --demo data/stdlib --compare     and by random weights, and models/

Without --prompt or --prompt-file, the prompt is read from standard input. With --edit, tokens of
the prompt that the model holds improbable are remasked and filled. The last line is one JSON
object.
"""

from __future__ import annotations

import sys
from os.path import abspath, dirname

sys.path.insert(0, dirname(dirname(abspath(__file__))))  # the repository
import scripts.process  # noqa: F401 -- first: Ctrl-C ends the imports below in one line, too

# isort: split
import argparse
import dataclasses
import itertools
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

if TYPE_CHECKING:
    import sentencepiece as spm
    import torch
    from rich.text import Text

    from scripts.chain import Head
    from scripts.decoding import Decoding, Sampling
    from train_gpt import GPT, Config

from scripts import common
from scripts.common import (
    Parser,
    argument_text,
    autocast,
    default_artifact,
    fail,
    load_artifact,
    need,
    open_tokenizer,
    packaged_name,
    pick_device,
    run_command,
    warn,
)
from scripts.process import visible
from scripts.sample_page import SPACE_MARK, Cell, Recording, join, page, spell

DEFAULT_TOKENS, DEMO_TOKENS = 64, 24
DEMO_SCAN = 2_000_000  # validation tokens searched for a function
BLOCK = "\u2591"  # a token that is still masked
LINE_END = "\u21b5\n"  # how a decoded line end is shown
CONTEXT = 240  # characters of prompt and suffix that --watch shows
SAMPLING = ("temperature", "top_k", "top_p", "seed")
DENOISING = ("steps", "window", "threshold", "remask_threshold")
UNREAD = {  # of these options, by mode
    **dict.fromkeys(("ar", "auto"), DENOISING),
    "speculative": ("steps", "threshold", "remask_threshold"),
    **dict.fromkeys(("refine", "refine_cached", "block", "threshold"), ("remask_threshold",)),
}


def add_text_options(parser: Parser) -> None:
    """Add options of the model and of the text that it reads."""
    add, given = parser.add_argument, parser.add_mutually_exclusive_group()
    default = "models/python.ptz, else the newest final_model.*.ptz of this folder"
    parser.artifact(default, "beside it, or the one it names")
    add("--adapter", type=Path, metavar="FILE", help="of scripts/finetune.py, for this artifact")
    head = "of scripts/chain.py: a pass decides left to right (default: FILE.head beside it)"
    heads = parser.add_mutually_exclusive_group()
    heads.add_argument("--head", type=Path, metavar="FILE", help=head)
    heads.add_argument("--no-head", action="store_true", help="use none, whatever lies there")
    given.add_argument("--prompt", metavar="TEXT", help="text to start from; may be empty")
    given.add_argument("--prompt-file", type=Path, metavar="PATH", help="file with the prompt")
    demo = "take a Python function of this validation data"
    given.add_argument("--demo", type=Path, metavar="DATA_PATH", help=demo)
    also = "with --demo: also decode by random weights and by models/python.ptz"
    add("--compare", action="store_true", help=also)
    suffix = "text after the infill span: --tokens between prompt and this"
    add("--suffix", metavar="TEXT", help=suffix)


def add_decoding_options(parser: Parser) -> None:
    """Add options of decoding."""
    from scripts.decoding import MODES

    add, remask = parser.add_argument, MODES["draft_refine"].remask_threshold
    edit = f"revise the prompt: remask tokens less probable than --remask-threshold ({remask})"
    add("--edit", action="store_true", help=edit)
    tokens = f"tokens to decode (default: up to {DEFAULT_TOKENS}; demo {DEMO_TOKENS})"
    parser.whole("--tokens", None, tokens)
    mode = "default ar; with a suffix refine; auto: see --latency and --nats"
    add("--mode", choices=("auto", *MODES), help=mode)
    latency = "seconds: the highest-likelihood mode that takes no longer"
    parser.real("--latency", None, latency, 0, 1e6)
    nats = "the fastest mode whose text has at most this many nats per token"
    parser.real("--nats", None, nats, 0, 1e6)
    add("--guard", action="store_true", help="replace poor output by that of mode ar")
    parser.whole("--steps", None, "denoising passes per window (default: the mode's)")
    parser.whole("--window", None, "tokens per window (default: the mode's)")
    parser.real("--threshold", None, "accept tokens at least this probable at once", 0, 1)
    improbable = "remask tokens that are less probable under the clean stream"
    parser.real("--remask-threshold", None, improbable, 0, 1)
    parser.real("--temperature", 0.0, "0: greedy", 0, 1e6)
    parser.whole("--top-k", 0, "sample among the k most probable; 0: all", low=0)
    parser.real("--top-p", 1.0, "sample among the most probable with this mass", 1e-9, 1)
    parser.whole("--seed", 0, "fixes what is sampled", low=0)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; exits with 2 on a wrong one."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add_text_options(parser)
    add_decoding_options(parser)
    watch = "show every pass on standard error, coloured by confidence (needs rich)"
    add("--watch", action="store_true", help=watch)
    parser.real("--delay", 0.15, "seconds for which a pass stays on the terminal", 0, 60)
    add("--html", type=Path, metavar="PATH", help="write a page that plays the passes")
    parser.device()
    compiled = "compile passes: takes a minute, faster for long outputs (mode ar)"
    add("--compile", action="store_true", help=compiled)
    args = parser.parse_args(argv)
    for fault, message in [*faults(args), *edit_faults(args)]:
        if fault:
            parser.error(message)
    return args


def faults(args: argparse.Namespace) -> Iterator[tuple[object, str]]:
    """Yield conditions that options must not meet together, each with its message."""
    has_target, mode = args.latency is not None or args.nats is not None, args.mode
    chosen = mode or ("auto" if has_target else "refine" if args.suffix else "ar")
    given = [name for name in DENOISING if getattr(args, name) is not None]
    names = [f"--{name.replace('_', '-')}" for name in given if name in UNREAD.get(chosen, ())]
    unused = ", ".join([] if args.edit or args.demo else names)
    rule = f"--mode {mode} cannot read the text of --suffix; use --mode refine or leave --mode out"
    yield args.suffix and mode in ("ar", "speculative"), rule
    yield args.compare and not args.demo, "--compare belongs to --demo; leave it out, or add that"
    yield args.demo and args.suffix is not None, "--demo has its own suffix; leave --suffix out"
    no_window = f"{unused}: mode ar has no windows; add --mode refine or leave it out"
    yield unused and chosen == "ar", no_window
    by_auto = f"{unused}: mode auto chooses that; name another mode or leave it out"
    yield unused and chosen == "auto", by_auto
    no_effect = f"{unused}: mode {chosen} does not read that; leave it out or name another mode"
    yield unused and chosen not in ("ar", "auto"), no_effect
    no_target = f"--mode {mode} has no target; leave it out, or --latency and --nats"
    yield has_target and mode not in (None, "auto"), no_target
    changed = "--head was fitted to the artifact without --adapter; leave one of them out"
    yield args.head and args.adapter, changed
    no_pass = "--head changes passes over windows, and mode ar has none; add --mode speculative"
    yield args.head and chosen == "ar" and not (args.edit or args.demo), no_pass
    one_target = (args.latency is None) == (args.nats is None)
    yield chosen == "auto" and one_target, "auto takes one of --latency and --nats"
    folder = args.html.parent if args.html else Path()
    missing = f"--html={args.html}: there is no folder {folder}; make it, or name another"
    yield not folder.is_dir(), missing
    yield args.html and args.html.is_dir(), f"--html={args.html} cannot be written: a folder"


def edit_faults(args: argparse.Namespace) -> Iterator[tuple[object, str]]:
    """Yield conditions that --edit and other options must not meet, each with its message."""
    no_prompt = "--edit revises a prompt and --demo has none; leave one of them out"
    yield args.demo and args.edit, no_prompt
    tokens = f"--edit keeps the number of tokens; leave --tokens={args.tokens} out"
    yield args.edit and args.tokens, tokens
    other = args.mode or args.guard or args.latency is not None or args.nats is not None
    yield args.edit and other, "--edit takes no --mode, --latency, --nats or --guard"
    nothing = "--edit with --remask-threshold=0 would change nothing; give a probability above 0"
    yield args.edit and args.remask_threshold == 0, nothing


# ==============================================================================
# 1  MODEL AND TEXT
# ==============================================================================


class Loaded(NamedTuple):
    """A model with its tokenizer and device."""

    model: GPT
    cfg: Config
    tokenizer: spm.SentencePieceProcessor
    device: torch.device
    head: Head | None = None


def load(
    path: Path,
    tokenizer: Path | None,
    device: torch.device,
    adapter: Path | None = None,
    head: Path | None = None,
    find: bool = False,
) -> Loaded:
    """Read an artifact, the tokenizer it was trained with, and an adapter and a head, if any. With
    `find` a head beside the artifact is taken, but not with an adapter, which it does not know.

    Raises:
        UserError: one is missing or damaged, or does not belong to the artifact.
    """
    artifact = load_artifact(path, device)
    model = artifact.model
    if adapter is not None:
        from scripts.finetune import load_adapter

        load_adapter(adapter, model, path)
    loaded = None
    if head is not None or (find and adapter is None):
        from scripts.chain import find_head

        loaded = find_head(head, model, path)
    file = tokenizer or Path(model.cfg.tokenizer_path)
    remedy = "name that one: --tokenizer MODEL"
    if not file.is_file():
        rule = f"name the one {path} was trained with: --tokenizer MODEL"
        fail(f"tokenizer {file} is not there; {rule}")
    counter = open_tokenizer(artifact, file, "tokenizer ", remedy)
    return Loaded(model, model.cfg, counter.tokenizer, device, loaded)


def encode(tokenizer: spm.SentencePieceProcessor, text: str, continues: bool = False) -> list[int]:
    """Turn text into tokens.

    Args:
        tokenizer: of the model.
        text: what to encode.
        continues: keep a leading space even if the tokenizer drops it.
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
        folded = "the tokenizer folds white space or characters of the text"
        warn(f"{folded}; the result shows what the model reads")
    space = tokenizer.piece_to_id(SPACE_MARK)
    kept = tokenizer.id_to_piece(ids[:1] or [0])[0].startswith(SPACE_MARK)
    dropped = text.startswith(" ") and not kept and not tokenizer.is_unknown(space)
    return [space, *ids] if continues and dropped else ids


def read_prompt(args: argparse.Namespace) -> str:
    """Return the prompt of --prompt, --prompt-file or standard input; nothing from a terminal."""
    if args.prompt is not None:
        return argument_text(args.prompt, "--prompt")
    name, remedy = args.prompt_file or "standard input", "name a UTF-8 text file"
    try:
        if args.prompt_file is not None:
            data = args.prompt_file.read_bytes()
        elif sys.stdin is None:
            fail("standard input is closed; give --prompt TEXT or --prompt-file PATH")
        else:
            data = b"" if sys.stdin.isatty() else sys.stdin.buffer.read()
        return bytes.decode(data, "utf-8").removeprefix("\ufeff")  # a byte order mark
    except OSError as error:
        fail(f"the prompt in {name} cannot be read ({error.strerror or error}); {remedy}")
    except UnicodeDecodeError as error:
        fail(f"the prompt in {name} is not UTF-8 (byte {error.start}); {remedy}")


# ==============================================================================
# 2  SCREEN -- passes on a terminal
# ==============================================================================


def printable(text: str) -> str:
    """Escape what could control a terminal; write tabs as spaces."""
    return visible(text.replace("\t", "    "))


def colour(p: float) -> str:
    """Style of a confidence: black on red where it is low, on green where it is high."""
    red, green = min(1.0, 2 - 2 * p), min(1.0, 2 * p)
    return f"black on rgb({round(225 * red)},{round(195 * green)},40)"


class Screen:
    """Draws passes: in place and in colours on a terminal; elsewhere, or with NO_COLOR, in turn."""

    def __init__(self, tokenizer: Any, around: Sequence[str], delay: float, stream: TextIO) -> None:
        from rich.console import Console
        from rich.live import Live

        self.tokenizer, self.stream = tokenizer, stream
        self.before, self.after = around[0][-CONTEXT:], around[1][:CONTEXT]
        self.console = Console(file=stream, highlight=False, markup=False)
        plain = not self.console.is_terminal or self.console.is_dumb_terminal
        self.live: Live | None = None
        self.delay = delay if self.console.is_terminal else 0.0
        if not plain and not os.environ.get("NO_COLOR"):
            self.live = Live(console=self.console, auto_refresh=False)
            self.live.start()

    def frame(self, name: str, cells: Sequence[Cell]) -> Text:
        """Return the text of a pass, coloured by confidence."""
        from rich.text import Text

        num_masked = sum(cell.masked for cell in cells)
        frame = Text(f"--- {name}: {num_masked} of {len(cells)} tokens masked\n")
        frame.append(printable(self.before), "dim")
        for unit in join(self.tokenizer, cells):
            if unit.masked:
                frame.append(BLOCK, "bright_black")
            else:
                frame.append(printable(unit.text).replace("\n", LINE_END), colour(unit.p))
        return frame.append(printable(self.after), "dim")

    def __call__(self, name: str, cells: Sequence[Cell]) -> None:
        frame = self.frame(name, cells)
        if self.live is None:
            self.stream.write(f"{frame.plain}\n")
            self.stream.flush()
        else:
            title, *lines = frame.wrap(self.console, self.console.width)
            room = max(self.console.height - 3, 1)
            self.live.update(type(frame)("\n").join([title, *lines[-room:]]), refresh=True)
        time.sleep(self.delay)

    def close(self) -> None:
        """Leave the last pass on the terminal."""
        if self.live is not None:
            self.live.stop()


# ==============================================================================
# 3  DECODING -- a span with the text around it, and its cost
# ==============================================================================


class Job(NamedTuple):
    """Decode `num` tokens between others (without BOS)."""

    title: str
    prompt: list[int]
    num: int
    suffix: list[int]
    draft: list[int] | None = None  # the tokens of the span, to be revised

    @property
    def start(self) -> int:
        """Position of the first token to decode, after BOS and the prompt."""
        return 1 + len(self.prompt)


class Completion(NamedTuple):
    """A decoded span."""

    facts: dict[str, Any]  # text and cost, for the last line
    recording: dict[str, Any]  # its passes, for the page


def check_length(at: Loaded, job: Job) -> None:
    """Raise UserError if prompt, span and suffix are longer than the model was trained to read."""
    length, limit = job.start + job.num + len(job.suffix), at.cfg.train_seq_len
    over = length - limit
    if over <= 0:
        return
    remedies = [f"use --tokens={job.num - over} or fewer"] * (over < job.num)
    span = f"--tokens={job.num}"
    if job.draft:
        remedies, span = [f"revise a part, {over} tokens shorter"], f"--edit of {job.num}"
    elif over <= len(job.prompt) + len(job.suffix):
        remedies.append(f"shorten prompt or suffix by {over} tokens")
    parts = f"prompt of {job.start} tokens (BOS included) + {span} + suffix of {len(job.suffix)}"
    rule = f"exceed the {limit} this model was trained to read (TRAIN_SEQ_LEN)"
    fail(f"{parts} {rule}; {' or '.join(remedies)}")


def mode_of(args: argparse.Namespace, job: Job) -> str:
    """Return the mode of --mode, or the default of the job."""
    has_target = args.latency is not None or args.nats is not None
    default = "auto" if has_target else "refine" if job.suffix else "ar"
    return "draft_refine" if job.draft else args.mode or default


class Settings(NamedTuple):
    """How a job is decoded."""

    mode: str
    decoding: Decoding
    facts: dict[str, Any]  # what mode auto expects


def choose_mode(
    at: Loaded, job: Job, ids: torch.Tensor, args: argparse.Namespace, sampling: Sampling
) -> Settings:
    """Find the mode that meets the target."""
    import train_gpt as tg
    from scripts.decoding import Target, choose

    span = (at.model, ids, job.start, job.start + job.num)
    try:
        found = choose(*span, Target(args.latency, args.nats), sampling, at.head)
    except tg.UserError as error:
        target = f"--nats={args.nats}" if args.latency is None else f"--latency={args.latency}"
        fail(f"{target}: {error}; raise it")
    best = found.best
    reached = f"{best.seconds:.3g} s, {best.nats:.3f} nats per token"
    print(f"--- auto: {best.decoding.mode}, {reached}, of {len(found.table)} tried")
    expected = {"auto": {"seconds": best.seconds, "nats": best.nats}}
    return Settings(best.decoding.mode, best.decoding, expected)


def settle(at: Loaded, job: Job, ids: torch.Tensor, args: argparse.Namespace) -> Settings:
    """Choose the mode and its settings; UserError: they need a denoiser and there is none."""
    from scripts.decoding import MODES, Sampling, needs_denoiser

    mode = mode_of(args, job)
    sampling = Sampling(**{name: getattr(args, name) for name in SAMPLING})
    if not job.suffix and not job.draft:
        # A continuation ends where the model begins another document.
        sampling = sampling._replace(end=at.tokenizer.bos_id())
    if mode == "auto":
        return choose_mode(at, job, ids, args, sampling)
    values = {name: getattr(args, name) for name in DENOISING if mode != "ar"}
    given = {name: value for name, value in values.items() if value is not None}
    decoding = MODES[mode]._replace(sampling=sampling, head=at.head, **given)
    if needs_denoiser(decoding) and at.model.mask_emb is None:
        option = "--edit" if job.draft else f"--mode={mode}"
        why = "this model was trained without one (DIFFUSION_LOSS_WEIGHT=0)"
        remedy = "continue text with --mode ar, or name another --artifact"
        fail(f"{option} needs a denoiser, and {why}; {remedy}")
    return Settings(mode, decoding, {})


def start_recording(
    at: Loaded, job: Job, ids: torch.Tensor, threshold: float, screen: Screen | None
) -> Recording:
    """Begin to record passes; a draft is shown as it is, then with its remasked tokens."""
    import train_gpt as tg

    recording = Recording(job.start, job.num, screen)
    if job.draft:
        nats = tg.token_nll_causal(at.model, ids)[0, job.start - 1 :]
        recording.put("before", job.draft, nats.tolist())
        recording.cells = [cell._replace(masked=cell.p < threshold) for cell in recording.cells]
    recording.add("masked")
    return recording


class Output(NamedTuple):
    """What decoding gave: the span's tokens, its passes, and what it cost."""

    mode: str
    tokens: list[int]  # up to the end of the document
    recording: Recording
    facts: dict[str, Any]


def decode_job(at: Loaded, job: Job, args: argparse.Namespace, screen: Screen | None) -> Output:
    """Decode or revise the span of a job; UserError: it needs a denoiser and there is none."""
    import torch

    import train_gpt as tg
    from scripts.decoding import Task, decode, edit, guard

    tokens = [at.tokenizer.bos_id(), *job.prompt, *(job.draft or [0] * job.num), *job.suffix]
    ids = torch.tensor([tokens], device=at.device)
    span = (at.model, ids, job.start, job.start + job.num)
    with autocast(at.device):
        settings = settle(at, job, ids, args)
        decoding, facts = settings.decoding, settings.facts
        recording = start_recording(at, job, ids, decoding.remask_threshold, screen)
        watch = recording if args.watch or args.html else None
        began = time.perf_counter()
        if args.guard:
            guarded = guard(Task(*span, decoding, watch))
            out, facts["fell_back"] = guarded.decoded, bool(guarded.fell_back[0])
        else:
            out = (edit if job.draft else decode)(*span, decoding, watch)
        found: list[int] = out.ids[0, job.start :][: job.num].tolist()  # waits for the device
        seconds = time.perf_counter() - began - recording.seconds
        if facts.get("fell_back"):
            nats = tg.token_nll_causal(at.model, out.ids)[0, job.start - 1 :].tolist()
            recording.put("left to right instead", found, nats)
    facts = {"forwards": int(out.forwards[0, 0]), "seconds": seconds, **facts}
    facts |= {"head": True} if decoding.head is not None and decoding.mode != "ar" else {}
    end = decoding.sampling.end
    length = found.index(end) if end in found else job.num
    return Output(settings.mode, found[:length], recording, facts)


def complete(at: Loaded, job: Job, args: argparse.Namespace) -> Completion:
    """Decode or revise the span of a job.

    Raises:
        UserError: it is too long, or needs a denoiser and the model has none.
    """
    check_length(at, job)
    tokenizer, prefix = at.tokenizer, [at.tokenizer.bos_id(), *job.prompt]
    around = [spell(tokenizer, part) for part in (job.prompt, job.suffix)]
    screen = Screen(tokenizer, around, args.delay, sys.stderr) if args.watch else None
    try:
        found = decode_job(at, job, args, screen)
    finally:
        if screen is not None:
            screen.close()
    span = found.tokens
    before, whole = tokenizer.decode(prefix), tokenizer.decode(prefix + span)
    completion = whole.removeprefix(before) if whole.startswith(before) else tokenizer.decode(span)
    text = tokenizer.decode(prefix + span + job.suffix)
    facts = {"mode": found.mode, "text": text, "completion": completion, **found.facts}
    if job.draft:
        facts |= revision(tokenizer, job.draft, span, found.recording)
    note = f"{found.mode}, {facts['forwards']} forward passes, {facts['seconds']:.2f} s"
    about = {"title": job.title, "note": note, "before": around[0], "after": around[1]}
    return Completion(facts, found.recording.for_page(tokenizer, len(span) + 1, **about))


def revision(
    tokenizer: Any, draft: list[int], tokens: list[int], recording: Recording
) -> dict[str, Any]:
    """Count the masked and the changed tokens of a draft; mark changes: [-before-]{+after+}."""
    pairs, marked = list(zip(draft, tokens, strict=True)), ""
    for same, run in itertools.groupby(pairs, lambda pair: pair[0] == pair[1]):
        old, new = (spell(tokenizer, side) for side in zip(*run, strict=True))
        marked += old if same else f"[-{old}-]{{+{new}+}}"
    masked = sum(cell.masked for cell in recording.frames[1][1])
    return {"masked": masked, "changed": sum(old != new for old, new in pairs), "changes": marked}


def show(title: str, text: str) -> None:
    """Print a text under its title: on a terminal escaped where it could control it."""
    print(f"--- {title}\n{visible(text) if sys.stdout.isatty() else text}")


GUARDED = {
    None: "",
    False: ", kept by the guard",
    True: ", replaced by the guard: left to right",
}


def show_completion(facts: dict[str, Any], before: str, span: str, after: str) -> None:
    """Print the text before and after decoding."""
    show("before", f"{before}{span}{after}")
    guarded = GUARDED[facts.get("fell_back")]
    cost = f"{facts['forwards']} forward passes, {facts['seconds']:.2f} s{guarded}"
    show(f"after ({facts['mode']}, {cost})", facts["text"])


# ==============================================================================
# 4  DEMO -- a function of the validation data, infilled and continued
# ==============================================================================


def functions(text: str) -> Iterator[str]:
    """Yield the source of every function in a Python text: its `def` line and deeper lines."""
    lines = text.split("\n")
    indents = [len(line) - len(line.lstrip()) if line.strip() else -1 for line in lines]
    for first, line in enumerate(lines):
        if not line.lstrip().startswith("def "):
            continue
        last = first + 1
        while last < len(lines) and (indents[last] < 0 or indents[last] > indents[first]):
            last += 1
        yield "\n".join(lines[first:last]).rstrip() + "\n"


def find_function(at: Loaded, data_path: Path, span: int) -> list[int]:
    """Return the tokens of the first validation function that has room for a span.

    A function that fits the model's length is preferred to the beginning of a longer one.

    Raises:
        UserError: the data cannot be read, or has no such function.
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
            if 4 * span <= len(ids) < at.cfg.train_seq_len:
                return ids
            if len(ids) >= at.cfg.train_seq_len:
                longer = longer or ids[: at.cfg.train_seq_len - 1]
    if len(longer) < 3 * span:
        held = f"no Python function of {4 * span} tokens or more in its validation data"
        remedy = "prepare the standard library (python scripts/prepare_data.py)"
        fail(f"--demo={data_path} holds {held}; {remedy}, lower --tokens, or use --prompt")
    return longer


def middle(at: Loaded, ids: list[int], span: int) -> int:
    """Choose where a span begins: at the line start nearest to the middle, else in the middle."""
    newline, centre = at.tokenizer.piece_to_id("\n"), (len(ids) - span) // 2
    places = range(len(ids) // 4, len(ids) - span - 1)
    starts = [i + 1 for i in places if ids[i] == newline]
    return min(starts, key=lambda i: abs(i - centre), default=centre)


Shown = tuple[dict[str, Any], list[Completion]]  # for the last line and for the page


def demo(at: Loaded, args: argparse.Namespace) -> Shown:
    """Infill one validation function, continue its first half; show both beside the original."""
    num = args.tokens or min(DEMO_TOKENS, at.cfg.train_seq_len // 4)
    decode, ids = at.tokenizer.decode, find_function(at, args.demo, num)
    start, half = middle(at, ids, num), len(ids) // 2
    count = min(2 * num, len(ids) - half)
    rest = f"{count} tokens after the first half of"
    jobs = {
        f"infill: {num} tokens inside": Job("Infill", ids[:start], num, ids[start + num :]),
        f"continuation: {rest}": Job("Continuation", ids[:half], count, []),
    }
    result, done, shown = dict[str, Any](), list[Completion](), list[Job]()
    for title, job in jobs.items():
        if job.suffix and not at.cfg.diffusion:
            why = "this model was trained without a denoiser (DIFFUSION_LOSS_WEIGHT=0)"
            print(f"=== infill: left out, {why}")
            continue
        print(f"=== {title} a function of the validation data")
        done.append(complete(at, job, args))
        before, after = decode(job.prompt), decode(job.suffix)
        stop = len(job.prompt) + job.num
        show_completion(done[-1].facts, before, f"[... {job.num} tokens ...]", after)
        show("original", decode(ids if job.suffix else ids[:stop]))
        original = {"original": decode(ids[len(job.prompt) : stop])}
        result[job.title.lower()] = done[-1].facts | original
        shown.append(job)
    if args.compare:
        result["compared"] = compare(at, shown, result, args)
    return {"mode": "demo", "infill": None, **result}, done


def shipped(device: torch.device, find: bool) -> Loaded | str:
    """Load the packaged model, if `find` with its head; if that cannot be done, say why."""
    import train_gpt as tg

    if not common.PACKAGED.is_file():
        return f"{packaged_name()} is not there; make model trains it, in about two hours"
    try:
        return load(common.PACKAGED, None, device, find=find)
    except tg.UserError as error:
        return f"left out: {error}"


def translate(job: Job, at: Loaded, other: Loaded) -> Job | None:
    """Write a job in the tokens of another model, cut to its length; None: there is no room."""
    if other.tokenizer is at.tokenizer:
        return job
    prompt, suffix = (at.tokenizer.decode(part) for part in (job.prompt, job.suffix))
    after = encode(other.tokenizer, suffix, True) if suffix else []
    after = after[: other.cfg.train_seq_len // 4]
    room = other.cfg.train_seq_len - 1 - job.num - len(after)
    if room < 1:
        return None
    return job._replace(prompt=encode(other.tokenizer, prompt)[-room:], suffix=after)


def compare(
    at: Loaded, jobs: Sequence[Job], found: dict[str, Any], args: argparse.Namespace
) -> dict[str, dict[str, str | None]]:
    """Show what random weights, this model and the packaged one put in place of a text."""
    import train_gpt as tg

    # The weights that a run with these settings begins with.
    random = at._replace(model=tg.GPT(at.cfg).to(at.device).eval(), head=None)
    models = {"random": random, "trained": at, "shipped": shipped(at.device, not args.no_head)}
    titles = {"random": "before training (random weights)", "trained": "after training"}
    titles |= {"shipped": f"shipped model ({packaged_name()})"}
    result: dict[str, dict[str, str | None]] = {}
    quiet = argparse.Namespace(**vars(args) | {"watch": False, "html": None})
    for job in jobs:
        name = job.title.lower()
        texts = result[name] = {}
        print(f"=== {name}, compared: {job.num} tokens in place of the original")
        for key, model in models.items():
            same = None if isinstance(model, str) else translate(job, at, model)
            if isinstance(model, str):
                texts[key], told = None, model
            elif job.suffix and not model.cfg.diffusion:
                texts[key], told = None, "has no denoiser"
            elif same is None:
                texts[key], told = None, f"left out: has a context of {model.cfg.train_seq_len}"
            elif model is at:
                texts[key] = told = found[name]["completion"]
            else:
                texts[key] = told = complete(model, same, quiet).facts["completion"]
            show(titles[key], told)
        show("original", found[name]["original"])
    return result


def sample(at: Loaded, args: argparse.Namespace) -> Shown:
    """Continue, infill or revise the prompt, and show before and after."""
    text, after = read_prompt(args), argument_text(args.suffix or "", "--suffix")
    prompt, suffix = encode(at.tokenizer, text), encode(at.tokenizer, after, continues=True)
    room = at.cfg.train_seq_len - 1 - len(prompt) - len(suffix)
    count = args.tokens or max(min(DEFAULT_TOKENS, room), 1)
    job, span = Job("Infill", prompt, count, suffix), f"[... {count} tokens ...]"
    if not suffix:
        job = job._replace(title="Continuation")
    if args.edit:
        if not prompt:
            remedy = "give some with --prompt, or on standard input"
            fail(f"--edit has nothing to revise: the text is empty; {remedy}")
        job, span = Job("Revision", [], len(prompt), suffix, prompt), ""
    done = complete(at, job, args)
    show_completion(done.facts, text, span, after)
    if args.edit:
        counted = f"{done.facts['changed']} of {done.facts['masked']} masked tokens"
        show(f"changes: {counted}", done.facts["changes"])
    return done.facts, [done]


def write_page(path: Path, done: list[Completion]) -> None:
    """Write the page; UserError: it cannot be written."""
    try:
        path.write_text(page([each.recording for each in done]), encoding="utf-8")
    except OSError as error:
        fail(f"--html={path} cannot be written ({error.strerror}); name another file")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Load the model, decode, and write the page, if any."""
    if args.watch:
        need("rich", "--watch")
    device = pick_device(args.device)
    path = args.artifact or default_artifact()
    if path == common.PACKAGED and args.artifact is None:
        print(f"--- model: {packaged_name()}, as no --artifact is named", file=sys.stderr)
    loaded = load(path, args.tokenizer, device, args.adapter, args.head, not args.no_head)
    if args.compile:
        from scripts.decoding import compiled

        compiled(loaded.model)
    result, done = (sample if args.demo is None else demo)(loaded, args)
    if args.html:
        write_page(args.html, done)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    args = parse_args(argv)
    return run_command(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())

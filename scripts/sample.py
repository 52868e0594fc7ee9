"""Continue text, or fill a hole in it, with a trained artifact; print it before and after.

    python scripts/sample.py --prompt 'def area(radius):' --tokens 40
    python scripts/sample.py --prompt 'def area(radius):' --suffix 'return result' --tokens 16 --steps 8
    python scripts/sample.py --demo data/stdlib           one function filled in and one continued, beside the original

Without --prompt or --prompt-file, the prompt is read from standard input. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

if TYPE_CHECKING:
    import sentencepiece as spm
    import torch

    from train_gpt import GPT, Config

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # train_gpt.py lies beside this folder

DEFAULT_TOKENS, DEMO_TOKENS = 64, 24
DEMO_SCAN = 2_000_000  # validation tokens searched for a function
SPACE_MARK = "\u2581"  # a space, inside a piece


def fail(message: str) -> NoReturn:
    """Raise the error that `main` prints without a traceback."""
    from train_gpt import UserError

    raise UserError(message)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; exits with 2 on a wrong one."""
    from train_gpt import MODES

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artifact", type=Path, default=Path("final_model.int8.ptz"), help="default %(default)s")
    parser.add_argument("--tokenizer", type=Path, metavar="MODEL", help="default: the one the artifact names")
    given = parser.add_mutually_exclusive_group()
    given.add_argument("--prompt", metavar="TEXT", help="text to begin with; may be empty")
    given.add_argument("--prompt-file", type=Path, metavar="PATH", help="file with the prompt")
    given.add_argument("--demo", type=Path, metavar="DATA_PATH", help="take a Python function of this validation data")
    parser.add_argument("--suffix", metavar="TEXT", help="text after the hole: fill --tokens between prompt and this")
    parser.add_argument("--tokens", type=int, help=f"tokens to decode (default {DEFAULT_TOKENS}; demo {DEMO_TOKENS})")
    parser.add_argument("--mode", choices=MODES, help="default ar; with a suffix refine")
    parser.add_argument("--steps", type=int, help="denoising passes a window (default: the mode's)")
    parser.add_argument("--window", type=int, help="tokens a window (default: the mode's)")
    parser.add_argument("--threshold", type=float, help="commit tokens at least this probable sooner")
    parser.add_argument("--redo", type=float, help="mask again what the clean stream finds less probable than this")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default)")
    parser.add_argument("--top-k", type=int, default=0, help="sample among the k likeliest; 0: all (default)")
    parser.add_argument(
        "--top-p", type=float, default=1.0, help="sample among the likeliest with this mass (default 1)"
    )
    parser.add_argument("--seed", type=int, default=0, help="fixes the draw (default %(default)s)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    args = parser.parse_args(argv)
    for name, low, high in (
        ("tokens", 1, sys.maxsize),
        ("steps", 1, sys.maxsize),
        ("window", 1, sys.maxsize),
        ("temperature", 0, 1e6),
        ("threshold", 0, 1),
        ("redo", 0, 1),
        ("top_k", 0, sys.maxsize),
        ("top_p", 1e-9, 1),
        ("seed", 0, 2**31 - 1),
    ):
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            parser.error(f"--{name.replace('_', '-')}={value} must lie in {low}..{high}")
    if args.suffix is not None and args.mode in ("ar", "speculative"):
        parser.error(f"--mode {args.mode} cannot read the text of --suffix; use --mode refine or leave --mode out")
    if args.suffix is not None and args.demo is not None:
        parser.error("--demo brings its own suffix; leave --suffix out")
    return args


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


def load(artifact: Path, tokenizer: Path | None, device: torch.device) -> Loaded:
    """Read an artifact and the tokenizer it was trained with.

    Raises:
        UserError: either is missing or damaged, or the tokenizer is another one.
    """
    import train_gpt as tg

    model, expected = tg.load_artifact(artifact, device)
    cfg = model.cfg
    path = tokenizer or Path(cfg.tokenizer_path)
    if not path.is_file():
        fail(f"tokenizer {path} is not there; name the one {artifact} was trained with: --tokenizer MODEL")
    counter = tg.ByteCounter(dataclasses.replace(cfg, tokenizer_path=str(path)))
    if counter.sha256 != expected:
        fail(
            f"tokenizer {path} (SHA-256 {counter.sha256[:12]}) is not the one {artifact} was trained with "
            f"({expected[:12]}); name that one: --tokenizer MODEL"
        )
    return Loaded(model, cfg, counter.tokenizer, device)


def encode(tokenizer: spm.SentencePieceProcessor, text: str, continues: bool = False) -> list[int]:
    """Turn text into tokens; a text that continues another keeps a leading space even if the tokenizer drops it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        fail(f"the text is not valid UTF-8 (character {error.start}); convert it")
    ids: list[int] = tokenizer.encode(text)
    space = tokenizer.piece_to_id(SPACE_MARK)
    kept = tokenizer.id_to_piece(ids[:1] or [0])[0].startswith(SPACE_MARK)
    return [space, *ids] if continues and text.startswith(" ") and not kept and not tokenizer.is_unknown(space) else ids


def read_prompt(args: argparse.Namespace) -> str:
    """Return the prompt of --prompt, --prompt-file or standard input; nothing from a terminal."""
    if args.prompt is not None:
        return str(args.prompt)
    try:
        if args.prompt_file is not None:
            return bytes.decode(args.prompt_file.read_bytes())
        return "" if sys.stdin.isatty() else sys.stdin.read()
    except (OSError, UnicodeDecodeError) as error:
        fail(f"the prompt in {args.prompt_file or 'standard input'} cannot be read ({error}); name a UTF-8 text file")


# ==============================================================================
# 2  DECODING -- with what stands around the result
# ==============================================================================


class Completion(NamedTuple):
    """Decoded text and what it cost; `text` holds prompt, completion and suffix."""

    mode: str
    text: str
    completion: str
    num_forwards: int
    seconds: float


def complete(at: Loaded, prompt: list[int], suffix: list[int], count: int, args: argparse.Namespace) -> Completion:
    """Decode `count` tokens after a prompt, and before a suffix if there is one.

    Args:
        at: the model.
        prompt: tokens, without BOS.
        suffix: tokens; none for a continuation.
        count: tokens to decode. A continuation ends earlier where the model begins another document.
        args: mode, steps, window and sampling.
    Raises:
        UserError: more tokens than the model was trained to read, or it has no denoiser and needs one.
    """
    import torch

    import train_gpt as tg

    prefix, limit = [at.tokenizer.bos_id(), *prompt], at.cfg.train_seq_len
    if len(prefix) + count + len(suffix) > limit:
        fail(
            f"prompt of {len(prefix)} tokens (BOS included) + --tokens={count} + suffix of {len(suffix)} exceed the "
            f"{limit} this model was trained to read (TRAIN_SEQ_LEN); shorten one of them"
        )
    mode = args.mode or ("refine" if suffix else "ar")
    names = ("steps", "window", "threshold", "redo", "temperature", "top_k", "top_p", "seed")
    how = tg.MODES[mode]._replace(**{name: getattr(args, name) for name in names if getattr(args, name) is not None})
    ids = torch.tensor([[*prefix, *[0] * count, *suffix]], device=at.device)
    cuda, began = at.device.type == "cuda", time.perf_counter()
    with torch.autocast("cuda", torch.bfloat16) if cuda else contextlib.nullcontext():
        stop = len(prefix) + count
        out = tg.decode(at.model, ids, len(prefix), stop, how)
        result: list[int] = out.ids[0].tolist()  # waits for the device
    seconds = time.perf_counter() - began
    hole = result[len(prefix) : stop]
    if not suffix and prefix[0] in hole:
        hole = hole[: hole.index(prefix[0])]
    before, upto = at.tokenizer.decode(prefix), at.tokenizer.decode(prefix + hole)
    completion = upto.removeprefix(before) if upto.startswith(before) else at.tokenizer.decode(hole)
    return Completion(mode, at.tokenizer.decode(prefix + hole + suffix), completion, out.num_forwards, seconds)


def show(title: str, text: str) -> None:
    print(f"--- {title}\n{text}")


def show_completion(done: Completion, before: str, hole: str, after: str) -> None:
    show("before", f"{before}{hole}{after}")
    show(f"after ({done.mode}, {done.num_forwards} forward passes, {done.seconds:.2f} s)", done.text)


# ==============================================================================
# 3  DEMO -- a function nobody trained on, with a hole and without its end
# ==============================================================================


def functions(text: str) -> Iterator[str]:
    """Yield the source of every function in a Python text: its `def` line and the deeper lines below."""
    lines = text.split("\n")
    for first, line in enumerate(lines):
        if not line.lstrip().startswith("def "):
            continue
        indent = len(line) - len(line.lstrip())
        last = first + 1
        while last < len(lines) and (not lines[last].strip() or len(lines[last]) - len(lines[last].lstrip()) > indent):
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
    starts = [i + 1 for i, token in enumerate(ids) if token == newline and len(ids) // 4 <= i < len(ids) - hole - 1]
    return min(starts, key=lambda i: abs(i - centre), default=centre)


def demo(at: Loaded, args: argparse.Namespace) -> dict[str, Any]:
    """Fill a hole in one validation function, continue it from its first half, and show both beside the original."""
    hole = args.tokens or min(DEMO_TOKENS, at.cfg.train_seq_len // 4)
    ids = find_function(at, args.demo, hole)
    result: dict[str, Any] = {"mode": "demo", "infill": None}
    decode = at.tokenizer.decode
    if at.cfg.diffusion:
        start = middle(at, ids, hole)
        prompt, suffix = ids[:start], ids[start + hole :]
        print(f"=== infill: {hole} tokens inside a function of the validation data")
        done = complete(at, prompt, suffix, hole, args)
        show_completion(done, decode(prompt), f"[... {hole} tokens ...]", decode(suffix))
        show("original", decode(ids))
        result["infill"] = done._asdict() | {"original": decode(ids[start : start + hole])}
    else:
        print("=== infill: left out, this model was trained without a denoiser (DIFFUSION_LOSS_WEIGHT=0)")
    half = len(ids) // 2
    count = min(2 * hole, len(ids) - half)
    print(f"=== continuation: {count} tokens after the first half of the same function")
    done = complete(at, ids[:half], [], count, args)
    show_completion(done, decode(ids[:half]), f"[... {count} tokens ...]", "")
    show("original", decode(ids[: half + count]))
    result["continuation"] = done._asdict() | {"original": decode(ids[half : half + count])}
    return result


def sample(at: Loaded, args: argparse.Namespace) -> dict[str, Any]:
    """Continue the prompt, or fill the hole before --suffix, and show both."""
    text, count = read_prompt(args), args.tokens or DEFAULT_TOKENS
    suffix = encode(at.tokenizer, args.suffix or "", continues=True)
    done = complete(at, encode(at.tokenizer, text), suffix, count, args)
    show_completion(done, text, f"[... {count} tokens ...]", args.suffix or "")
    return done._asdict()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0, or 2 after an error the user can repair."""
    args = parse_args(argv)
    from train_gpt import UserError  # here, so that --help and a mistyped option answer at once

    try:
        loaded = load(args.artifact, args.tokenizer, pick_device(args.device))
        result = sample(loaded, args) if args.demo is None else demo(loaded, args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Fine-tune an artifact on new text by low-rank updates of its matrices, kept in a small file.

    DATA_PATH=data/mine python scripts/finetune.py final_model.int8.ptz --rank 8 --out adapter.ptz
    DATA_PATH=data/mine RECIPE=ar python scripts/finetune.py final_model.int8.ptz
    python scripts/sample.py --artifact final_model.int8.ptz --adapter adapter.ptz --prompt 'Dear'

Settings are those of train_gpt.py, from the environment: RECIPE (default: the artifact's) chooses
the loss, ADAPTER_LR the learning rate, LORA_RANK the rank of the updates (as --rank), ITERATIONS
and MAX_WALLCLOCK_SECONDS the budget; logs and checkpoints go to OUT_DIR, RESUME=auto resumes. The
settings of the model (its sizes, and how its windows are read) are the artifact's. Windows carry
loss from the first step unless DIFFUSION_START_FRAC is set. New text is prepared with the
artifact's tokenizer (scripts/prepare_data.py). Progress goes to standard error; the last line of
standard output is one JSON object.
"""

from __future__ import annotations

import sys
from os.path import abspath, dirname

sys.path.insert(0, dirname(dirname(abspath(__file__))))  # the repository
import scripts.process  # noqa: F401 -- first: Ctrl-C ends the imports below in one line, too

# isort: split
import argparse
import contextlib
import dataclasses
import functools
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import train_gpt as tg
from scripts.bench.text import check_manifest
from scripts.common import (
    Artifact,
    Parser,
    check_base,
    check_faults,
    fail,
    load_artifact,
    open_tokenizer,
    run_command,
    sha256_of,
)

FORMAT = "text-diffusion-adapter-2"
TRAIN = "train one: python scripts/finetune.py {}"
# Settings of the model: an adapter must not be trained on another one. The last two, which are no
# settings of the model, take their defaults.
MODEL = (
    *tg.SHAPE_SETTINGS,
    *("time_embed_dim", "look_ahead", "rope_base", "rope_scale", "logit_softcap"),
    *("self_condition", "diffusion_causal", "diffusion_shift", "diffusion_corruption_mode"),
    *("train_seq_len", "init_from", "diffusion_anneal_frac"),
)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; exits with 2 on a wrong one."""
    parser = Parser(__doc__)
    add, out = parser.add_argument, Path("adapter.ptz")
    add("artifact", type=Path, help="model to fine-tune: final_model.*.ptz of train_gpt.py")
    add("--rank", type=int, help="rank of each update (default: LORA_RANK, or 8 without it)")
    add("--out", type=Path, default=out, help="default %(default)s")
    window = "window size of the bound (default 16, or T where 16 does not fit)"
    add("--window", type=int, help=window)
    args = parser.parse_args(argv)
    text = os.environ.get("LORA_RANK", "8")
    if args.rank is None and not text.isdecimal():
        rule = "must be a whole number from 1; set another, or use --rank"
        parser.error(f"LORA_RANK={text!r} {rule}")
    args.rank = int(text) if args.rank is None else args.rank
    return args


# ==============================================================================
# 1  ADAPTER -- low-rank updates of a frozen model, their file, and the way back
# ==============================================================================


class LowRank(nn.Module):
    """Replace a matrix W by W + B A, with B zero at the start (LoRA, arXiv:2106.09685).

    This changes the causal and the denoising pass, which share all matrices.
    """

    def __init__(self, weight: Tensor, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        rows, columns = weight.shape
        bound = columns**-0.5
        start = torch.empty(rank, columns).uniform_(-bound, bound, generator=generator)
        # train_gpt.GROUPS has Adam train parameters of these names.
        self.lora_a = nn.Parameter(start.to(weight.device))
        self.lora_b = nn.Parameter(torch.zeros(rows, rank, device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.lora_b @ self.lora_a


def matrices(model: tg.GPT) -> Iterator[tuple[str, nn.Linear]]:
    """Yield every matrix of attention and MLP with its name."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            yield name, module


def add_updates(model: tg.GPT, rank: int, seed: int) -> None:
    """Freeze a model and give each of its matrices a trainable low-rank update.

    Raises:
        UserError: the rank is not between 1 and the smallest dimension of a matrix.
    """
    found = [module for _, module in matrices(model)]
    most = min(min(module.weight.shape) for module in found)
    if not 1 <= rank <= most:
        limit = f"[1, {most}], the smallest dimension of this model's matrices"
        fail(f"--rank={rank} (or LORA_RANK) must be in {limit}; choose another")
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for module in found:
        update = LowRank(module.weight, rank, generator)
        parametrize.register_parametrization(module, "weight", update)


def save_adapter(path: Path, weights: tg.Weights, about: Mapping[str, Any]) -> None:
    """Write the trained updates among the weights of a model as fp16, and what is said about them.

    Raises:
        UserError: an update is not finite in fp16, or the file cannot be written.
    """
    mark = ".parametrizations.weight.0."
    updates = {name.replace(mark, "."): w for name, w in weights.items() if mark in name}
    tensors = {name: w.detach().cpu().half() for name, w in updates.items()}
    if name := tg.first_not_finite(tensors):
        fail(f"{name} is not finite in fp16, so no adapter was written; lower ADAPTER_LR")
    data = zlib.compress(tg.pack_tensors({"format": FORMAT, **about}, tensors), 9)
    tg.atomic_write(path, data, "adapter")


def multiply(
    tensors: Mapping[str, Tensor], own: Mapping[str, nn.Linear], rank: int
) -> dict[str, Tensor]:
    """Multiply low-rank factors: the update of each matrix. ValueError: they do not fit."""
    expected, empty = dict[str, Tensor](), functools.partial(torch.empty, dtype=torch.half)
    for name, module in own.items():
        rows, columns = module.weight.shape
        expected[f"{name}.lora_a"] = empty(rank, columns, device="meta")
        expected[f"{name}.lora_b"] = empty(rows, rank, device="meta")
    if unlike := tg.differing_shapes(expected, tensors):
        raise ValueError(f"its updates of rank {rank} do not fit this model: {unlike}")
    if unlike := tg.first_not_finite(tensors):
        raise ValueError(f"{unlike} holds numbers that are not finite")
    factors = {name: w.float() for name, w in tensors.items()}
    return {name: factors[f"{name}.lora_b"] @ factors[f"{name}.lora_a"] for name in own}


@torch.no_grad()
def load_adapter(path: Path, model: tg.GPT, artifact: Path) -> dict[str, Any]:
    """Add an adapter's updates to a model that was loaded from `artifact`, in place.

    Returns:
        About the file: rank, config (settings of the fine-tuning), artifact_sha256, and the
        SHA-256 digests of data, tokenizer and program.

    Raises:
        UserError: the file is missing or damaged, or was trained for another artifact.
    """
    own = dict(matrices(model))
    try:
        about, tensors = tg.unpack_tensors(tg.decompress(path.read_bytes()))
        if about["format"] != FORMAT:
            raise ValueError(f"its format is not {FORMAT!r}")
        check_base(f"adapter {path}", about, artifact, TRAIN.format(artifact))
        updates = multiply(tensors, own, about["rank"])
    except tg.UserError:
        raise
    except Exception as error:  # zlib, json and torch fail in many ways on foreign bytes
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        rule = f"is missing, damaged or not ours ({why}); copy it again"
        fail(f"adapter {path} {rule}, or {TRAIN.format(artifact)}")
    for name, module in own.items():
        module.weight.add_(updates[name].to(module.weight.device))
    return about


# ==============================================================================
# 2  FINE-TUNING -- the training loop of train_gpt.py over a frozen model
# ==============================================================================


def fixed_settings(model: tg.GPT, env: Mapping[str, str]) -> dict[str, Any]:
    """Return what the artifact sets; UserError: the environment contradicts it."""
    default, by_default = tg.Config(), MODEL[-2:]
    fixed = {name: getattr(default if name in by_default else model.cfg, name) for name in MODEL}
    asked = {name: env[name.upper()] for name in MODEL if name.upper() in env}
    given, _ = tg.parse_settings(asked)
    wrong = [name for name in asked if name not in given or given[name] != fixed[name]]
    rule = "is the artifact's, {!r}; leave it out"
    check_faults(f"{n.upper()}={asked[n]!r} {rule.format(fixed[n])}" for n in wrong)
    return fixed


def configure(model: tg.GPT, env: Mapping[str, str]) -> tuple[tg.Config, dict[str, str]]:
    """Take settings of the model from the artifact, all others from the environment.

    Returns:
        What train_gpt.Config.from_env returns.

    Raises:
        UserError: no DATA_PATH, a setting of the environment contradicts the artifact, or the loss
            needs a denoiser that it does not have.
    """
    if "DATA_PATH" not in env:
        remedy = f"name a folder of shards, made by: {tg.PREPARE}"
        fail(f"DATA_PATH is not set, so there is no new text; {remedy}")
    fixed = fixed_settings(model, env)
    shared = ("recipe", "preset", "tokenizer_path")
    usual = {name.upper(): getattr(model.cfg, name) for name in shared}
    # Its denoiser is trained already.
    usual |= {"DIFFUSION_START_FRAC": "0", "DIFFUSION_START_STEP": "0"}
    numbers = {name: int(v) if isinstance(v, bool) else v for name, v in fixed.items()}
    text = {name.upper(): str(value) for name, value in numbers.items()}
    cfg, source = tg.Config.from_env({**usual, **env, **text})
    if cfg.diffusion and not model.cfg.diffusion:
        why = "and this artifact has no denoiser (DIFFUSION_LOSS_WEIGHT=0)"
        remedy = "use RECIPE=ar, or give it one: INIT_FROM of train_gpt.py"
        fail(f"RECIPE={cfg.recipe!r} trains windows, {why}; {remedy}")
    return cfg, source | dict.fromkeys(MODEL, "artifact")


def bound_window(args: argparse.Namespace, cfg: tg.Config) -> int:
    """Choose the window size of the bound; UserError: it does not divide a row."""
    T = cfg.train_seq_len
    size = args.window if args.window is not None else 16 if T % 16 == 0 else T
    if size < 1 or T % size:
        rule = f"must divide the {T} tokens of a row (TRAIN_SEQ_LEN)"
        fail(f"--window={size} {rule}; choose another, or leave it out")
    return int(size)


class Text(NamedTuple):
    """What an adapter is trained and scored on."""

    train: tg.TokenLoader
    val: tg.TokenLoader
    counter: tg.ByteCounter
    facts: dict[str, Any]  # of tg.check_data
    warnings: list[str]


def open_text(artifact: Artifact, cfg: tg.Config) -> Text:
    """Open the shards of DATA_PATH; UserError: damaged, or not of the artifact's tokenizer."""
    train, val = tg.TokenLoader(cfg, "train"), tg.TokenLoader(cfg, "val")
    check_manifest(cfg, artifact.tokenizer_sha256, str(artifact.path))
    remedy = "name that one, and prepare the text with it"
    counter = open_tokenizer(artifact, cfg.tokenizer_path, remedy=remedy)
    return Text(train, val, counter, *tg.check_data(cfg, train, val, counter))


def score(model: tg.GPT, run: tg.Run, text: Text, window: int) -> dict[str, Any]:
    """Score the validation split: exact bits per byte, and the bound if there is a denoiser."""
    exact = tg.evaluate_exact(model, run, text.val, text.counter)
    found: dict[str, Any] = {"val_bpb": exact["bpb"], "bound": None, "bound_se": None}
    found["val_bpb_source_bytes"] = exact["bpb"] * run.bytes_ratio
    if model.mask_emb is not None:  # RECIPE=ar trains no windows, but changes their predictions
        bound = tg.evaluate_bound(model, run, text.val, text.counter, window)
        found |= {"bound": bound["bpb"], "bound_se": bound["standard_error"]}
    return found


def train_adapter(
    args: argparse.Namespace, run: tg.Run, model: tg.GPT, text: Text, artifact_sha256: str
) -> dict[str, Any]:
    """Train updates and write them; return facts about the run."""
    before = score(model.to(run.device), run, text, args.window)  # the updates are zero
    of = {"artifact": str(args.artifact), "sha256": artifact_sha256}
    run.log.event("before", window=args.window, **of, **before)
    state = tg.TrainState(run.cfg, run, text.train, model)
    state.resume()
    tg.train(state, text.val, text.counter)
    if run.rank == 0:
        about = {"artifact_sha256": artifact_sha256, "rank": args.rank, **run.identity}
        config = dataclasses.asdict(run.cfg)
        save_adapter(args.out, state.weights(), {"config": config, **about})
    run.from_rank0(0.0)  # nobody reads the adapter before it is written
    return {
        "artifact": str(args.artifact),
        "adapter": str(args.out),
        "rank": args.rank,
        "recipe": run.cfg.recipe,
        "adapter_bytes": args.out.stat().st_size,
        "artifact_bytes": args.artifact.stat().st_size,
        "steps": state.step,
        "train_seconds": state.seconds,
        "window": args.window,
        "log": str(run.log.path),
        **run.identity,
        "before": before,
    }


def check_out(args: argparse.Namespace) -> None:
    """Raise UserError, before training, if the adapter cannot be written at --out."""
    if args.out.is_dir() or (args.out.exists() and args.out.samefile(args.artifact)):
        fail(f"--out={args.out} must be neither a folder nor the artifact; name another file")


def finetune(args: argparse.Namespace, env: Mapping[str, str]) -> dict[str, Any]:
    """Train updates, write them, and score them as read from the file.

    Returns:
        What was measured; empty where this is not rank 0.
    """
    artifact = load_artifact(args.artifact, tg.CPU)
    model, sha256 = artifact.model, sha256_of(args.artifact)
    check_out(args)
    cfg, source = configure(model, env)
    args.window = bound_window(args, cfg)
    text = open_text(artifact, cfg)
    # A checkpoint belongs to one artifact and rank.
    name = f"{cfg.path('', '').name}_finetune_{sha256[:8]}_r{args.rank}"
    cfg = dataclasses.replace(cfg, run_id=name)
    add_updates(model, args.rank, cfg.seed)
    model.cfg = cfg
    with tg.Run.start(cfg) as run:
        run.header(source)
        tg.log_data(run, text.facts, text.warnings)
        result = train_adapter(args, run, model, text, sha256)
        tuned = load_artifact(args.artifact, run.device).model
        load_adapter(args.out, tuned, args.artifact)  # the file is scored, not the live model
        after = score(tuned, run, text, args.window)
        event = {name: value for name, value in result.items() if name != "before"}
        run.log.event("after", **after, **event)
        return result | {"after": after} if run.rank == 0 else {}


def show(result: dict[str, Any]) -> None:
    """Print before and after."""
    before, after = result["before"], result["after"]
    print(f"val_bpb               {before['val_bpb']:.4f} -> {after['val_bpb']:.4f}")
    if before["bound"] is not None:
        bounds = f"{before['bound']:.4f} -> {after['bound']:.4f}"
        errors = f"s.e. {before['bound_se']:.4f}, {after['bound_se']:.4f}"
        print(f"bound, window {result['window']:<7} {bounds}  ({errors})")
    size = f"{result['adapter_bytes']:,} bytes, rank {result['rank']}"
    print(f"adapter {result['adapter']} of {size}")


def run(args: argparse.Namespace) -> dict[str, Any] | None:
    """Fine-tune and print; None where this is not rank 0."""
    with contextlib.redirect_stdout(sys.stderr):  # the training log is progress here
        result = finetune(args, os.environ)
    if result:
        show(result)
    return result or None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    args = parse_args(argv)
    return run_command(lambda: run(args), resume="RESUME=auto resumes from the last checkpoint")


if __name__ == "__main__":
    sys.exit(main())

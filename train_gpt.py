"""Train, score, export and decode one model that is autoregressive and a text-diffusion model.

    python train_gpt.py                                      one process, CPU or GPU
    torchrun --standalone --nproc_per_node=8 train_gpt.py    one process per device
    RECIPE=retrograde SEED=42 python train_gpt.py            settings are environment variables

The clean stream reads text causally and predicts the next token: exact likelihood, left-to-right
decoding. A noisy window (a block in BD3-LM) is a copy of S consecutive tokens, some corrupted. It
reads the clean keys and values before it and itself in both directions: denoising, infill,
parallel decoding.

Shapes: B batch rows, T tokens per row, V vocabulary, D width, L layers, H query heads, G key/value
heads, C channels per head, W windows per row, S tokens per window, N = W (S + 1) tokens of the
noisy stream, K Monte Carlo samples. Names: x0 clean tokens, xt corrupted tokens, t noise level in
(0, 1], where 1 is fully corrupted.
"""

from __future__ import annotations

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while libraries load ends in silence

import contextlib
import copy
import dataclasses
import difflib
import functools
import hashlib
import io
import json
import lzma
import math
import os
import platform
import random
import re
import shutil
import sys
import time
import tomllib
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import filelock
import numpy as np
import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from tqdm import tqdm


# ==== 1  SETTINGS AND RECIPES -- default < recipe < preset < strength < environment ===============
class UserError(Exception):
    """A fault that the user can repair; printed without a traceback."""

    status = 2  # of the process; 128 + its number if a signal ended it


def opt(default: Any, text: str, unit: str = "", *, choices: str = "", **more: Any) -> Any:
    """Declare a setting; a `free` one does not affect training and may differ on RESUME."""
    meta = dict(help=text, unit=unit, choices=choices.split(), low=None, high=10**12, free=False)
    return dataclasses.field(default=default, metadata=meta | more)


free = functools.partial(opt, free=True)
share = functools.partial(opt, low=0, high=1)
beta = functools.partial(opt, low=0, high=0.999999, rate=True)  # at 1 an average never moves
rate = functools.partial(opt, low=0, high=1000, rate=True)
natural = functools.partial(opt, low=0)
LOSS_NAMES = "mean elbo score_entropy sedd_uniform consistency"


# fmt: off
@dataclasses.dataclass(frozen=True)
class Config:
    """All settings, in the environment in upper case. UserError names every fault at once."""

    recipe: str = free("record", "row of RECIPES or of scripts/study/ladder.toml")
    preset: str = free("auto", "row of PRESETS (hardware size); auto: chosen for this machine")
    strength: bool = opt(False, "take the row of STRENGTHS for the preset, too")
    run_id: str = free("", "name of log and checkpoint; empty: recipe, seed, hash of the settings")
    seed: int = opt(1337, "fixes initial weights, data order and noise", low=0, high=2**31 - 1)
    out_dir: str = free(".", "folder of final_model.*.ptz, logs/ and checkpoints/", "path")
    resume: str = free("no", "auto: continue from checkpoints/RUN_ID.ckpt", choices="no auto")
    init_from: str = opt("", "artifact with the initial weights; empty: from scratch", "path")
    checkpoint_seconds: float = free(60.0, "time between checkpoints; 0: only the last", "s", low=0)
    device: str = free("auto", "device type", choices="auto cpu cuda")
    compile: str = free("auto", "torch.compile; auto: on CUDA only", choices="auto 0 1")
    window_attention: str = free("groups", "attention of trained windows", choices="groups flex")
    data_path: str = free("./data/datasets/fineweb10B_sp1024", "folder of token shards", "path")
    tokenizer_path: str = free("./data/tokenizers/fineweb_1024_bpe.model", "SentencePiece", "path")
    vocab_size: int = opt(1024, "V; must equal the tokenizer's", "tokens", low=2, high=65535)
    num_layers: int = opt(9, "Transformer blocks L", "layers", low=1, high=10_000)
    model_dim: int = opt(512, "width D", "channels", low=2)
    num_heads: int = opt(8, "query heads H", "heads", low=1)
    num_kv_heads: int = opt(4, "key/value heads G", "heads", low=1)
    mlp_mult: int = opt(2, "MLP width / D", "x", low=1)
    tie_embeddings: bool = opt(True, "the embedding is the output matrix, too")
    tied_embed_init_std: float = rate(0.005, "std of initial tied embeddings; untied: 1")
    rope_base: float = opt(10000.0, "rotary base", low=1)
    rope_scale: float = opt(1.0, "positions are divided by it (arXiv:2306.15595)", low=1)
    qk_gain_init: float = rate(1.5, "initial gain of the normalised queries")
    value_residual: bool = opt(False, "mix in the first layer's values (arXiv:2410.17897)")
    bigram_vocab_size: int = natural(0, "rows of a hashed embedding of token pairs", "rows")
    logit_softcap: float = opt(30.0, "logits are cap * tanh(logits / cap)", low=1, high=1000)
    look_ahead: int = natural(8, "windows: reach of the next visible token as input", "tokens")
    time_embed_dim: int = natural(0, "features of the noise level t; 0: no time input", "features")
    self_condition: str = opt("none", "the last prediction is an input", choices="none soft commit")
    mercury_self_condition_prob: float = share(0.5, "share of self-conditioned windows")
    mercury_self_condition_fraction: float = share(1.0, "commit: share of tokens replaced")
    iterations: int = opt(20_000, "most optimizer steps", "steps", low=1)
    max_wallclock_seconds: float = natural(600.0, "training time limit; 0: none", "s")
    train_batch_tokens: int = opt(524_288, "global batch", "tokens", low=1)
    train_seq_len: int = opt(1024, "tokens per row T", "tokens", low=2)
    micro_batches: int = opt(8, "parts of the global batch; WORLD_SIZE must divide it", low=1)
    warmup_steps: int = free(1, "passes before the clock, to compile", "passes", low=0, high=1000)
    warmdown_iters: int = natural(1200, "last steps, with the learning rate falling to 0", "steps")
    warmdown_frac: float = share(0.5, "the warm-down is at most this share of the run")
    train_log_every: int = free(200, "steps between train lines; 0: none", "steps", low=0)
    val_loss_every: int = free(1000, "steps between validations; 0: one at the end", "steps", low=0)
    val_batch_size: int = free(524_288, "evaluation batch over all ranks", "tokens", low=1)
    matrix_lr: float = rate(0.04, "learning rate of matrices (Muon)")
    tied_embed_lr: float = rate(0.05, "learning rate of the tied embedding (Adam)")
    embed_lr: float = rate(0.6, "learning rate of an untied embedding (Adam)")
    head_lr: float = rate(0.008, "learning rate of an untied output matrix (Adam)")
    scalar_lr: float = rate(0.04, "learning rate of gains, scales and mixes (Adam)")
    adapter_lr: float = rate(0.003, "learning rate of time, self-conditioning and low-rank weights")
    muon_momentum: float = beta(0.95, "Nesterov momentum")
    muon_backend_steps: int = opt(5, "Newton-Schulz iterations", low=1, high=100)
    muon_momentum_warmup_start: float = beta(0.85, "momentum at step 0")
    muon_momentum_warmup_steps: int = natural(500, "steps to full momentum", "steps")
    muon_weight_decay: float = rate(0.0, "decoupled weight decay of matrices")
    beta1: float = beta(0.9, "Adam beta1")
    beta2: float = beta(0.95, "Adam beta2")
    adam_eps: float = opt(1e-8, "Adam epsilon", low=1e-20, high=1)
    grad_clip_norm: float = natural(0.0, "clip of the global gradient norm; 0: off")
    ema_decay: float = beta(0.0, "average of weights that is exported; 0: off")
    mercury_clean_loss_weight: float = rate(1.0, "weight of the clean stream's next-token loss")
    diffusion_loss_weight: float = rate(0.1, "weight of the denoising loss; 0: no denoiser")
    diffusion_loss: str = opt("elbo", "row of LOSSES", choices=LOSS_NAMES)
    diffusion_loss_clip: float = opt(10.0, "largest 1/t weight (sedd_uniform: 1/(1-t))", low=1)
    diffusion_start_step: int = natural(0, "first steps, without the denoising loss", "steps")
    diffusion_start_frac: float = share(0.6, "first share of the run, without the denoising loss")
    diffusion_passes: int = opt(1, "unrolled denoising passes with loss", "passes", low=1, high=100)
    diffusion_windows: str = opt("8:1,16:1,32:1,64:1", "window sizes S with shares; T: a row")
    diffusion_row_frac: float = opt(0.25, "share of rows with noisy windows", low=1e-6, high=1)
    diffusion_causal: bool = opt(False, "attention inside a window is causal")
    diffusion_anneal_frac: float = share(0.0, "share of the run until windows read both ways")
    diffusion_shift: bool = opt(True, "in a window, too, position i predicts token i + 1")
    diffusion_corruption_mode: str = opt("mask", "noise", choices="mask uniform hybrid gaussian")
    diffusion_hybrid_mask_prob: float = share(0.5, "hybrid: share of masks")
    diffusion_regions: str = opt("iid:3,infill:1", "where to corrupt, with shares")
    mercury_task_mode: str = opt("none", "regions", choices="none mixed continuation infill")
    mercury_continuation_prob: float = share(0.75, "mixed: share of continuation; else infill")
    diffusion_rate: str = opt("uniform", "distribution of t", choices="uniform fixed")
    diffusion_progressive: bool = opt(True, "fixed: t ramps from min to max; 0: t = max")
    diffusion_min_mask_ratio: float = share(0.0, "lowest noise level")
    diffusion_max_mask_ratio: float = opt(1.0, "highest noise level", low=1e-6, high=1)
    diffusion_ramp: str = opt("run", "what the ramp spans", choices="run iterations")
    diffusion_full_prob: float = share(0.3, "share of windows at t = 1")
    diffusion_span_len: int = opt(8, "spans: tokens per span", "tokens", low=1)
    diffusion_spans_per_seq: int = opt(8, "spans: most spans per window", "spans", low=1)
    export_scheme: str = free("int8+zlib", "row of SCHEMES", choices="int8+zlib int6+lzma")
    nelbo_windows: str = free("1,16,T", "window sizes of nelbo_bpb; empty: none")
    nelbo_samples: int = free(8, "Monte Carlo samples K per window", low=2, high=100_000)
    nelbo_sequences: int = free(0, "validation rows scored, evenly spaced; 0: all", "rows", low=0)
    eval_stride: int = free(64, "val_bpb_sliding: tokens scored per row; 0: off", "tokens", low=0)
    parallel_eval_examples: int = free(16, "examples per task; 0: no parallel_eval", low=0)
    parallel_eval_prefix_len: int = free(128, "visible tokens before the span", "tokens", low=2)
    parallel_eval_span_len: str = free("64,8", "decoded tokens, one table each", "tokens")
    parallel_eval_suffix_len: int = free(64, "infill: visible tokens after it", "tokens", low=1)
    parallel_eval_steps: str = free("1,2,4,8", "refinement passes", "passes")
    eval_seed: int = free(0, "fixes the noise of evaluation", low=0)
    # fmt: on

    def __post_init__(self) -> None:
        faults = list[str]()
        for field in dataclasses.fields(self):
            meta, value = field.metadata, getattr(self, field.name)
            name, low = f"{field.name.upper()}={value!r}", meta["low"]
            if meta["choices"] and value not in meta["choices"]:
                faults.append(f"{name} must be one of: {', '.join(meta['choices'])}")
            if low is not None and not low <= value <= meta["high"]:
                faults.append(f"{name} must be in [{low}, {meta['high']}] ({meta['help']})")
        for holds, message in RULES:
            try:
                broken = not holds(self)
            except (ValueError, ZeroDivisionError) as error:  # zeros are named above
                broken = isinstance(error, ValueError)  # a list that does not parse
            if broken:
                faults.append(self.fill(message))
        if faults:
            raise UserError("\n".join(faults))

    @property
    def diffusion(self) -> bool:
        return self.diffusion_loss_weight > 0

    @property
    def checkpoints(self) -> list[Path]:
        """The last checkpoint, and the one before it."""
        return [self.path("checkpoints", suffix) for suffix in (".ckpt", ".previous.ckpt")]

    @property
    def artifact(self) -> Path:
        return Path(self.out_dir, f"final_model.{self.export_scheme[:4]}.ptz")

    def sizes(self, text: str) -> list[tuple[int, float]]:
        """Window sizes with their shares; `T` is TRAIN_SEQ_LEN. ValueError: not a list of sizes."""
        T, shares = self.train_seq_len, parse_shares(text)
        found = [(T if size == "T" else int(size), part) for size, part in shares]
        if any(size < 1 or T % size for size, _ in found):
            raise ValueError("sizes must divide TRAIN_SEQ_LEN")
        return found

    def regions(self) -> list[tuple[str, float]]:
        """Regions with their shares. ValueError: not a list of names with shares."""
        p = self.mercury_continuation_prob
        tasks = {"none": self.diffusion_regions, "mixed": f"continuation:{p},infill:{1 - p}"}
        return parse_shares(tasks.get(self.mercury_task_mode, self.mercury_task_mode))

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> tuple[Config, dict[str, str]]:
        """Return settings and the source of each. UserError: names all faults at once."""
        names = [field.name for field in dataclasses.fields(Config)]
        asked = {name: env[name.upper()] for name in names if name.upper() in env}
        given, faults = parse_settings(asked)
        mode = env.get("DIFFUSION_TRAIN_MODE", "")
        recipe = given.get("recipe", TRAIN_MODES.get(mode, "record"))
        recipes = RECIPES if recipe in RECIPES else all_recipes()
        gpu = "1xgpu" if env.get("WORLD_SIZE", "1") == "1" else "8xh100"
        machine = gpu if torch.cuda.is_available() and given.get("device") != "cpu" else "cpu"
        preset = given.get("preset", "auto").replace("auto", machine)
        faults += unknown("DIFFUSION_TRAIN_MODE", mode or "none", TRAIN_MODES)
        looked = f"{LADDER_FILE} ({'is' if LADDER_FILE.exists() else 'is not'} there)"
        faults += [f"{why}; and {looked}" for why in unknown("RECIPE", recipe, recipes)]
        faults += unknown("PRESET", preset, PRESETS)
        rows = {f"recipe {recipe}": recipes.get(recipe, {}) | {"recipe": recipe}}
        rows[f"preset {preset}"] = PRESETS.get(preset, {}) | {"preset": preset}
        if (rows[f"recipe {recipe}"] | given).get("strength"):
            rows[f"strength {preset}"] = STRENGTHS.get(preset, {})
        values, source = dict[str, Any](), dict.fromkeys(names, "default")
        for label, row in (rows | {"env": given}).items():
            values |= row
            source |= dict.fromkeys(row, label)
        try:
            cfg = cls(**values)
        except UserError as error:
            faults.append(str(error))
        if faults:
            raise UserError("\n".join(faults))
        return cfg, source

    def fill(self, message: str) -> str:
        """Replace each {NAME} of a setting by NAME=value."""
        return message.format_map({k.upper(): f"{k.upper()}={v!r}" for k, v in vars(self).items()})

    def training_settings(self) -> Facts:
        fields = dataclasses.fields(self)
        return {f.name: getattr(self, f.name) for f in fields if not f.metadata["free"]}

    def path(self, folder: str, suffix: str) -> Path:
        settings = json.dumps(self.training_settings(), sort_keys=True)
        digest = hashlib.sha256(settings.encode()).hexdigest()[:8]
        name = self.run_id or f"{self.recipe}_seed{self.seed}_{digest}"
        return Path(self.out_dir, folder, name + suffix)

    def table(self, source: Mapping[str, str]) -> str:
        fields = dataclasses.fields(self)
        return "\n".join(
            f"{f.name.upper():32}{getattr(self, f.name)!s:42}{source.get(f.name, ''):20}"
            f"{f.metadata['unit']:10}{f.metadata['help']}" for f in fields
        )  # fmt: skip


def parse_shares(text: str) -> list[tuple[str, float]]:
    """Read `name:share,name:share` (a bare name has share 1); the shares are scaled to sum to 1."""
    shares: list[tuple[str, float]] = []  # torch.compile cannot trace list[...]()
    for part in filter(str.strip, text.split(",")):
        name, _, number = part.partition(":")
        shares.append((name.strip(), float(number) if ":" in part else 1.0))
    total = sum(number for _, number in shares)
    if shares and (not 0 < total < math.inf or any(number < 0 for _, number in shares)):
        raise ValueError("shares must not be negative and must not sum to 0")
    return [(name, number / total) for name, number in shares if number > 0]


def parse_counts(text: str) -> list[int]:
    """Read whole numbers, separated by commas. ValueError: something else."""
    return [int(part) for part in text.split(",") if part.strip()]


def parse_settings(texts: Mapping[str, str]) -> tuple[Facts, list[str]]:
    """Read settings by name; return their values, and what is wrong with others."""
    rules = {"bool": "0 or 1", "int": "a whole number", "float": "a finite number"}
    readers: dict[str, Callable[[str], Any]] = {"int": int, "float": float, "str": str}
    readers["bool"] = {"0": False, "1": True}.__getitem__
    values, faults = dict[str, Any](), list[str]()
    kinds = {field.name: str(field.type) for field in dataclasses.fields(Config)}
    for name, text in texts.items():
        if (kind := kinds.get(name, "")) not in readers:
            near = difflib.get_close_matches(name, kinds, 3, cutoff=0.4)
            faults.append(f"{name} is not a setting; closest: {', '.join(near) or 'none'}")
            continue
        with contextlib.suppress(KeyError, ValueError, OverflowError):
            value = readers[kind](text)
            if kind == "str" or math.isfinite(value):
                values[name] = value
        if name not in values:
            faults.append(f"{name.upper()}={text!r} must be {rules[kind]}")
    return values, faults


def near_misses(env: Mapping[str, str]) -> Iterator[str]:
    """Warn about names that are close to a setting's but set nothing."""
    known = [field.name.upper() for field in dataclasses.fields(Config)]
    for key in sorted(env.keys() - known):
        for name in difflib.get_close_matches(key.upper(), known, 1, cutoff=0.85):
            yield f"{key} is not a setting; did you mean {name}?"


def furthest(cfg: Config) -> str:
    """Advise on numbers that explode: name the rate that is furthest from its default."""
    usual = Config.from_env({"RECIPE": cfg.recipe, "PRESET": cfg.preset})[0]
    rates = [f.name for f in dataclasses.fields(cfg) if f.metadata.get("rate")]
    ratios = {k: (getattr(cfg, k) + 1e-3) / (getattr(usual, k) + 1e-3) for k in rates}
    name = max(["matrix_lr", *rates], key=lambda k: abs(math.log(ratios[k])))
    values = f"{name.upper()}={getattr(cfg, name)} (default {getattr(usual, name)})"
    return f"{values} is furthest from its default: move it back, or set GRAD_CLIP_NORM=1"


# fmt: off
TRAIN_MODES = {"none": "ar", "mercury": "retrograde"}  # the predecessor's DIFFUSION_TRAIN_MODE

RULES: tuple[tuple[Callable[[Config], object], str], ...] = (  # what must hold; the error if not
    (lambda c: c.model_dim % (2 * c.num_heads) == 0,
     "{MODEL_DIM} must be a multiple of 2 x {NUM_HEADS}; change either"),
    (lambda c: c.num_heads % c.num_kv_heads == 0,
     "{NUM_HEADS} must be a multiple of {NUM_KV_HEADS}; change either"),
    (lambda c: c.train_batch_tokens % (c.micro_batches * c.train_seq_len) == 0,
     "{TRAIN_BATCH_TOKENS} must be a multiple of {MICRO_BATCHES} x {TRAIN_SEQ_LEN}; change one"),
    (lambda c: re.fullmatch(r"(?!.*\.previous$)[\w.-]{0,100}", c.run_id, re.ASCII),
     "{RUN_ID} names files; use at most 100 of a-z A-Z 0-9 . _ -, without .previous at the end"),
    (lambda c: not c.diffusion or c.sizes(c.diffusion_windows),
     "{DIFFUSION_WINDOWS} must be sizes (or T) that divide {TRAIN_SEQ_LEN}: 8:1,T:2"),
    (lambda c: c.regions() and {*dict(c.regions())} <= {"iid", "spans", "continuation", "infill"},
     "{DIFFUSION_REGIONS} must name iid, spans, continuation, infill: iid:3,infill:1"),
    (lambda c: c.diffusion_loss != "sedd_uniform" or c.diffusion_corruption_mode == "uniform",
     "{DIFFUSION_LOSS} needs uniform noise, not {DIFFUSION_CORRUPTION_MODE}; set that to uniform"),
    (lambda c: c.diffusion_min_mask_ratio <= c.diffusion_max_mask_ratio,
     "{DIFFUSION_MIN_MASK_RATIO} exceeds {DIFFUSION_MAX_MASK_RATIO}; swap them"),
    (lambda c: not 0 < c.diffusion_anneal_frac <= c.diffusion_start_frac + c.diffusion_causal,
     "{DIFFUSION_ANNEAL_FRAC} must exceed {DIFFUSION_START_FRAC}, without {DIFFUSION_CAUSAL}"),
    (lambda c: c.window_attention != "flex" or not c.diffusion_anneal_frac,
     "{WINDOW_ATTENTION} needs masks that stay; set {DIFFUSION_ANNEAL_FRAC} to 0, or set groups"),
    (lambda c: c.window_attention != "flex" or c.model_dim >= 16 * c.num_heads,
     "{WINDOW_ATTENTION} needs {MODEL_DIM} to be 16 x {NUM_HEADS} or more; or set groups"),
    (lambda c: c.mercury_clean_loss_weight > 0 or c.diffusion,
     "{MERCURY_CLEAN_LOSS_WEIGHT} and {DIFFUSION_LOSS_WEIGHT} train nothing; set one above 0"),
    (lambda c: [c.sizes(c.nelbo_windows)],
     "{NELBO_WINDOWS} must be sizes (or T) that divide {TRAIN_SEQ_LEN}: 1,16,T"),
    (lambda c: min(parse_counts(c.parallel_eval_steps)) > 0
     and min(parse_counts(c.parallel_eval_span_len)) > 0  # of no number: ValueError
     and (not c.parallel_eval_examples or c.parallel_eval_prefix_len + c.parallel_eval_suffix_len
          + max(parse_counts(c.parallel_eval_span_len)) <= c.train_seq_len),
     "{PARALLEL_EVAL_STEPS} and {PARALLEL_EVAL_SPAN_LEN} must list numbers from 1; the longest span"
     " with {PARALLEL_EVAL_PREFIX_LEN} and {PARALLEL_EVAL_SUFFIX_LEN} must fit {TRAIN_SEQ_LEN}"),
)

Rows = dict[str, dict[str, Any]]  # settings by name of a row
RECIPES: Rows = {  # what differs from the defaults; more rows: LADDER_FILE
    "record": dict(strength=True),
    "ar_record": dict(strength=True, diffusion_loss_weight=0.0),
    "record_bound": dict(strength=True, diffusion_start_frac=0.3, diffusion_row_frac=1.0,
                         diffusion_loss_weight=0.3),
    "direct": dict(),
    "ar": dict(diffusion_loss_weight=0.0),  # the naive baseline of the challenge
    "retrograde": dict(  # "Mercury in Retrograde" as submitted, its defects included
        mercury_clean_loss_weight=0.1, diffusion_loss_weight=1.0, diffusion_loss="mean",
        diffusion_start_step=100, diffusion_start_frac=0.0, diffusion_windows="T",
        diffusion_row_frac=1.0, diffusion_causal=True, diffusion_shift=False,
        diffusion_corruption_mode="hybrid", mercury_task_mode="mixed", diffusion_rate="fixed",
        diffusion_min_mask_ratio=0.25, diffusion_max_mask_ratio=0.35, diffusion_ramp="iterations",
        diffusion_full_prob=0.0, look_ahead=0, self_condition="commit",
        mercury_self_condition_prob=1.0, mercury_self_condition_fraction=0.75),
    "mdlm_30_70": dict(  # PR 1194; t uniform in place of its cosine schedule
        mercury_clean_loss_weight=0.3, diffusion_loss_weight=0.7, diffusion_loss_clip=100.0,
        diffusion_windows="T", diffusion_start_frac=0.0, diffusion_row_frac=1.0,
        diffusion_shift=False, diffusion_regions="iid", diffusion_full_prob=0.0, look_ahead=0),
}

PRESETS: Rows = {  # hardware size: model, batch and time, never the objective
    "8xh100": dict(checkpoint_seconds=0.0),  # each would take seconds of the clock
    "1xgpu": dict(train_batch_tokens=131_072, micro_batches=4, val_batch_size=131_072,
                  checkpoint_seconds=0.0),
    "cpu": dict(
        num_layers=4, model_dim=160, num_heads=4, num_kv_heads=2, train_seq_len=256,
        train_batch_tokens=4096, micro_batches=4, max_wallclock_seconds=150.0, matrix_lr=0.02,
        tied_embed_lr=0.03, train_log_every=20, muon_momentum_warmup_steps=100,
        val_batch_size=8192, val_loss_every=0, nelbo_sequences=256, eval_stride=0),
}

# What STRENGTH adds to a preset. GPU rows follow what others measured in the challenge (a larger
# model, paid for by six bits); this project has not measured them. The cpu row is (LOG.md).
GPU_STRENGTH = dict(export_scheme="int6+lzma", value_residual=True, matrix_lr=0.02,
                    tied_embed_lr=0.03, muon_weight_decay=0.04)
STRENGTHS: Rows = {
    "8xh100": dict(
        GPU_STRENGTH, num_layers=10, mlp_mult=3, bigram_vocab_size=2048, warmdown_iters=3000,
        muon_momentum=0.99, muon_momentum_warmup_start=0.92, muon_momentum_warmup_steps=1500,
        ema_decay=0.997),
    "1xgpu": dict(GPU_STRENGTH, bigram_vocab_size=8192),
    "cpu": dict(
        export_scheme="int6+lzma", value_residual=True, bigram_vocab_size=16384, muon_momentum=0.9,
        train_batch_tokens=2048, micro_batches=1, compile="1"),
}
# fmt: on

LADDER_FILE = Path(__file__).with_name("scripts") / "study" / "ladder.toml"  # more recipes


def unknown(setting: str, name: str, known: Collection[str]) -> list[str]:
    """Say that a name is in no row, and which are close to it; empty: it is in one."""
    near = ", ".join(difflib.get_close_matches(name, known, 3, cutoff=0.4)) or "none"
    rule = f"is unknown; closest: {near}; known: {', '.join(known)}"
    return [] if name in known else [f"{setting}={name!r} {rule}"]


def all_recipes() -> Rows:
    """Return built-in recipes, and rows of LADDER_FILE over their bases. UserError: damaged."""
    found, name = dict(RECIPES), "rows"
    try:
        text = LADDER_FILE.read_text("utf-8") if LADDER_FILE.is_file() else ""
        for name, row in tomllib.loads(text).get("rows", {}).items():
            texts = {k: str(int(v) if isinstance(v, bool) else v) for k, v in row.items()}
            own = {k: v for k, v in texts.items() if k not in ("base", "note", "published")}
            values, faults = parse_settings(own)
            if name in RECIPES and values:
                faults.append("the recipe is built in; rename the row")
            if faults:
                raise ValueError("; ".join(faults))
            found[name] = found[name if name in RECIPES else row["base"]] | values
    except (OSError, ValueError, TypeError, AttributeError, LookupError) as error:
        why = f"no base {error} above it" if isinstance(error, KeyError) else str(error)
        rule = "repair it, or move it away and use built-in recipes"
        raise UserError(f"{LADDER_FILE}: {name}: {why}; {rule}") from error
    return found


# ==== 2  RUN CONTEXT AND LOG -- device and ranks, chosen once; one call writes both logs ==========
LINES = {  # lines that other programs parse; other events are printed as `name key:value`
    "train": "step:{step}/{iterations} train_loss:{train_loss:.4f} train_time:{train_ms:.0f}ms"
    " step_avg:{step_ms:.2f}ms denoise_loss:{denoise_loss:.4f} tok_per_sec:{tok_per_sec:.0f}",
    "val": "step:{step}/{iterations} val_loss:{loss:.4f} val_bpb:{bpb:.4f}"
    " train_time:{train_ms:.0f}ms",
    "size": "Total submission size {scheme}: {total_bytes} bytes"
    " (code {code_bytes} + model {model_bytes})",
    "final": "final_{name}_roundtrip_exact val_loss:{loss:.8f} val_bpb:{bpb:.8f}",
    "nelbo": "nelbo_bpb window:{window} bound:{bpb:.6f} se:{standard_error:.6f} K:{samples}"
    " tokens:{tokens}",
    "config": "{table}",
    "parallel_eval": "parallel_eval task:{task} steps:{steps} token_acc:{token_acc:.4f}"
    " exact_seq:{exact_seq:.4f} tokens:{tokens} tok_per_sec:{tok_per_sec:.2f} span:{span}"
    " forwards:{forwards} mode:{mode}",
}
ENDING_SIGNALS = (signal.SIGTERM, signal.SIGINT)
CPU = torch.device("cpu")
Facts = dict[str, Any]  # of an event
Pair = tuple[Tensor, Tensor]
Weights = Mapping[str, Tensor]


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Say which of the new values differ from the old ones; empty: none."""
    names = [name for name in new if old.get(name) != new[name]]
    return "; ".join(f"{name.upper()} {old.get(name)!r} -> {new[name]!r}" for name in names)


class Log:
    """Write events to OUT_DIR/logs/RUN_ID.txt and .jsonl; a file that was lost is written anew."""

    def __init__(self, cfg: Config, rank: int, continued: bool) -> None:
        self.path, self.active = cfg.path("logs", ".txt"), rank == 0
        now = time.time_ns()
        self.kept = {suffix: bytearray() for suffix in (".txt", ".jsonl")}
        for suffix in self.kept if self.active else ():
            old = self.path.with_suffix(suffix)
            if continued and old.exists():
                text = old.read_bytes().rstrip(b"\n")
                self.kept[suffix] += text and text + b"\n"
            elif old.exists():
                old.rename(old.with_name(f"{old.stem}.until_{now}{suffix}"))

    def write(self, text: str, suffix: str = ".txt", echo: bool = True) -> None:
        if not self.active:
            return
        path, kept = self.path.with_suffix(suffix), self.kept[suffix]
        before = len(kept)
        kept += f"{text}\n".encode(errors="backslashreplace")
        with contextlib.suppress(OSError):  # a full disk must not end the run
            intact = path.exists() and path.stat().st_size == before
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "ab" if intact else "wb") as file:
                file.write(kept[before:] if intact else kept)
        try:
            if echo:
                tqdm.write(text)
                sys.stdout.flush()
        except OSError as error:  # nobody reads it, or that disk is full
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            self.event("warning", reason=f"nothing is printed from here ({error.strerror})")

    def event(self, name: str, /, **values: Any) -> None:
        """Write one event as a line for people (LINES) and as JSON, where NaN becomes null."""
        line = LINES.get(name) or name + "".join(f" {key}:{{{key}}}" for key in values)
        self.write(line.format(**values))
        wrong = [k for k, v in values.items() if isinstance(v, float) and not math.isfinite(v)]
        finite = values | dict.fromkeys(wrong)
        self.write(json.dumps({"event": name, **finite}, allow_nan=False), ".jsonl", echo=False)


def lock_folder(cfg: Config) -> contextlib.AbstractContextManager[Any]:
    """Hold OUT_DIR until the returned lock is left. UserError: another run holds it."""
    name = f"OUT_DIR={cfg.out_dir!r}"
    try:
        Path(cfg.out_dir).mkdir(parents=True, exist_ok=True)
        return filelock.FileLock(Path(cfg.out_dir, ".lock")).acquire(timeout=0)
    except filelock.Timeout as error:
        rule = "is in use by another run; stop that run, or set another OUT_DIR"
        raise UserError(f"{name} {rule}") from error
    except (OSError, NotImplementedError) as error:  # some file systems have no locks
        raise UserError(f"{name} cannot be written or locked ({error}); name another") from error


LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "MASTER_ADDR")


def launcher_place(cfg: Config) -> dict[str, int]:
    """Return RANK, WORLD_SIZE and LOCAL_RANK, as torchrun sets them. UserError: they do not fit."""
    texts = {name: os.environ.get(name, "") for name in LAUNCHER}
    if not any(texts[name] for name in LAUNCHER[:3]):
        return {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}
    place = {n: int(t) if re.fullmatch(r"\d{1,8}", t) else -1 for n, t in [*texts.items()][:4]}
    size, port = place["WORLD_SIZE"], place.pop("MASTER_PORT")
    lost = size > 1 and not (texts["MASTER_ADDR"] and 0 < port < 1 << 16)
    if lost or min(place.values()) < 0 or max(place["RANK"], place["LOCAL_RANK"]) >= size:
        found = ", ".join(f"{name}={text!r}" for name, text in texts.items())
        rule = "must be whole numbers, ranks below WORLD_SIZE, and port and host of rank 0"
        raise UserError(f"{found} {rule}; torchrun sets them, else unset them")
    if cfg.micro_batches % size:
        raise UserError(cfg.fill(f"WORLD_SIZE={size} must divide {{MICRO_BATCHES}}; raise it"))
    return place


def choose_device(cfg: Config, local_rank: int) -> torch.device:
    found = torch.cuda.device_count() if cfg.device != "cpu" else 0
    if cfg.window_attention == "flex" and (not found or cfg.compile == "0"):  # no gradient, or slow
        raise UserError("WINDOW_ATTENTION=flex needs CUDA, and not COMPILE=0; set it to groups")
    if cfg.device != "cuda" and not found:
        return CPU
    if local_rank >= found:
        rule = f"{found} CUDA devices, local rank {local_rank} has none; use DEVICE=cpu"
        raise UserError(f"DEVICE={cfg.device}: {rule}")
    return torch.device("cuda", local_rank)


def machine_name(device: torch.device) -> str:
    """Name a GPU, or the processor with its number of cores: `AMD EPYC, 2 cores`."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo").read_text() if os.path.exists("/proc/cpuinfo") else ""  # Linux
    names = re.findall(r"model name\s*: (.*)", info)
    return f"{[*names, platform.machine()][0]}, {os.cpu_count()} cores"


def has_bf16(device: torch.device) -> bool:
    """Say whether matrix products are bf16, which a CPU and old GPUs emulate, or fp32."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def interrupt(number: int, frame: object) -> None:
    """Handle a signal as Ctrl-C; a second one does not disturb the end of the run."""
    signal.signal(number, signal.SIG_IGN)
    sys.unraisablehook = lambda _: None  # Python drops exceptions of __del__, with a traceback
    raise KeyboardInterrupt


def ending_signals() -> list[signal.Signals]:
    """Return the signals that came: libraries swallow the exception, or turn it into others."""
    return [number for number in ENDING_SIGNALS if signal.getsignal(number) is signal.SIG_IGN]


def stop_if_asked() -> None:
    """Raise the exception of a signal again if it was swallowed where none can be raised."""
    if ending_signals():
        raise KeyboardInterrupt


@dataclasses.dataclass
class Run:
    """One process of a run: its rank, device and log."""

    cfg: Config
    rank: int
    world_size: int
    device: torch.device
    log: Log
    control: dist.ProcessGroup | None = None  # gloo: decisions of the host, without a device sync
    peers: list[tuple[str, int]] = dataclasses.field(default_factory=list)  # (host, process)
    identity: dict[str, str] = dataclasses.field(default_factory=dict)  # IDENTITY: hashes
    bytes_ratio: float = 1.0  # bytes that the tokenizer's table counts over those of the source
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)  # of each timed part

    @classmethod
    @contextlib.contextmanager
    def start(cls, cfg: Config) -> Iterator[Run]:
        """Choose the device, hold OUT_DIR, join the process group; explain what ends the run."""
        place = launcher_place(cfg)
        rank, device = place["RANK"], choose_device(cfg, place["LOCAL_RANK"])
        with contextlib.ExitStack() as stack:
            if rank == 0:
                stack.enter_context(lock_folder(cfg))
            continued = cfg.resume == "auto" and any(path.exists() for path in cfg.checkpoints)
            run = cls(cfg, rank, place["WORLD_SIZE"], device, Log(cfg, rank, continued))
            program = Path(__file__).read_bytes()
            run.identity = {"program_sha256": hashlib.sha256(program).hexdigest()}
            for number in ENDING_SIGNALS:
                stack.callback(signal.signal, number, signal.signal(number, interrupt))
            stack.callback(setattr, sys, "unraisablehook", sys.unraisablehook)  # see interrupt()
            try:
                run.open()
                yield run
                if dist.is_initialized():  # after an error it could wait for ranks that are gone
                    dist.destroy_process_group()
            except BaseException as error:
                if (fault := run.explain(error)) is not None:
                    run.log.event("error", reason=str(fault))
                raise fault or error from None

    def open(self) -> None:
        """Set the precision of this process and join the others."""
        cuda = self.device.type == "cuda"
        torch.get_device_module(self.device).set_device(self.device)
        torch.set_float32_matmul_precision("high" if cuda else "highest")
        torch.backends.cuda.enable_cudnn_sdp(False)  # it plans each shape anew; with masks: NaN
        torch.use_deterministic_algorithms(not cuda)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        if self.world_size > 1:
            device_id = self.device if cuda else None
            dist.init_process_group("nccl" if cuda else "gloo", device_id=device_id)
            self.control = dist.new_group(backend="gloo") if cuda else dist.group.WORLD
            here = platform.node() if os.path.exists("/proc/self/exe") else ""  # Linux
            self.peers = [("", 0)] * self.world_size
            dist.all_gather_object(self.peers, (here, os.getpid()), group=self.control)

    def explain(self, error: BaseException) -> UserError | None:
        """Turn what ended the run into an error for the user."""
        stopped = ending_signals()
        if isinstance(error, UserError) and not stopped:
            return error
        text, lost = " ".join(str(error).split())[:200], ""
        for rank, peer in enumerate(self.peers):
            if peer[0] == platform.node() and not os.path.exists(f"/proc/{peer[1]}/exe"):
                lost += f"rank {rank} (process {peer[1]}) "
        if stopped:
            why = f"ended by {stopped[0].name}" + (f", {lost}is gone" if lost else "")
        elif isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate" in text:
            sizes = self.cfg.fill("{TRAIN_BATCH_TOKENS}, {VAL_BATCH_SIZE} or {MODEL_DIM}")
            why = f"out of memory ({text}); lower {sizes}, or raise MICRO_BATCHES"
        elif self.compile and isinstance(error, torch._dynamo.exc.TorchDynamoException):
            why = f"torch.compile failed ({text}); set COMPILE=0"
        elif isinstance(error, dist.DistError) or "gloo" in text:  # which raises RuntimeError
            why = f"lost {lost or 'another rank, which says why '}({text})"
        elif isinstance(error, OSError):
            why = text
        else:  # a fault of the program
            return None
        kept = any(path.exists() for path in self.cfg.checkpoints)
        then = "the last checkpoint is kept: rerun the command with RESUME=auto"
        fault = UserError(f"rank {self.rank}: {why}; {then if kept else 'no checkpoint yet'}")
        fault.status = 128 + stopped[0] if stopped else 2
        return fault

    @functools.cached_property
    def compile(self) -> bool:
        """Decide on torch.compile, which needs a C++ compiler on a CPU."""
        if self.device.type == "cuda":
            return self.cfg.compile != "0"
        found = map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))
        return self.cfg.compile == "1" and any(found)

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Compile, if this run does: one graph per window size, gradient mode and shape."""
        if not self.compile:
            return function
        torch._dynamo.config.recompile_limit = 64
        return torch.compile(function, dynamic=False, fullgraph=True)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=has_bf16(self.device))

    def clock(self) -> float:
        torch.get_device_module(self.device).synchronize()
        return time.perf_counter()

    def timed(self, name: str, function: Callable[..., Any], *args: Any) -> Any:
        began, found = self.clock(), function(*args)
        self.from_rank0(0.0)  # where only rank 0 works, the others wait
        self.seconds[name] = self.clock() - began
        return found

    def agree(self, facts: Facts) -> None:
        """Raise UserError on every rank if one holds other facts than rank 0."""
        everyone = [facts] * self.world_size
        if self.control is not None:
            dist.all_gather_object(everyone, facts, group=self.control)
        for rank, theirs in enumerate(everyone):
            if differ := changes(everyone[0], theirs):
                raise UserError(f"rank {rank} differs from rank 0: {differ}; start all ranks alike")

    def sum(self, values: Tensor) -> Tensor:
        """Add a tensor over all ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def from_rank0(self, value: float) -> float:
        """Give every rank rank 0's number, so that all decide the same on time; also a barrier."""
        box = torch.tensor([value], dtype=torch.float64)
        if self.control is not None:
            dist.broadcast(box, 0, group=self.control)
        return box.item()

    def header(self, source: Mapping[str, str]) -> None:
        """Begin the log with the program itself, the machine, versions, kernels and settings."""
        self.log.write(Path(__file__).read_text("utf-8") + "=" * 100, echo=False)
        facts: Facts = dict(time=time.strftime("%FT%TZ", time.gmtime()), command=" ".join(sys.argv))
        facts |= dict(machine=machine_name(self.device), device=str(self.device))
        facts |= dict(python=sys.version.split()[0], torch=torch.__version__)
        facts |= dict(precision="bf16" if has_bf16(self.device) else "fp32")
        facts |= dict(world_size=self.world_size, threads=torch.get_num_threads())
        facts |= dict(compile=self.compile, sha256=self.identity["program_sha256"])
        self.log.event("header", **facts)
        self.log.event("config", table=self.cfg.table(source), source=source, values=vars(self.cfg))
        if self.cfg.compile == "1" and not self.compile:
            self.log.event("warning", reason="COMPILE=1 finds no C++ compiler: nothing is compiled")
        if self.device.type == "cuda" and not has_bf16(self.device):
            self.log.event("warning", reason="this GPU has no bf16: all is computed in fp32")
        for warning in near_misses(os.environ):
            self.log.event("warning", reason=warning)


def atomic_write(path: Path, data: bytes, what: str, keep: Path | None = None) -> None:
    """Replace a file as a whole; the old one stays on failure, and as `keep` on success."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            shutil.copyfile(path, keep)  # so that a file stands at `path` at every instant
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        why = f"({error.strerror}); the old one is intact; free space or set OUT_DIR"
        raise UserError(f"{what} {path} of {len(data):,} bytes was not written {why}") from error


# ==== 3  DATA AND BYTES -- shards, and the bytes of text that a token stands for ==================
SHARD_MAGIC = 20240520  # the challenge's format: a header of 256 int32, then uint16 tokens
SHARD_HEADER = 256
SCAN_TOKENS = 1 << 28  # up to this many tokens are read once before training
END_TOKENS = 1 << 15  # of larger splits, so many at both ends of each shard
SPACE_MARK = "\u2581"  # stands for a space inside SentencePiece
BYTES_TOLERANCE = 0.001  # bytes that val_bpb counts may differ so much from those of the source
PREPARE = "python scripts/prepare_data.py"
Tokens = np.typing.NDArray[Any]


class TokenLoader:
    """An endless stream of tokens over all shards of a split, in which every row has its place.
    UserError: no shards, damaged or changed ones, ids outside the vocabulary, too few tokens.
    """

    def __init__(self, cfg: Config, split: str) -> None:
        self.vocab_size, name = cfg.vocab_size, f"DATA_PATH={cfg.data_path!r}"
        self.paths = sorted(p for p in Path(cfg.data_path).glob(f"*_{split}_*.bin") if p.is_file())
        if not self.paths:
            raise UserError(f"{name} holds no *_{split}_*.bin; name another, or run: {PREPARE}")
        self.stamps = [(path.stat().st_size, path.stat().st_mtime_ns) for path in self.paths]
        self.counts = [self.count_tokens(i) for i in range(len(self.paths))]
        self.ends = np.cumsum(self.counts)
        self.total = int(self.ends[-1])
        if self.total <= cfg.train_seq_len:
            rule = f"is longer than the {self.total:,} {split} tokens of {name}; prepare more text"
            raise UserError(f"TRAIN_SEQ_LEN={cfg.train_seq_len} {rule}, or lower it")
        self.whole, self.hashes = self.total <= SCAN_TOKENS, dict[str, str]()
        for i, count in enumerate(self.counts):  # of a large split only both ends of each shard
            digest = hashlib.sha256(np.fromfile(self.paths[i], "<i4", SHARD_HEADER).tobytes())
            for start in (0,) if self.whole else (0, max(count - END_TOKENS, 0)):
                digest.update(self.read(i, start, count if self.whole else END_TOKENS).tobytes())
            self.hashes[self.paths[i].name] = digest.hexdigest()

    def read(self, shard: int, start: int, count: int) -> Tokens:
        """Open a shard, which must be the same file each time, and read tokens, (count,) uint16."""
        path, status = self.paths[shard], self.paths[shard].stat()
        if (status.st_size, status.st_mtime_ns) != self.stamps[shard]:
            raise UserError(f"{path} changed while it was read; restore it, rerun with RESUME=auto")
        tokens = np.fromfile(path, "<u2", count, offset=SHARD_HEADER * 4 + 2 * start)
        if tokens.size and (worst := int(tokens.max())) >= self.vocab_size:
            raise UserError(f"{path} holds token {worst}; VOCAB_SIZE={self.vocab_size} is too low")
        return tokens

    def count_tokens(self, shard: int) -> int:
        """Check the header and the size of a shard."""
        path, header = self.paths[shard], np.fromfile(self.paths[shard], "<i4", SHARD_HEADER)
        found, rule = [header.size, *header[:2].tolist()], [SHARD_HEADER, SHARD_MAGIC, 1]
        if found != rule:
            why = f"its header is {found}, not {rule}; build it again: {PREPARE}"
            raise UserError(f"{path} is not a token shard: {why}")
        count, held = int(header[2]), (self.stamps[shard][0] - SHARD_HEADER * 4) / 2
        if count < 1 or held != count:
            raise UserError(f"{path} announces {count} tokens but holds {held}; build it again")
        return count

    def rows(self, start: int, num_rows: int, seq_len: int, device: torch.device = CPU) -> Tensor:
        """Read rows of T + 1 tokens that overlap by one, (num_rows, T + 1) int64."""
        parts, end = list[Tokens](), start + num_rows * seq_len + 1
        while start < end:
            i = int(np.searchsorted(self.ends, start % self.total, side="right"))
            left = int(self.ends[i]) - start % self.total  # tokens up to the shard's end
            parts.append(self.read(i, self.counts[i] - left, min(end - start, left)))
            start += len(parts[-1])
        flat = torch.from_numpy(np.concatenate(parts).astype(np.int64))
        if device.type == "cuda":
            flat = flat.pin_memory().to(device, non_blocking=True)
        return flat.unfold(0, seq_len + 1, seq_len)


class ByteCounter:
    """Count the bytes of text that tokens stand for, exactly as the challenge does. A piece counts
    its UTF-8 bytes, a byte token 1; control, unknown and unused tokens count 0. The space that
    opens a piece counts unless the tokenizer drops it after such a boundary. On whole documents the
    sum is len(decode(tokens).encode()). UserError: no tokenizer, or another size.
    """

    def __init__(self, cfg: Config) -> None:
        path, name = Path(cfg.tokenizer_path), f"TOKENIZER_PATH={cfg.tokenizer_path!r}"
        try:
            model = b"" if path.is_fifo() else path.read_bytes()  # a pipe would block
            sp = self.tokenizer = spm.SentencePieceProcessor(model_proto=model or b"empty")
            pieces = [self.spelling(i) for i in range(sp.vocab_size())]
        except (RuntimeError, OSError, ValueError) as error:
            remedy = f"name one, or run: {PREPARE}"
            raise UserError(f"{name} is no SentencePiece model ({error}); {remedy}") from error
        self.sha256 = hashlib.sha256(model).hexdigest()
        size, space = len(pieces), sp.piece_to_id(SPACE_MARK)
        faults = {f"has {size} pieces, not VOCAB_SIZE={cfg.vocab_size}": size != cfg.vocab_size}
        faults["has no BOS piece, which opens documents"] = sp.bos_id() < 0
        faults["has no piece for a space: it counts three bytes for one"] = sp.is_unknown(space)
        if found := [fault for fault, wrong in faults.items() if wrong]:
            raise UserError(f"{name} {found[0]}; name the tokenizer of the shards")
        # A tokenizer that keeps indentation spells the space of a first piece, too.
        spaced = [i for i, piece in enumerate(pieces) if piece[:1] == " " != piece[1:2]]
        drops = not any(sp.decode([i]).startswith(" ") for i in spaced)
        self.base_bytes = torch.tensor([len(p.removeprefix(" ").encode()) for p in pieces])
        self.opens = torch.tensor([p.startswith(" ") for p in pieces])
        self.boundary = torch.tensor([drops and not p for p in pieces])

    def spelling(self, token: int) -> str:
        """Text of a token; one character for a byte token, none for a silent one."""
        sp = self.tokenizer
        if sp.is_control(token) or sp.is_unknown(token) or sp.is_unused(token):
            return ""
        return "?" if sp.is_byte(token) else str(sp.id_to_piece(token)).replace(SPACE_MARK, " ")

    def count(self, prev: Tensor, target: Tensor) -> Tensor:
        """Bytes of each target token given the token before it: equal shapes, int64, on the CPU."""
        return self.base_bytes[target] + (self.opens[target] & ~self.boundary[prev])


def bits_per_byte(sum_nats: float, sum_bytes: float) -> float:
    """Divide nats by bytes, in bits: the only such division. UserError: not a finite score."""
    if not math.isfinite(sum_nats):
        raise UserError(f"the score is not finite ({sum_nats} nats): the weights do not fit fp16")
    return sum_nats / math.log(2) / sum_bytes


def read_manifest(cfg: Config) -> Facts:
    """Return what the manifest beside the shards says of them, if any. UserError: damaged."""
    path = Path(cfg.data_path, "manifest.json")
    try:
        found = json.loads(path.read_text("utf-8")) if path.is_file() else {}
        if "settings" not in found:  # another program's
            return {}
        files = {name: str(row["sha256"]) for name, row in found["files"].items()}
        num_bytes = int(found["splits"]["val"].get("bytes", 0))
        return dict(files=files, tokenizer=str(found["tokenizer"]["sha256"]), bytes=num_bytes)
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}); build it again: {PREPARE}") from error


def check_data(
    cfg: Config, train: TokenLoader, val: TokenLoader, counter: ByteCounter
) -> tuple[Facts, list[str]]:
    """Return facts about the data and warnings. UserError: no text, or of another tokenizer."""
    folder, name = f"DATA_PATH={cfg.data_path!r}", f"TOKENIZER_PATH={cfg.tokenizer_path!r}"
    manifest, hashes = read_manifest(cfg), train.hashes | val.hashes
    theirs, source = manifest.get("tokenizer"), manifest.get("bytes")
    counted, warnings = 0, list[str]()
    listed = manifest.get("files", hashes)
    partly = [key for split in (train, val) if not split.whole for key in split.hashes]
    known = hashes | {key: listed.get(key, "") for key in partly}  # of these only the names
    if theirs and theirs != counter.sha256:
        which = f"SHA-256 {theirs[:12]}, not {counter.sha256[:12]} of {name}"
        raise UserError(f"{folder} was made with another tokenizer ({which}); name that one")
    if changed := [key for key in {**known, **listed} if known.get(key) != listed.get(key)]:
        rule = "are not as its manifest.json says; build them again, or move that file away"
        raise UserError(f"{folder}: {', '.join(changed[:3])} {rule}")
    for start in range(0, val.total - 1, 1 << 22):
        row = val.rows(start, 1, min(1 << 22, val.total - 1 - start))[0]
        counted += int(counter.count(row[:-1], row[1:]).sum())
    if not counted:
        raise UserError(f"{folder} has no byte of text in its validation split; prepare more text")
    flat, sp = val.rows(0, 1, min(val.total, 4096) - 1)[0].numpy(), counter.tokenizer
    ids = max(np.split(flat, np.flatnonzero(flat == sp.bos_id())), key=len).tolist()[1:]  # longest
    if not theirs and sp.encode(sp.decode(ids))[: len(ids) // 2] != ids[: len(ids) // 2]:
        rule = "a document of it does not come back when decoded and encoded again"
        warnings.append(f"{folder} may be of another tokenizer than {name}: {rule}")
    if source and abs(counted / source - 1) > BYTES_TOLERANCE:
        rule = f"val_bpb counts {counted:,} bytes, as the challenge does; the source text has"
        warnings.append(f"{rule} {source:,}: {name} changes it; both scores are logged")
    facts: Facts = dict(train_tokens=train.total, val_tokens=val.total, val_bytes=counted)
    facts |= dict(train_shards=len(train.paths), source_bytes=source or counted)
    data_sha256 = hashlib.sha256(str(hashes).encode()).hexdigest()
    return facts | dict(data_sha256=data_sha256, tokenizer_sha256=counter.sha256), warnings


# ==== 4  NOISE, MASKS, LOSSES -- pure functions of tensors ========================================
# Constants of splitmix64 (Steele et al. 2014) as signed int64.
SPLITMIX_GAMMA = -0x61C8864680B583EB
SPLITMIX_MUL1, SPLITMIX_MUL2 = -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15
GOLDEN_RATIO = 0.6180339887498949


def split_key(keys: Tensor, *parts: int | Tensor) -> Tensor:
    """Derive keys of random sub-streams, int64 of the broadcast shape (splitmix64)."""
    for part in parts:
        h = (keys + 1) * SPLITMIX_GAMMA + part  # products wrap
        h = (h ^ ((h >> 30) & 0x3FFFFFFFF)) * SPLITMIX_MUL1
        h = (h ^ ((h >> 27) & 0x1FFFFFFFFF)) * SPLITMIX_MUL2
        keys = h ^ ((h >> 31) & 0x1FFFFFFFF)
    return keys


def random_uniform(keys: Tensor, count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Draw uniforms in [0, 1) from int64 keys, (...) to (..., count), alike on any device."""
    bits = 53 if dtype == torch.float64 else 24
    h = split_key(keys[..., None], torch.arange(count, device=keys.device))
    return ((h >> (64 - bits)) & ((1 << bits) - 1)).to(dtype) * 2.0**-bits


def random_normal(keys: Tensor, count: int) -> Tensor:
    """Draw standard normal numbers, (...) to (..., count), by the inverse distribution function."""
    return (2 * random_uniform(keys, count) - 1 + 2.0**-24).erfinv() * math.sqrt(2)


class Corruption(NamedTuple):
    """Corrupted windows. A decoder knows `possibly_corrupted`, too, but not `corrupted`."""

    xt: Tensor  # (B, W, S) int64; [MASK] is V, an input that is never predicted
    corrupted: Tensor  # (B, W, S) bool: tokens that carry loss
    possibly_corrupted: Tensor  # (B, W, S) bool: tokens that time and self-conditioning act on
    t: Tensor  # (B, W) float32 in (0, 1]
    noise: Tensor | None = None  # (B, W, S, D) Gaussian noise of embeddings; mode gaussian only


def noise_level(cfg: Config, keys: Tensor, window_index: Tensor, ramp: float | Tensor) -> Tensor:
    """Choose t of each window, (B, W) float32 in (0, 1]. The uniform rate steps by the golden ratio
    with `window_index` (B, W): any run of windows covers [min, max]. `ramp`: share done of it.
    """
    low, high = cfg.diffusion_min_mask_ratio, cfg.diffusion_max_mask_ratio
    u = (window_index.double() * GOLDEN_RATIO).frac().float()  # in [0, 1), so t stays above `low`
    if cfg.diffusion_rate == "fixed":
        u = torch.zeros_like(u) + (1 - ramp if cfg.diffusion_progressive else 0.0)
    full = random_uniform(split_key(keys, 1), 1)[..., 0] < cfg.diffusion_full_prob
    return torch.where(full, 1.0, high - (high - low) * u).clamp_min(1e-6)


def region_mask(name: str, t: Tensor, keys: Tensor, size: int, cfg: Config) -> Tensor:
    """Mark the tokens to corrupt in each window, (B, W, S) bool, for one region at t (B, W)."""
    if name == "iid":
        return random_uniform(keys, size) < t[..., None]
    length = (t * size).round().clamp(1, size).long()[..., None]  # (B, W, 1)
    i = torch.arange(size, device=t.device)
    if name == "spans":  # until they make up `length`; fewer tokens where they overlap
        span, most = min(cfg.diffusion_span_len, size), min(cfg.diffusion_spans_per_seq, size)
        starts = (random_uniform(keys, most) * (size - span + 1)).long()[..., None]  # (B, W, n, 1)
        wanted = torch.arange(most, device=t.device) * span < length  # (B, W, n)
        return ((i >= starts) & (i < starts + span) & wanted[..., None]).any(dim=-2)
    start = size - length  # continuation: one run up to the end
    if name == "infill":  # one run with text after it
        start = (random_uniform(keys, 1) * start).long()
    return (i >= start) & (i < start + length)


def corrupt(x0: Tensor, t: Tensor, keys: Tensor, cfg: Config) -> Corruption:
    """Corrupt windows of clean tokens (B, W, S) at t (B, W), with randomness from keys (B, W)."""
    full = (t >= 1)[..., None]
    corrupted = torch.ones_like(x0, dtype=torch.bool)
    region = random_uniform(split_key(keys, 2), 1)  # (B, W, 1): the share it falls into chooses
    low = 0.0
    for name, part in cfg.regions():
        marked = full | region_mask(name, t, split_key(keys, 3), x0.shape[-1], cfg)
        corrupted = torch.where(region >= low, marked, corrupted)
        low += part
    mask_shares = {"mask": 1.0, "hybrid": cfg.diffusion_hybrid_mask_prob}
    mask_share = mask_shares.get(cfg.diffusion_corruption_mode, 0.0)
    return apply_noise(x0, corrupted, t, split_key(keys, 4), cfg, mask_share)


def apply_noise(
    x0: Tensor, corrupted: Tensor, t: Tensor, keys: Tensor, cfg: Config, share: float | None = None
) -> Corruption:
    """Replace marked tokens of x0 (B, W, S) by [MASK] (a share of them) or random tokens. All
    masked or all random: arXiv:2107.03006; a share of each: arXiv:2503.04482. Mode gaussian draws
    noise for the embeddings instead; what would be masked becomes pure noise there. Share None is
    for decoding: all masked, or all random where training knew only that.
    """
    mode, size = cfg.diffusion_corruption_mode, x0.shape[-1]
    mask_share = float(mode != "uniform") if share is None else share
    if mode == "gaussian":
        noise = random_normal(split_key(keys, 1), size * cfg.model_dim)
        level = torch.ones_like(t) if mask_share else t
        return Corruption(x0, corrupted, corrupted, level, noise.view(*x0.shape, -1))
    random_token = (random_uniform(split_key(keys, 2), size) * cfg.vocab_size).long()
    masked = random_uniform(split_key(keys, 3), size) < mask_share
    xt = torch.where(corrupted, torch.where(masked, cfg.vocab_size, random_token), x0)
    # Where any token may be a wrong one, nothing may tell the model which one is.
    possibly = corrupted if mode == "mask" else torch.ones_like(corrupted)
    return Corruption(xt, corrupted, possibly, t)


def attention_rule(
    first: Callable[[Tensor], Tensor], size: int, before: int, causal: bool
) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the rule (query, key) to bool of windows of `size` tokens, each after a clean token.
    The windows' own keys follow `before` clean keys. Window w reads the keys before its clean
    token, at place `first(w)`, and itself: in both directions, or backwards only if `causal`.
    """

    def rule(query: Tensor, key: Tensor) -> Tensor:
        window, noisy = query // (size + 1), key - before
        own = (noisy >= 0) & (noisy // (size + 1) == window)
        if causal:
            own = own & (noisy <= query)
        return (key < first(window)) | own

    return rule


def window_mask(seq_len: int, size: int, causal: bool, device: torch.device) -> Tensor:
    """Return which keys of [clean; noisy] each noisy query reads, (N, T + N) bool. The windows tile
    a row: window w covers tokens w S + 1 .. w S + S, after the clean token w S.
    """
    rule = attention_rule(lambda w: w * size, size, seq_len, causal)
    queries = torch.arange(seq_len // size * (size + 1), device=device)
    return rule(queries[:, None], torch.arange(seq_len + len(queries), device=device))


def block_mask(seq_len: int, size: int, causal: bool, device: torch.device) -> BlockMask:
    """Return a window_mask for kernels that skip unread blocks; at S = T without clean keys."""
    before, num = seq_len * (size < seq_len), seq_len // size * (size + 1)
    rule = attention_rule(lambda w: w * size, size, before, causal)
    return create_block_mask(lambda _b, _h, q, k: rule(q, k), 1, 1, num, before + num, device)


def anneal_mask(mask: Tensor, chance: float, key: Tensor) -> Tensor:
    """Keep pairs of a query and a later key of its window with a chance (arXiv:2410.17891)."""
    noisy, keys = (torch.arange(n, device=mask.device) for n in mask.shape)
    earlier = keys - (len(keys) - len(noisy)) <= noisy[:, None]
    return mask & (earlier | (random_uniform(split_key(key, noisy), len(keys)) < chance))


def split_mask(mask: Tensor, size: int, most: int = 4) -> tuple[Tensor, ...]:
    """Cut a window_mask into `most` or fewer groups of windows, without the clean keys that none
    reads: (n, t + n) for n noisy tokens that read the first t clean tokens and each other.
    """
    num, windows = len(mask), len(mask) // (size + 1)
    groups, found = min(most, windows), []
    for i in range(groups):
        first, last = (windows * j // groups * (size + 1) for j in (i, i + 1))  # tokens
        clean = mask[first:last, : (last // (size + 1) - 1) * size]
        found.append(torch.cat((clean, mask[first:last, -num:][:, first:last]), dim=1))
    return tuple(found)


def next_visible(visible: Tensor, positions: Tensor, reach: int) -> Pair:
    """Find the next visible token after each token of windows, visible (B, N) bool. Returns its
    index and its distance, both (B, N) int64. Distance 0: none within `reach` in the same window,
    or both this token and the next are visible: attention reads it already.
    """
    num = visible.shape[1]
    i = torch.arange(num, device=visible.device)
    at_or_after = torch.where(visible, i, num).flip(-1).cummin(-1).values.flip(-1)
    after = F.pad(at_or_after[:, 1:], (0, 1), value=num)
    distance, found = after - i, after.clamp(max=num - 1)
    places = positions.expand(visible.shape)
    same_window = places.gather(1, found) - places == distance
    near = (distance > visible.long()) & (distance <= reach)
    return found, distance * (same_window & near)


def split_into_windows(rows: Tensor, size: int) -> Pair:
    """Cut rows (B, T + 1) into windows of `size` tokens that cover all tokens but the first. Return
    the windows, each after the clean token before it, (B, W, S + 1), and their positions (N,).
    """
    places = torch.arange(rows.shape[1], device=rows.device)
    return rows.unfold(1, size + 1, size), places.unfold(0, size + 1, size).flatten()


def token_nll(logits: Tensor, x0: Tensor, *_: object) -> Tensor:
    """Cross-entropy of each token, nats: (..., V) and (...) to (...)."""
    nll = F.cross_entropy(logits.flatten(0, -2), x0.flatten(), reduction="none")
    return nll.view_as(x0)


def score_entropy(logits: Tensor, x0: Tensor, *_: object) -> Tensor:
    """Denoising score entropy of absorbing noise, times t, at masked tokens: (..., V) to (...).
    Logits are log scores up to log V. With scores exp(l_y) (1 - t) / t and true ratios
    [y = x0] (1 - t) / t, SEDD sums (sum_y exp(l_y) - l_x0 - 1) / t over t. Its minimum, where
    exp(l) is the posterior, is the cross-entropy over t. Source: arXiv:2310.16834.
    """
    log_score = logits - math.log(logits.shape[-1])  # zero logits are a normalised score
    return log_score.exp().sum(-1) - log_score.gather(-1, x0[..., None])[..., 0] - 1


def sedd_uniform(logits: Tensor, x0: Tensor, clean: Tensor, noisy: Corruption) -> Tensor:
    """Denoising score entropy of uniform noise, times 1 - t, at every token: (..., V) to (...).
    p(y | x0) is (1 - t) [y = x0] + t / V, and sigma'(t) / V = 1 / ((1 - t) V) the rate of changes.
    The score of y is p(y) / p(xt): the mean of p(y | x0) / p(xt | x0) over the softmax of the
    logits. Source: arXiv:2310.16834.
    """
    size, here = logits.shape[-1], noisy.xt[..., None]
    t = noisy.t[..., None, None]
    kept = 1 + (1 - t) * size / t  # P(a token is kept) over P(it is drawn by chance)
    p = torch.stack((logits.softmax(-1), F.one_hot(x0, size).to(logits.dtype)))  # predicted, true
    own = p.gather(-1, here.expand(2, *here.shape))
    score, true = (1 - own) + own / kept + p * (kept - 1)  # meaningless at y = xt
    entropy: Tensor = score - true + true * (true / score).log()
    return entropy.scatter(-1, here, 0.0).mean(-1)


class Loss(NamedTuple):
    """A denoising loss."""

    nll: Callable[[Tensor, Tensor, Tensor, Corruption], Tensor]  # logits, x0, clean logits, noisy
    weight: Callable[[Tensor, float], Tensor]  # of t and the clip; 1/t unclipped: an ELBO
    normalize: bool = False  # a mean by weight, or over all tokens
    include_visible: bool = False  # tokens that could be corrupted but are not carry loss, too


# fmt: off
LOSSES: dict[str, Loss] = {
    "mean": Loss(token_nll, lambda t, _: torch.ones_like(t), normalize=True),
    "elbo": Loss(token_nll, lambda t, clip: (1 / t).clamp_max(clip)),  # arXiv:2406.07524
    "score_entropy": Loss(score_entropy, lambda t, clip: (1 / t).clamp_max(clip)),
    "sedd_uniform": Loss(sedd_uniform, lambda t, clip: (1 / (1 - t)).clamp_max(clip),
                         include_visible=True),
    "consistency": Loss(  # KL divergence from the clean stream's prediction of the same tokens
        lambda logits, x0, clean, noisy: F.kl_div(
            logits.log_softmax(-1), clean.log_softmax(-1), reduction="none", log_target=True
        ).sum(-1), lambda t, _: torch.ones_like(t), normalize=True),
}
# fmt: on


def denoising_loss(
    logits: Tensor, clean_logits: Tensor, x0: Tensor, noisy: Corruption, cfg: Config
) -> Tensor:
    """Return the loss of windows, nats per token: logits and clean logits (B, W, S, V) to ()."""
    loss = LOSSES[cfg.diffusion_loss]
    nats = loss.nll(logits, x0, clean_logits, noisy)
    where = noisy.possibly_corrupted if loss.include_visible else noisy.corrupted
    weight = loss.weight(noisy.t, cfg.diffusion_loss_clip)[..., None] * where
    total = (nats * weight).sum()
    return total / (weight.sum().clamp_min(1e-6) if loss.normalize else weight.numel())


# ==== 5  MODEL -- one trunk; the causal and the denoising pass are two ways through it ============
Maybe = Tensor | None
Mask = Maybe | tuple[Tensor, ...] | BlockMask  # None: up to the token's own; tuple: split_mask()


class Cache(NamedTuple):
    """What a pass leaves for later ones: fresh, or static buffers whose places are positions."""

    keys: list[Tensor]  # one per layer, (B, G, T, C), rotated
    values: list[Tensor]  # one per layer, (B, G, T, C)
    tokens: Tensor  # (B, T) int64


class WindowInput(NamedTuple):
    """Input of a denoising pass: windows, each with the clean token before it."""

    before: Tensor  # (B, W, 1) int64
    noisy: Corruption  # (B, W, S)
    positions: Tensor  # (N,) or (B, N) true positions in the text
    mask: Mask  # (N, keys) or (B, 1, N, keys) bool, split or in blocks: keys of cache and windows
    previous: Tensor | None = None  # (B, W, S, D) expected embedding by the last pass
    cache_positions: Tensor | None = None  # (B, N) places to write in a cache of static buffers
    table: Tensor | None = None  # rotary() of the positions, if computed before


class Layout(NamedTuple):
    """How the tokens of a pass read each other and the cache, the same in every layer."""

    rotary: Tensor  # (2, ..., 1, N, C / 2)
    mask: Mask  # which keys a token reads
    time: Tensor | None = None  # (B, N, F) features of the noise level, 0 where a token is visible
    cache: Cache | None = None
    cache_positions: Tensor | None = None  # (B, N) as in WindowInput

    def extend(self, layer: int, k: Tensor, v: Tensor) -> Pair:
        """Join keys and values (B, G, N, C) with those of the cache; static buffers change."""
        if self.cache is None:
            return k, v
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        if self.cache_positions is None:
            return torch.cat((keys, k), dim=2), torch.cat((values, v), dim=2)
        index = self.cache_positions[:, None, :, None].expand_as(k)
        return keys.scatter_(2, index, k), values.scatter_(2, index, v)


Mix = Pair | None  # shares (2,) of own values and those of the first layer; the latter


def rms_norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:]).to(x.dtype)  # some versions of autocast return fp32


def softcap(doubled: Tensor, cap: float) -> Tensor:
    """Return cap * tanh(doubled / 2) by a sigmoid, whose kernel is faster on a CPU."""
    return torch.rsub(torch.sigmoid(doubled), -cap, alpha=-2 * cap)


def rotary(positions: Tensor, cfg: Config) -> Tensor:
    """Cosines and sines of rotary embedding (arXiv:2104.09864), (2, ..., 1, N, C / 2)."""
    dim = cfg.model_dim // cfg.num_heads
    pairs = torch.arange(0, dim, 2, device=positions.device).float()
    scaled = positions.float()[..., None, :, None] / cfg.rope_scale
    angle = scaled * cfg.rope_base ** -(pairs / dim)
    return torch.stack((angle.cos(), angle.sin()))


def apply_rotary(x: Tensor, table: Tensor) -> Tensor:
    """Rotate pairs of channels of x (B, heads, N, C)."""
    cos, sin = table
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), dim=-1)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """Let queries (B, H, N, C) read keys and values (B, G, any, C); the mask as in Layout."""
    if isinstance(mask, BlockMask):
        return flex_attention(q, k, v, block_mask=mask, enable_gqa=True)
    if isinstance(mask, tuple):
        found: list[Tensor] = []
        at, clean = 0, k.shape[2] - q.shape[2]
        for part in mask:
            n, t = len(part), part.shape[1] - len(part)
            keys, values = (torch.cat((x[:, :, :t], x.narrow(2, clean + at, n)), 2) for x in (k, v))
            found.append(attend(q.narrow(2, at, n), keys, values, part))
            at += n
        return torch.cat(found, dim=2)
    if q.is_cuda and not (mask is None and q.dtype == torch.bfloat16):  # only flash takes groups
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    how = {"is_causal": mask is None, "enable_gqa": q.shape[1] != k.shape[1]}
    return F.scaled_dot_product_attention(q, k, v, mask, **how)


class Attention(nn.Module):
    """Grouped-query attention with QK-norm, a gain per head and rotary positions."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.head_dim = cfg.model_dim // cfg.num_heads
        dim, kv_dim = cfg.model_dim, cfg.num_kv_heads * self.head_dim
        self.c_q = nn.Linear(dim, dim, bias=False)
        self.c_k = nn.Linear(dim, kv_dim, bias=False)
        self.c_v = nn.Linear(dim, kv_dim, bias=False)
        self.proj = nn.Linear(dim, dim, bias=False)
        self.q_gain = nn.Parameter(torch.full((cfg.num_heads,), float(cfg.qk_gain_init)))

    def forward(self, x: Tensor, layout: Layout, layer: int, residual: Mix) -> tuple[Tensor, Pair]:
        """Return the output (B, N, D), and these tokens' keys and values (B, G, N, C)."""
        heads = (*x.shape[:2], -1, self.head_dim)
        q = self.c_q(x).view(heads).transpose(1, 2)  # (B, H, N, C)
        k = self.c_k(x).view(heads).transpose(1, 2)  # (B, G, N, C)
        v = self.c_v(x).view(heads).transpose(1, 2)
        if residual is not None:
            mix, first = residual[0].to(v.dtype), residual[1]
            v = mix[0] * v + mix[1] * first
        q = apply_rotary(rms_norm(q), layout.rotary)  # in fp32, as its table
        k = apply_rotary(rms_norm(k), layout.rotary).to(v.dtype)
        q = (q * self.q_gain[:, None, None]).to(v.dtype)
        own = k, v
        k, v = layout.extend(layer, k, v)
        y = attend(q, k, v, layout.mask)
        return self.proj(y.transpose(1, 2).flatten(2)), own


class Block(nn.Module):
    """Residual mix, attention, relu^2 MLP; the noise level scales and shifts noisy tokens."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        dim, hidden = cfg.model_dim, cfg.mlp_mult * cfg.model_dim
        features = cfg.time_embed_dim if cfg.diffusion else 0
        self.attn = Attention(cfg)
        self.fc = nn.Linear(dim, hidden, bias=False)
        self.proj = nn.Linear(hidden, dim, bias=False)
        self.attn_scale = nn.Parameter(torch.ones(dim))
        self.mlp_scale = nn.Parameter(torch.ones(dim))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(dim), torch.zeros(dim))))
        self.time_proj = nn.Parameter(torch.zeros(4 * dim, features)) if features else None

    def forward(
        self, x: Tensor, emb0: Tensor, layout: Layout, layer: int, residual: Mix
    ) -> tuple[Tensor, Pair]:
        mix = self.resid_mix.to(x.dtype)
        x = mix[0] * x + mix[1] * emb0
        mods = None  # scale and shift of both branches
        if layout.time is not None and self.time_proj is not None:
            mods = F.linear(layout.time, self.time_proj).chunk(4, dim=-1)
        h = rms_norm(x) if mods is None else rms_norm(x) * (1 + mods[0]) + mods[1]
        y, kv = self.attn(h, layout, layer, residual)
        x = x + self.attn_scale.to(x.dtype) * y
        h = rms_norm(x) if mods is None else rms_norm(x) * (1 + mods[2]) + mods[3]
        h = F.relu(self.fc(h)).square()
        return x + self.mlp_scale.to(x.dtype) * self.proj(h), kv


class GPT(nn.Module):
    """The challenge baseline's U-Net Transformer (17,059,912 parameters) with a denoising pass."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        dim, layers = cfg.model_dim, cfg.num_layers
        self.cfg = cfg
        self.num_down = layers // 2
        self.tok_emb = nn.Parameter(torch.empty(cfg.vocab_size, dim))
        self.bigram_embedding = optional_zeros(cfg.bigram_vocab_size, dim)
        self.lm_head = optional_zeros(0 if cfg.tie_embeddings else cfg.vocab_size, dim)
        self.skip_weights = nn.Parameter(torch.ones(self.num_down, dim))
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(layers))
        mix = torch.tensor([[1.0, 0.5]] * (layers - 1))
        self.value_mix = nn.Parameter(mix) if cfg.value_residual else None
        self.mask_emb = nn.Parameter(torch.empty(dim)) if cfg.diffusion else None
        reach = cfg.look_ahead if cfg.diffusion and not cfg.diffusion_causal else 0
        self.next_visible_gain = nn.Parameter(torch.ones(reach, dim)) if reach else None
        self.next_visible_proj = optional_zeros(dim if reach else 0, dim)
        soft = cfg.diffusion and cfg.self_condition == "soft"
        self.self_cond = optional_zeros(dim if soft else 0, dim)
        self.init_weights()

    def init_weights(self) -> None:
        """Draw embeddings from a normal distribution, matrices uniformly; projections are 0."""
        cfg = self.cfg
        std = cfg.tied_embed_init_std if cfg.tie_embeddings else 1.0
        shared = torch.Generator().manual_seed(cfg.seed)
        own = torch.Generator().manual_seed(cfg.seed + (1 << 32))  # recipes share their start
        for name, p in self.named_parameters():
            if name in ("tok_emb", "mask_emb"):
                nn.init.normal_(p, 0, std, generator=own if name == "mask_emb" else shared)
            elif name.endswith("proj.weight"):
                nn.init.zeros_(p)
            elif name.endswith(".weight"):
                bound = p.shape[1] ** -0.5
                nn.init.uniform_(p, -bound, bound, generator=shared)

    def add_bigrams(self, x: Tensor, ids: Tensor, positions: Tensor, cache: Cache | None) -> Tensor:
        """Add to tokens (B, N, D) a hashed embedding of each with the one before. Nothing is added
        where either is [MASK] or there is none before. What precedes the first of consecutive
        positions is read from the cache. Source: arXiv:1709.03933.
        """
        if self.bigram_embedding is None:
            return x
        mask_id, places = self.cfg.vocab_size, positions.expand(ids.shape)
        before = F.pad(ids[:, :-1], (1, 0), value=mask_id)
        if cache is not None:
            known = (places - 1).clamp(0, cache.tokens.shape[1] - 1)
            consecutive = F.pad(places.diff() == 1, (1, 0))
            before = torch.where(consecutive, before, cache.tokens.gather(1, known))
            before = before.masked_fill(places == 0, mask_id)
        rows = split_key(before, ids) % len(self.bigram_embedding)
        both_known = (before < mask_id) & (ids < mask_id)
        return x + F.embedding(rows, self.bigram_embedding) * both_known[..., None]

    def add_next_visible(self, emb: Tensor, visible: Tensor, positions: Tensor) -> Tensor:
        """Add to tokens (B, N, D) the next visible token of their window, by its distance."""
        if self.next_visible_gain is None or self.next_visible_proj is None:
            return emb
        index, distance = next_visible(visible, positions, self.cfg.look_ahead)
        gain = F.pad(self.next_visible_gain, (0, 0, 1, 0))  # nothing at distance 0
        ahead = emb.take_along_dim(index[..., None], dim=1) * F.embedding(distance, gain)
        return emb + F.linear(ahead, self.next_visible_proj)

    def trunk(self, emb0: Tensor, layout: Layout) -> tuple[Tensor, list[Pair]]:
        """Return logits (B, N, V) fp32 of embedded tokens (B, N, D); keys and values by layer."""
        kind, num = emb0.device.type, self.num_down
        if torch.is_autocast_enabled(kind):  # of its type is the residual stream, too
            emb0 = emb0.to(torch.get_autocast_dtype(kind))
        x = emb0
        outputs: list[Tensor] = []  # torch.compile cannot trace list[Tensor]()
        kvs: list[Pair] = []
        for i, block in enumerate(self.blocks):
            if num <= i < 2 * num:
                x = x + self.skip_weights[i - num].to(x.dtype) * outputs[2 * num - 1 - i]
            residual: Mix = None
            if self.value_mix is not None and i > 0:
                residual = self.value_mix[i - 1], kvs[0][1]
            x, kv = block(x, emb0, layout, i, residual)
            kvs.append(kv)
            outputs.append(x)
        cap = self.cfg.logit_softcap
        table = self.tok_emb if self.lm_head is None else self.lm_head
        logits = softcap(F.linear(rms_norm(x) * (2 / cap), table).float(), cap)
        return logits, kvs

    def forward_causal(
        self, ids: Tensor, cache: Cache | None = None, positions: Maybe = None, table: Maybe = None
    ) -> tuple[Tensor, Cache]:
        """Read tokens (B, T) causally: logits (B, T, V) float32; position i predicts token i + 1.
        Without a cache the tokens begin the text, and a fresh cache of them is returned. With
        static buffers they are written at `positions` (B, T), and read what stands up to there.
        """
        mask = None
        if cache is None or positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device)
        else:  # a place is a position: what an earlier draft left behind stands later, unread
            cache.tokens.scatter_(1, positions, ids)
            places = torch.arange(cache.tokens.shape[1], device=ids.device)
            mask = (places <= positions[..., None])[:, None]  # (B, 1, T, places)
        emb = rms_norm(F.embedding(ids, self.tok_emb))
        emb = self.add_bigrams(emb, ids, positions, cache)
        table = rotary(positions, self.cfg) if table is None else table
        layout = Layout(table, mask, None, cache, positions)
        logits, kvs = self.trunk(emb, layout)
        return logits, cache or Cache([k for k, _ in kvs], [v for _, v in kvs], ids)

    def embed_windows(self, window: WindowInput, cache: Cache | None) -> Pair:
        """Embed windows: tokens (B, N, D), and features of their noise level (B, N, F)."""
        assert self.mask_emb is not None, "a denoising pass needs a model built with diffusion on"
        cfg, noisy = self.cfg, window.noisy
        ids = torch.cat((window.before, noisy.xt), dim=-1)  # (B, W, S + 1)
        emb = rms_norm(F.embedding(ids, torch.cat((self.tok_emb, self.mask_emb[None]))))
        if noisy.noise is not None:  # arXiv:2205.14217; none for the clean token before a window
            level, noise = noisy.t[..., None, None], F.pad(noisy.noise, (0, 0, 1, 0))
            mixed = rms_norm((1 - level).sqrt() * emb + level.sqrt() * noise)
            corrupted = F.pad(noisy.corrupted, (1, 0))
            emb = torch.where(corrupted[..., None], mixed, emb)
            ids = ids.masked_fill(corrupted, cfg.vocab_size)  # a bigram would tell the token
        gate = F.pad(noisy.possibly_corrupted, (1, 0))[..., None].to(emb.dtype)
        if self.self_cond is not None and window.previous is not None:
            emb = emb + F.pad(F.linear(window.previous, self.self_cond), (0, 0, 1, 0)) * gate
        half_turns = noisy.t[..., None, None] * torch.arange(cfg.time_embed_dim, device=emb.device)
        time = torch.cos(math.pi / 2 * half_turns) * gate
        ids, emb = ids.flatten(1, 2), emb.flatten(1, 2)  # (B, N), (B, N, D)
        if cache is not None and window.cache_positions is not None:
            cache.tokens.scatter_(1, window.cache_positions, ids)
        emb = self.add_bigrams(emb, ids, window.positions, cache)
        emb = self.add_next_visible(emb, gate.flatten(1) == 0, window.positions)
        return emb, time.flatten(1, 2)

    def forward_denoise(self, window: WindowInput, cache: Cache | None = None) -> Tensor:
        """Denoise windows, which may read a cache: logits (B, W, S, V) of their tokens."""
        emb, time = self.embed_windows(window, cache)
        table = rotary(window.positions, self.cfg) if window.table is None else window.table
        layout = Layout(table, window.mask, time, cache, window.cache_positions)
        size = window.noisy.xt.shape[2]
        logits = self.trunk(emb, layout)[0].view(len(emb), -1, size + 1, self.cfg.vocab_size)
        return logits.narrow(2, int(not self.cfg.diffusion_shift), size)


def check_memory(cfg: Config, run: Run, val_tokens: int) -> None:
    """Raise UserError if a low estimate of what a run needs exceeds the memory of this machine."""
    T, limit = cfg.train_seq_len, math.inf  # if the system does not say
    with contextlib.suppress(AttributeError, OSError, ValueError):  # not on every system
        if run.device.type == "cuda":
            limit = torch.cuda.get_device_properties(run.device).total_memory
        else:
            limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
            limit = min(limit, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    logits, dim = 4 * cfg.vocab_size, cfg.model_dim
    sizes = cfg.sizes(cfg.diffusion_windows) if cfg.diffusion else []
    noisy = max((T // size * (size + 1) for size, _ in sizes), default=0)
    tokens = cfg.train_batch_tokens // cfg.micro_batches
    rows = cfg.vocab_size + cfg.bigram_vocab_size + (cfg.diffusion and cfg.look_ahead)
    rows += cfg.num_layers * (2 * dim * (1 + cfg.mlp_mult) + 4 * cfg.diffusion * cfg.time_embed_dim)
    model = "{MODEL_DIM}, {NUM_LAYERS}, {MLP_MULT}, {BIGRAM_VOCAB_SIZE}, {TIME_EMBED_DIM}"
    needs = (  # with gradients and the state of Adam, a parameter takes 16 bytes; Muon's fewer
        (12 * rows * dim, model + " or {LOOK_AHEAD}"),
        (tokens * (2 * logits + 4 * cfg.num_layers * cfg.model_dim),
         "{TRAIN_BATCH_TOKENS} or raise {MICRO_BATCHES}"),
        (noisy * (T + noisy), "{TRAIN_SEQ_LEN} or {DIFFUSION_WINDOWS}"),
        (min(cfg.val_batch_size // run.world_size, val_tokens) * logits, "{VAL_BATCH_SIZE}"),
        (cfg.parallel_eval_examples * logits, "{PARALLEL_EVAL_EXAMPLES}"),
    )  # fmt: skip
    need, names = max(needs)
    if need > limit:
        found = f"at least {need / 2**30:,.1f} GiB, {run.device} has {limit / 2**30:,.1f}"
        raise UserError(f"out of memory: {found}; lower {cfg.fill(names)}")


def optional_zeros(rows: int, columns: int) -> nn.Parameter | None:
    return nn.Parameter(torch.zeros(rows, columns)) if rows else None


def expected_embedding(model: GPT, logits: Tensor) -> Tensor:
    """Mean normalised embedding by a prediction, (..., V) to (..., D): soft self-conditioning."""
    return logits.softmax(-1).to(model.tok_emb.dtype) @ rms_norm(model.tok_emb)


# ==== 6  OPTIMIZERS AND SCHEDULES -- parameter groups, their rates, and where in a run a step is ==
# A parameter goes to the first group that takes it, whose rate is the setting of that name: HEAD_LR
# (TIED_EMBED_LR if the embedding is tied). Muon trains matrices, Adam all else.
GROUPS: dict[str, Callable[[str, Tensor], bool]] = {
    "embed": lambda name, p: name.endswith(("_emb", "_embedding")),
    "head": lambda name, p: name == "lm_head",
    "adapter": lambda name, p: name.endswith(("time_proj", "self_cond", "lora_a", "lora_b")),
    "scalar": lambda name, p: p.ndim < 2 or name.endswith(("_mix", "_weights", "_gain")),
    "matrix": lambda name, p: p.ndim == 2,
}


def assign_groups(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Give every parameter to the first row of GROUPS that takes it. ValueError: none does."""
    groups: dict[str, list[nn.Parameter]] = {name: [] for name in GROUPS}
    for name, p in model.named_parameters():
        takers = [group for group, takes in GROUPS.items() if takes(name, p)]
        if not takers:  # it would never be trained
            raise ValueError(f"no row of GROUPS takes {name} {tuple(p.shape)}; add one")
        if p.requires_grad:
            groups[takers[0]].append(p)
    return groups


def orthogonalize(g: Tensor, steps: int) -> Tensor:
    """Move singular values of (n, rows, cols) towards 1 by quintic Newton-Schulz iterations."""
    a, b = 3.4445, -4.7750  # Jordan 2024, kellerjordan.github.io/posts/muon
    c = 2.0315
    x: Tensor = g.bfloat16() if has_bf16(g.device) else g
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT.to(g.dtype) if tall else x.to(g.dtype)


@torch.no_grad()
def muon_step(
    params: Sequence[Tensor], buffers: Sequence[Tensor], lr: float, momentum: float, cfg: Config
) -> None:
    """Take a Nesterov momentum step with orthogonal updates; matrices of one shape go together."""
    live = [(p, v) for p, v in zip(params, buffers, strict=True) if p.grad is not None]
    for shape in dict.fromkeys(p.shape for p, _ in live):
        group = [p for p, _ in live if p.shape == shape]
        grads = [p.grad for p in group if p.grad is not None]
        velocity = [v for p, v in live if p.shape == shape]
        torch._foreach_mul_(velocity, momentum)
        torch._foreach_add_(velocity, grads)
        nesterov = torch.stack(torch._foreach_add(grads, velocity, alpha=momentum))  # (n, r, c)
        torch._foreach_mul_(group, 1 - lr * cfg.muon_weight_decay)
        updates = orthogonalize(nesterov, cfg.muon_backend_steps).unbind()
        torch._foreach_add_(group, updates, alpha=-lr * max(1.0, shape[0] / shape[1]) ** 0.5)


class ScheduleState(NamedTuple):
    """Where in a run a step is, as every rank agrees."""

    step: int
    progress: float  # share of the run done
    rate: float  # factor of the learning rates

    @classmethod
    def at(cls, cfg: Config, step: int, seconds: float) -> ScheduleState:
        """Take as the run's length the fewer of ITERATIONS and what fits the time limit so far. The
        rate falls to 0 over the last WARMDOWN_ITERS steps, at most WARMDOWN_FRAC of the run.
        """
        left = float(max(cfg.iterations - step, 0))
        if cfg.max_wallclock_seconds > 0 and step > 0:
            seconds_left = max(cfg.max_wallclock_seconds - seconds, 0)
            left = min(left, seconds_left * step / max(seconds, 1e-9))
        warmdown = min(cfg.warmdown_iters, cfg.warmdown_frac * (step + left))
        factor = min(left / warmdown, 1.0) if warmdown > 0 else 1.0
        return cls(step, step / max(step + left, 1), factor)


# ==== 7  EVALUATION AND DECODING -- exact score, diffusion bound, two basic ways to decode ========
@torch.no_grad()
def token_nll_causal(model: GPT, ids: Tensor) -> Tensor:
    """Nats of every token but the first given all before it: (B, T) to (B, T - 1) fp32."""
    return token_nll(model.forward_causal(ids[:, :-1])[0], ids[:, 1:])


@torch.no_grad()
def window_bounds(
    model: GPT, rows: Tensor, keys: Tensor, size: int, samples: int, mask: Mask
) -> Tensor:
    """Sample upper bounds of the windows' negative log-likelihood: (K, B, W) float64 nats.
    By the chain rule in a random order of a window's S tokens, with m = S .. 1 still masked: m is
    uniform and stratified over samples, and S / m * (sum of masked nats) unbiased for an upper
    bound (Jensen, over orders); exact at S = 1. Windows follow left to right. Rows are (B, T + 1),
    keys (B, W). Sources: arXiv:1310.1757, arXiv:2110.02037.
    """
    tokens, positions = split_into_windows(rows, size)
    before, x0 = tokens[..., :1], tokens[..., 1:]
    cache = model.forward_causal(rows[:, :-1])[1]
    start = random_uniform(split_key(keys, 1), 1)[..., 0]
    estimates = []
    for k in range(samples):
        m = (((start + k / samples) % 1.0) * size).long().clamp(max=size - 1) + 1  # (B, W)
        order = random_uniform(split_key(keys, 2, k), size).argsort(dim=-1).argsort(dim=-1)
        masked = order < m[..., None]
        noisy = apply_noise(x0, masked, m.float() / size, split_key(keys, 3, k), model.cfg, 1.0)
        logits = model.forward_denoise(WindowInput(before, noisy, positions, mask), cache)
        estimates.append((token_nll(logits, x0).double() * masked).sum(-1) * size / m)
    return torch.stack(estimates)


def validation_batches(run: Run, val: TokenLoader, starts: Tensor) -> Iterator[Pair]:
    """Yield this rank's share of rows at rising `starts` (n,): starts (B,), tokens (B, T + 1)."""
    T = run.cfg.train_seq_len
    mine = starts[run.rank :: run.world_size]
    at_once = max(run.cfg.val_batch_size // (T * run.world_size), 1)
    batches = torch.split(mine, at_once) if len(mine) else ()
    for batch in tqdm(batches, "eval", leave=False, disable=run.rank > 0 or None):
        stop_if_asked()
        offsets = batch - batch[0]
        length = int(offsets[-1]) + T
        if length <= 2 * run.world_size * len(batch) * T:  # near each other: one read
            row = val.rows(int(batch[0]), 1, length)[0]
            yield batch, row[offsets[:, None] + torch.arange(T + 1)]
        else:
            yield batch, torch.cat([val.rows(start, 1, T) for start in batch.tolist()])


RowScore = Callable[[Tensor, Tensor], Tensor]  # rows (B, T + 1), starts (B,) to nats (K, B, n)


def score_rows(
    run: Run, val: TokenLoader, counter: ByteCounter, score: RowScore, starts: Tensor, new: int
) -> tuple[Facts, float]:
    """Sum nats over rows at `starts` (n,) of the validation split; ranks share them. Of rows that
    overlap all but the one at 0 count their last `new` tokens (then n = T). Returns the loss (nats
    per token), bpb, tokens and bytes, and the standard error of bpb over K samples a row.
    """
    T, most = run.cfg.train_seq_len, 0
    sums = torch.zeros(4, dtype=torch.float64, device=run.device)  # nats, variance, tokens, bytes
    for batch, rows in validation_batches(run, val, starts):
        counts = (batch[:, None] == 0) | (torch.arange(T) >= T - new)  # (B, T)
        num_bytes = (counter.count(rows[:, :-1], rows[:, 1:]) * counts).sum()
        most = max(most, len(rows)) if run.compile else len(rows)
        more = (0, most - len(rows))  # padding, so that one graph serves all batches
        given = [F.pad(rows, (0, 0, *more)).to(run.device), F.pad(batch, more).to(run.device)]
        with run.autocast():
            nats = score(*given)[:, : len(rows)].double()
        nats = (nats if new == T else nats * counts.to(run.device)).sum(-1)  # (K, B)
        variance = nats.var(0).sum() / len(nats) if len(nats) > 1 else sums.new_zeros(())
        numbers = (counts.sum().to(sums), num_bytes.to(sums))
        sums += torch.stack([nats.mean(0).sum(), variance, *numbers])
    found = run.sum(sums).tolist()
    scores = {"loss": found[0] / found[2], "bpb": bits_per_byte(found[0], found[3])}
    scores |= {"tokens": int(found[2]), "bytes": int(found[3])}
    return scores, bits_per_byte(found[1] ** 0.5, found[3])


def evaluate_exact(
    model: GPT, run: Run, val: TokenLoader, counter: ByteCounter, stride: int = 0
) -> Facts:
    """Score the validation split by the chain rule, left to right. With a stride rows overlap, and
    all but the first score their last `stride` tokens.
    """
    T = run.cfg.train_seq_len
    step = min(stride or T, T)
    starts = torch.arange((val.total - 1 - T) // step + 1) * step
    found, _ = score_rows(
        run, val, counter, lambda rows, _: token_nll_causal(model, rows)[None], starts, step
    )
    return found | {"stride": step}


def evaluate_bound(
    model: GPT, run: Run, val: TokenLoader, counter: ByteCounter, size: int
) -> Facts:
    """Bound the diffusion likelihood over windows of `size`; exact at size 1."""
    cfg, T = run.cfg, run.cfg.train_seq_len
    samples = cfg.nelbo_samples if size > 1 else 1
    mask = split_mask(window_mask(T, size, cfg.diffusion_causal, run.device), size)
    number = torch.arange(T // size, device=run.device)

    def score(rows: Tensor, starts: Tensor) -> Tensor:
        keys = split_key(starts[:, None] // T, cfg.eval_seed, number)
        return window_bounds(model, rows, keys, size, samples, mask)  # (K, B, W)

    total = (val.total - 1 - T) // T + 1
    num_rows = min(cfg.nelbo_sequences or total, total)
    starts = torch.arange(num_rows) * total // num_rows * T  # evenly spaced rows
    found, error = score_rows(run, val, counter, score, starts, T)
    return found | {"standard_error": error, "samples": samples}


def compile_passes(model: GPT, run: Run) -> GPT:
    """Return the same model for batches of one shape, which its passes are compiled for on a GPU
    (on a CPU that takes longer than it saves); decoding has many shapes.
    """
    fast = copy.copy(model)
    for name in ("forward_causal", "forward_denoise") if run.device.type == "cuda" else ():
        setattr(fast, name, run.compiled(getattr(model, name)))
    return fast


def fill_cache(model: GPT, ids: Tensor, room: int) -> Cache:
    """Read prompts (B, P) into static buffers of P + room places."""
    cache = model.forward_causal(ids)[1]
    keys = [F.pad(k, (0, 0, 0, room)) for k in cache.keys]
    values = [F.pad(v, (0, 0, 0, room)) for v in cache.values]
    return Cache(keys, values, F.pad(ids, (0, room)))


@torch.no_grad()
def decode_autoregressive(model: GPT, ids: Tensor, start: int, stop: int) -> Tensor:
    """Decode tokens [start, stop) of rows (B, L) greedily, left to right, 1 <= start: (B, L)."""
    x, cache = ids.clone(), fill_cache(model, ids[:, :start], stop - start)
    for place in range(start, stop):
        last = torch.full_like(x[:, :1], place - 1)
        logits = model.forward_causal(x[:, place - 1 : place], cache, last)[0]
        x[:, place] = logits[:, 0].argmax(-1)
    return x


def num_still_masked(total: Tensor, step: int, num_steps: int) -> Tensor:
    """Of `total` (B, 1) masked tokens, how many remain after `step` of `num_steps` passes."""
    steps = total.clamp(1, num_steps)
    return total - (total * step + steps - 1) // steps


def unmask_confident(masked: Tensor, log_p: Tensor, remaining: Tensor) -> Tensor:
    """Keep only the `remaining` (B, 1) least probable of the masked tokens masked: (B, S) bool."""
    rank = log_p.masked_fill(~masked, math.inf).argsort(dim=-1).argsort(dim=-1)
    return masked & (rank < remaining)


@torch.no_grad()
def decode_refine(model: GPT, ids: Tensor, start: int, stop: int, num_steps: int = 8) -> Tensor:
    """Decode tokens [start, stop) of rows (B, L) as one window in at most `num_steps` passes, each
    of which accepts the most confident tokens (arXiv:1904.09324). The window reads the text before
    causally, and the span and the text after it in both directions.
    """
    cfg, size = model.cfg, ids.shape[1] - start  # tokens of the window: the span and its suffix
    x, rows = ids.clone(), torch.arange(len(ids), device=ids.device)[:, None]
    positions = torch.arange(start - 1, ids.shape[1], device=ids.device)
    masked = (positions[1:] < stop).expand(len(ids), -1)  # (B, S)
    total = masked.sum(1, keepdim=True)
    rule = attention_rule(lambda w: w + start - 1, size, start, cfg.diffusion_causal)
    queries = torch.arange(size + 1, device=ids.device)
    mask = rule(queries[:, None], torch.arange(start + size + 1, device=ids.device))
    cache = model.forward_causal(x[:, :start])[1]
    previous = None
    for step in range(min(num_steps, stop - start)):
        t, keys = masked.sum(1, keepdim=True) / size, split_key(rows, 0, start - 1, step)
        noisy = apply_noise(x[:, None, start:], masked[:, None], t, keys, cfg)
        before = x[:, None, start - 1 : start]
        logits = model.forward_denoise(WindowInput(before, noisy, positions, mask, previous), cache)
        if cfg.self_condition == "soft":
            previous = expected_embedding(model, logits)
        log_p, tokens = logits[:, 0].log_softmax(-1).max(-1)
        x[:, start:] = torch.where(masked, tokens, x[:, start:])
        masked = unmask_confident(masked, log_p, num_still_masked(total, step + 1, num_steps))
    return x


def evaluate_parallel(model: GPT, run: Run, val: TokenLoader) -> None:
    """Decode spans of validation text by the predecessor's protocol, in N passes and left to right.
    Speeds are medians of 3 after a warm-up; token_acc and exact_seq: of tokens and whole spans.
    """
    cfg = run.cfg
    count, start = cfg.parallel_eval_examples, cfg.parallel_eval_prefix_len
    steps = parse_counts(cfg.parallel_eval_steps) if model.mask_emb is not None else []
    for span in parse_counts(cfg.parallel_eval_span_len) if count and run.rank == 0 else []:
        length = start + span + cfg.parallel_eval_suffix_len
        offsets = [i * (val.total - length) // count for i in range(count)]
        rows = torch.cat([val.rows(offset, 1, length - 1, run.device) for offset in offsets])
        jobs = [("continuation", n) for n in (0, *steps) if n <= span]
        jobs += [("infill", n) for n in steps if n <= span]
        for task, num_steps in jobs:
            ids = rows if task == "infill" else rows[:, : start + span]
            found = time_decoding(model, run, ids, start, start + span, num_steps)
            run.log.event("parallel_eval", task=task, span=span, **found)


def time_decoding(model: GPT, run: Run, ids: Tensor, start: int, stop: int, steps: int) -> Facts:
    """Decode the true spans [start, stop) of rows (B, L) again: accuracy and speed."""
    refine = functools.partial(decode_refine, num_steps=steps)
    decode, seconds = refine if steps else decode_autoregressive, []
    for _ in range(4):
        began = run.clock()
        with run.autocast():
            out = decode(model, ids, start, stop)
        seconds.append(run.clock() - began)
    correct, forwards = (out == ids)[:, start:stop].float(), steps or stop - start
    found = {"token_acc": correct.mean().item(), "exact_seq": correct.amin(-1).mean().item()}
    found |= {"tokens": correct.numel(), "tok_per_sec": correct.numel() / sorted(seconds[1:])[1]}
    return found | dict(steps=forwards, forwards=forwards, mode="refine" if steps else "ar_cached")


# ==== 8  ARTIFACT -- integer rows and fp16 rest, compressed, its settings inside ==================
SIZE_LIMIT = 16_000_000  # bytes of code + model that the challenge allows
EVALUATION_SECONDS = 600  # that it allows for all scores
IDENTITY = ("data_sha256", "tokenizer_sha256", "program_sha256")  # of checkpoints and artifacts
ARTIFACT_FORMAT = "text-diffusion-4"
SCALE = ":scale"  # ends the name of the scales of an integer tensor
KEEP_FLOAT_NUMEL = 65_536  # tensors of up to this many numbers stay fp16
LZMA_PRESET = 9 | lzma.PRESET_EXTREME


class Scheme(NamedTuple):
    """How an artifact is rounded and compressed."""

    levels: tuple[int, ...]  # largest integers of matrices; the first that fits the limit is taken
    embedding_levels: int  # largest integer of the embedding and the output matrix; 0: as matrices
    compress: Callable[[bytes], bytes]


INT6_LEVELS = (31, 27, 23, 19, 15)
SCHEMES = {
    "int8+zlib": Scheme((127, 111, 95, 79, 63), 0, functools.partial(zlib.compress, level=9)),
    "int6+lzma": Scheme(INT6_LEVELS, 127, functools.partial(lzma.compress, preset=LZMA_PRESET)),
}


def pack_tensors(about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bytes:
    """Write tensors with what JSON can say about them, preceded by size and SHA-256 of all."""
    rows, data = list[tuple[str, str, tuple[int, ...]]](), list[bytes]()
    for name, w in tensors.items():
        array = w.detach().cpu().numpy()
        rows.append((name, array.dtype.str, array.shape))
        data.append(array.tobytes())
    header = json.dumps({"about": about, "tensors": rows}).encode()
    body = b"".join([len(header).to_bytes(8, "little"), header, *data])
    return len(body).to_bytes(8, "little") + hashlib.sha256(body).digest() + body


def unpack_tensors(packed: bytes) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read what pack_tensors wrote. Exception (of many kinds): damaged, or not ours."""
    size, digest = int.from_bytes(packed[:8], "little"), packed[8:40]
    body = memoryview(packed)[40:]
    if len(body) != size or hashlib.sha256(body).digest() != digest:
        raise ValueError("its checksum does not fit: bytes are missing, added or changed")
    at = 8 + int.from_bytes(body[:8], "little")
    header: Any = json.loads(bytes(body[8:at]))
    rows, tensors = header["tensors"], dict[str, Tensor]()
    for row in rows:  # name, dtype, shape
        array = np.frombuffer(body, row[1], math.prod(row[2]), at).reshape(row[2])
        tensors[str(row[0])] = torch.from_numpy(array.copy())
        at += array.nbytes
    if at != len(body) or [list(w.shape) for w in tensors.values()] != [row[2] for row in rows]:
        raise ValueError("it names a tensor twice, or holds more or less than its tensors")
    return dict(header["about"]), tensors


def first_not_finite(tensors: Weights) -> str:
    """Name the first tensor that holds a number that is not finite; empty: none."""
    return next((name for name, w in tensors.items() if not bool(w.isfinite().all())), "")


def differing_shapes(ours: Weights, theirs: Weights) -> str:
    """Name the first tensors that one side lacks or that differ in shape or dtype; empty: none."""
    kinds = [{name: (w.dtype, w.shape) for name, w in side.items()} for side in (ours, theirs)]
    names = [name for name in kinds[0] | kinds[1] if kinds[0].get(name) != kinds[1].get(name)]
    return ", ".join(names if len(names) < 4 else [*names[:3], "..."])


def quantize_rows(w: Tensor, levels: int) -> Pair:
    """Round rows of (rows, cols) to integers in [-levels, levels] times fp16 scales (rows,)."""
    scale = (w.float().abs().amax(dim=1) / levels).clamp_min(2.0**-24).half()
    q = (w.float() / scale.float()[:, None]).round().clamp(-levels, levels)
    return q.to(torch.int8), scale


def pack(weights: Weights, about: Mapping[str, Any], scheme: Scheme, levels: int) -> bytes:
    """Round weights to `levels` and compress them. UserError: not finite in fp16."""
    tensors = dict[str, Tensor]()
    for name, w in weights.items():
        if w.ndim == 2 and w.numel() > KEEP_FLOAT_NUMEL:
            is_embedding = name in ("tok_emb", "lm_head")
            largest = (is_embedding and scheme.embedding_levels) or levels
            tensors[name], tensors[name + SCALE] = quantize_rows(w.detach().cpu(), largest)
        else:
            tensors[name] = w.detach().cpu().half()
    if name := first_not_finite(tensors):
        raise UserError(f"{name} is not finite in fp16; {furthest(Config(**about['config']))}")
    return scheme.compress(pack_tensors({"format": ARTIFACT_FORMAT, **about}, tensors))


def save_artifact(path: Path, weights: Weights, run: Run) -> None:
    """Write the artifact at the finest levels that fit (rank 0). UserError: none fit."""
    if run.rank > 0:
        return
    about = {"config": dataclasses.asdict(run.cfg), **run.identity}
    code, name = Path(__file__).stat().st_size, run.cfg.export_scheme
    for levels in SCHEMES[name].levels:
        packed = pack(weights, about, SCHEMES[name], levels)
        total = code + len(packed)
        if total <= SIZE_LIMIT:
            break
    atomic_write(path, packed, "artifact")
    parts = {"total_bytes": total, "code_bytes": code, "model_bytes": len(packed)}
    run.log.event("size", scheme=name, levels=levels, **parts, limit_bytes=SIZE_LIMIT)
    if total > SIZE_LIMIT:
        rule = f"exceeds {SIZE_LIMIT:,}, of which {code:,} are code ({name}, levels {levels})"
        remedy = "RESUME=auto EXPORT_SCHEME=int6+lzma, or lower NUM_LAYERS or BIGRAM_VOCAB_SIZE"
        raise UserError(f"submission of {total:,} bytes {rule}; {remedy}")


def decompress(data: bytes) -> bytes:
    """Undo any scheme, up to the size that stands first. ValueError: another size, or damaged."""
    xz, most = data.startswith(b"\xfd7zXZ"), (1 << 26) + 64 * len(data)
    unpacker: Any = lzma.LZMADecompressor() if xz else zlib.decompressobj()
    head: bytes = unpacker.decompress(data, 8)
    size, left = 32 + int.from_bytes(head, "little"), b"" if xz else unpacker.unconsumed_tail
    rest: bytes = unpacker.decompress(left, min(size, most) + 1)  # one byte more shows the end
    if not unpacker.eof or unpacker.unused_data or len(rest) != size:
        raise ValueError("truncated, followed by other bytes, or too large")
    return head + rest


def load_artifact(path: Path, device: torch.device, what: str = "artifact") -> tuple[GPT, Facts]:
    """Rebuild a model (settings: model.cfg); return it and its identity. UserError: damaged."""
    try:
        about, tensors = unpack_tensors(decompress(b"" if path.is_fifo() else path.read_bytes()))
        if about["format"] != ARTIFACT_FORMAT:
            raise ValueError(f"its format is not {ARTIFACT_FORMAT!r}")
        if name := first_not_finite(tensors):
            raise ValueError(f"{name} holds numbers that are not finite")
        types = {n: (type(getattr(Config, n)), type(v)) for n, v in about["config"].items()}
        if wrong := [n for n, kind in types.items() if len({*kind}) > 1 and kind != (float, int)]:
            raise ValueError(f"settings of another type: {wrong}")
        cfg = Config(**about["config"])
        if cfg.num_layers > len(tensors):
            raise ValueError(f"its settings ask for {cfg.num_layers:,} layers, it holds fewer")
        with torch.device("meta"):  # a model without numbers
            model = GPT(cfg)
        own = dict(model.named_parameters())
        scales = {n + SCALE: p[..., 0].half() for n, p in own.items() if n + SCALE in tensors}
        ours = {n: p.to(torch.int8 if n + SCALE in scales else torch.half) for n, p in own.items()}
        if unlike := differing_shapes(ours | scales, tensors):
            raise ValueError(f"it lacks or has other tensors: {unlike}")
        weights = {name: tensors[name].float() for name in own}
        for name in scales:
            weights[name.removesuffix(SCALE)] *= tensors[name].float()[:, None]
        model.load_state_dict(weights, assign=True)
        return model.to(device).eval(), {name: str(about.get(name, "")) for name in IDENTITY}
    except Exception as error:  # zlib, json and torch fail in many ways on foreign bytes
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        rule = f"is missing, damaged or not ours ({why}); copy or export it again"
        raise UserError(f"{what} {path} {rule}") from error


# ==== 9  TRAINING -- one loop for every recipe; all that changes is in TrainState =================
# Settings that an artifact must share with a run that starts from it.
SHAPE_SETTINGS = ["vocab_size", "num_layers", "model_dim", "num_heads", "num_kv_heads", "mlp_mult"]
SHAPE_SETTINGS += ["tie_embeddings", "value_residual", "bigram_vocab_size"]


class TrainState:
    """All that a step changes; what a checkpoint holds."""

    def __init__(self, cfg: Config, run: Run, loader: TokenLoader, model: GPT | None = None):
        self.cfg, self.run = cfg, run
        self.loader, self.step = loader, 0
        self.seconds = 0.0
        self.model = (model or GPT(cfg)).to(run.device)
        groups = assign_groups(self.model)
        rates = vars(cfg) | ({"embed_lr": cfg.tied_embed_lr} if cfg.tie_embeddings else {})
        trained = {name: p for name, p in groups.items() if p and name != "matrix"}
        adam = [dict(params=p, lr=0.0, base_lr=rates[f"{n}_lr"]) for n, p in trained.items()]
        self.adam = torch.optim.Adam(adam, 0.0, (cfg.beta1, cfg.beta2), cfg.adam_eps, fused=True)
        names = {p: name for name, p in self.model.named_parameters()}
        self.tensors = {name: p.detach() for p, name in names.items()}  # all that a step changes
        for p in [p for group in adam for p in group["params"]]:
            state = self.adam.state[p] = {"step": torch.zeros((), device=p.device)}
            state |= {kind: torch.zeros_like(p) for kind in ("exp_avg", "exp_avg_sq")}
            self.tensors |= {f"{names[p]}:{kind}": w for kind, w in state.items()}
        self.matrices = groups["matrix"]
        self.momenta = {f"{names[p]}:momentum": torch.zeros_like(p) for p in self.matrices}
        self.ema = {f"{names[p]}:ema": p.detach().clone() for p in names if cfg.ema_decay}
        self.tensors |= self.momenta | self.ema
        counts = {name: sum(p.numel() for p in params) for name, params in groups.items()}
        run.log.event("model", model_params=sum(counts.values()), **counts)

    def update(self, now: ScheduleState) -> None:
        """Apply the gradients and clear them; average the weights if EMA_DECAY says so."""
        cfg, params = self.cfg, list(self.model.parameters())
        if cfg.grad_clip_norm > 0:
            torch.nn.utils.clip_grad_norm_(params, cfg.grad_clip_norm)
        warm = min(now.step / max(cfg.muon_momentum_warmup_steps, 1), 1.0)
        for group in self.adam.param_groups:
            group["lr"] = group["base_lr"] * now.rate
        momentum = (1 - warm) * cfg.muon_momentum_warmup_start + warm * cfg.muon_momentum
        lr, buffers = cfg.matrix_lr * now.rate, [*self.momenta.values()]
        muon_step(self.matrices, buffers, lr, momentum, cfg)
        self.adam.step()
        self.model.zero_grad(set_to_none=True)
        if self.ema:  # early averages forget the initial weights
            decay = min(cfg.ema_decay, (1 + now.step) / (10 + now.step))
            torch._foreach_lerp_([*self.ema.values()], [p.detach() for p in params], 1 - decay)
        self.step += 1

    def weights(self) -> dict[str, Tensor]:
        """Weights to export, by name: the average if there is one."""
        return {n: self.tensors.get(f"{n}:ema", w) for n, w in self.tensors.items() if ":" not in n}

    def log(self, event: str, values: dict[str, Any]) -> None:
        tokens = self.cfg.train_batch_tokens * self.step
        ms = max(self.seconds, 1e-9) * 1e3
        pace = {"train_ms": ms, "step_ms": ms / max(self.step, 1), "tok_per_sec": tokens / ms * 1e3}
        pace |= {"step": self.step, "iterations": self.cfg.iterations}
        self.run.log.event(event, **values, **pace)

    def save(self) -> None:
        """Write the checkpoint (rank 0). UserError: weights are not finite, or differ by rank."""
        new, old = self.cfg.checkpoints
        if name := first_not_finite(self.tensors):
            rule = f"is not finite at step {self.step}; {furthest(self.cfg)}"
            raise UserError(f"{name} {rule}; last checkpoint: {new}")
        about: Facts = {"config": dataclasses.asdict(self.cfg), **self.run.identity}
        about |= {"step": self.step, "seconds": float(self.seconds)}
        try:
            if self.run.rank == 0:
                atomic_write(new, pack_tensors(about, self.tensors), "checkpoint", keep=old)
        except UserError as error:
            self.run.log.event("warning", reason=str(error))
        sums = torch.stack([w.view(torch.int32).sum() for w in self.tensors.values()]).tolist()
        self.run.agree({f"checksum of weights at step {self.step}": hash(tuple(sums))})

    def resume(self) -> None:
        """Continue from a checkpoint or from INIT_FROM. UserError: damaged, no fit, or ranks that
        start from different settings, files or steps.
        """
        content = dict(self.run.identity, data_path="", tokenizer_path="", init_from="")
        paths = [path for path in self.cfg.checkpoints if path.exists()]
        if self.cfg.resume == "auto" and paths:
            self.load(paths)
        elif self.cfg.init_from:
            content["init_from"] = self.start_from_artifact()  # ranks may have it elsewhere
        self.run.agree(vars(self.cfg) | content | {"step": self.step})

    def load(self, paths: Sequence[Path]) -> None:
        """Take over the first of some checkpoints."""
        path, ours = paths[0], self.run.identity
        try:
            about, saved = unpack_tensors(b"" if path.is_fifo() else path.read_bytes())
            old, wrong = dict(about["config"]), first_not_finite(saved)
            step, seconds = about["step"], about["seconds"]
            right = (type(step), type(seconds), wrong) == (int, float, "") and 0 <= seconds < 1e9
            if not right or not 0 <= step <= old["iterations"]:
                raise ValueError(f"step {step!r}, {seconds!r} s, {wrong}")
        except Exception as error:  # json, numpy and torch raise many kinds on damaged files
            then = "resume from the one before" if paths[1:] else "begin anew"
            why = f"is damaged ({error}); move it away to {then}"
            raise UserError(f"checkpoint {path} {why}") from error
        asked = {n: ours[n] for n in IDENTITY[:2] if n in ours} | self.cfg.training_settings()
        self.take_over("RUN_ID", str(path), changes(old | about, asked), saved, self.tensors)
        self.step, self.seconds = step, seconds
        self.run.log.event("resume", checkpoint=str(path), step=step, train_seconds=seconds)
        if about.get("program_sha256") != ours.get("program_sha256"):
            self.run.log.event("warning", reason=f"{path} was written by another train_gpt.py")

    def start_from_artifact(self) -> str:
        """Take the weights of INIT_FROM; return its SHA-256. UserError: damaged, or no fit."""
        cfg, own = self.cfg, self.tensors
        model, identity = load_artifact(Path(cfg.init_from), self.run.device, "INIT_FROM: artifact")
        asked = {name: getattr(cfg, name) for name in SHAPE_SETTINGS}
        asked["tokenizer_sha256"] = self.run.identity.get("tokenizer_sha256")
        shared = {name: p.detach() for name, p in model.named_parameters() if name in own}
        theirs = {f"{name}:ema": w for name, w in shared.items() if f"{name}:ema" in own} | shared
        differ = changes(vars(model.cfg) | identity, asked)
        ours = {name: own[name] for name in theirs}
        self.take_over("INIT_FROM", cfg.init_from, differ, theirs, ours)
        fresh = len(self.weights()) - len(shared)
        self.run.log.event("init_from", artifact=cfg.init_from, fresh=fresh)
        return hashlib.sha256(Path(cfg.init_from).read_bytes()).hexdigest()

    @staticmethod
    def take_over(name: str, path: str, changed: str, theirs: Weights, ours: Weights) -> None:
        """Copy tensors of a file to ours. UserError: other settings, names or shapes (named)."""
        if differ := changed or differing_shapes(ours, theirs):
            raise UserError(f"{path} does not fit: {differ}; set what holds there or change {name}")
        for key, w in ours.items():
            w.copy_(theirs[key])


class Objective:
    """Loss of one part of a batch: next-token loss of the clean stream plus the denoising loss."""

    def __init__(self, cfg: Config, run: Run, model: GPT) -> None:
        self.cfg, self.model = cfg, model
        self.clean, self.windows = run.compiled(self.clean_loss), run.compiled(self.window_loss)
        T, sizes = cfg.train_seq_len, cfg.sizes(cfg.diffusion_windows) if cfg.diffusion else []
        make: Callable[..., Any] = block_mask if cfg.window_attention == "flex" else window_mask
        self.masks = {s: make(T, s, cfg.diffusion_causal, run.device) for s, _ in sizes}
        self.table = rotary(torch.arange(T + 1, device=run.device), cfg)

    def __call__(self, rows: Tensor, part: int, size: int, now: ScheduleState) -> Pair:
        """Return the loss of rows (B, T + 1) of a part, and its terms (2,); size 0: no windows."""
        cfg, count = self.cfg, max(round(len(rows) * self.cfg.diffusion_row_frac), 1)
        clean_loss, clean = self.clean(rows, count if size else 0)
        if not size:
            return clean_loss, torch.stack((clean_loss.detach(), torch.zeros_like(clean_loss)))
        row = part * len(rows) + torch.arange(count, device=rows.device)[:, None]  # in the batch
        offset = random.Random(f"t {cfg.seed} {now.step}").randrange(1 << 30)
        ramp = now.progress if cfg.diffusion_ramp == "run" else now.step / cfg.iterations
        moment = [row.new_full((), n, dtype=torch.float64) for n in (now.step, offset, ramp)]
        mask = self.masks[size]
        if now.progress < cfg.diffusion_anneal_frac:
            key = split_key(row[0], cfg.seed, now.step, size)
            mask = anneal_mask(mask, now.progress / cfg.diffusion_anneal_frac, key)
        logits, cache = clean if size < cfg.train_seq_len else (clean[0], None)  # it reads none
        loss = self.windows(rows[:count], row, size, moment, mask, logits, cache)
        total = cfg.mercury_clean_loss_weight * clean_loss + cfg.diffusion_loss_weight * loss
        return total, torch.stack((clean_loss, loss)).detach()

    def clean_loss(self, rows: Tensor, keep: int) -> tuple[Tensor, tuple[Tensor, Cache] | None]:
        """Compare each prediction of the clean stream with the next token: nats per token. Also
        return the first `keep` rows of its logits, without gradient, and of its cache.
        """
        logits, cache = self.model.forward_causal(rows[:, :-1], table=self.table[:, :, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        keys, values = ([w[:keep] for w in side] for side in (cache.keys, cache.values))
        kept = logits[:keep].detach(), Cache(keys, values, rows[:keep, :-1])
        return loss, kept if keep else None

    def window_loss(
        self, rows: Tensor, row: Tensor, size: int, moment: Sequence[Tensor],
        mask: Tensor | BlockMask, clean_logits: Tensor, cache: Cache | None,
    ) -> Tensor:  # fmt: skip
        """Corrupt windows of rows (B, T + 1), which are rows `row` (B, 1) of the batch, and return
        their denoising loss, nats per token, over DIFFUSION_PASSES, each of which reads what the
        last one predicted. With self-conditioning (arXiv:2208.04202) one more pass comes first,
        without gradient. `moment`: step, offset of t and ramp (numbers would be constants of a
        graph).
        """
        cfg = self.cfg
        tokens, positions = split_into_windows(rows, size)
        before, x0 = tokens[..., :1], tokens[..., 1:]
        number = torch.arange(x0.shape[1], device=rows.device)  # of a window in its row
        keys = split_key(row, cfg.seed, moment[0].long(), number)  # (B, W)
        t = noise_level(cfg, keys, moment[1].long() + row * len(number) + number, moment[2])
        noisy = corrupt(x0, t, keys, cfg)
        read = mask if isinstance(mask, BlockMask) else split_mask(mask, size)
        window = WindowInput(before, noisy, positions, read, table=self.table[:, :, positions])
        targets = clean_logits.view(*x0.shape, -1)  # (B, W, S, V)
        losses: list[Tensor] = []
        for i in range(0 if cfg.self_condition == "none" else -1, cfg.diffusion_passes):
            with torch.set_grad_enabled(i >= 0):
                logits = self.model.forward_denoise(window, cache)
            if i >= 0:
                losses.append(denoising_loss(logits, targets, x0, noisy, cfg))
            if i + 1 < cfg.diffusion_passes:
                window = feed_back(self.model, window, logits.detach(), split_key(keys, 8 + i))
        return torch.stack(losses).mean()


def feed_back(model: GPT, window: WindowInput, logits: Tensor, keys: Tensor) -> WindowInput:
    """Give a prediction (B, W, S, V) to the next pass, in a share of the windows. Mode soft feeds
    back expected embeddings; else predicted tokens replace corrupted ones (commit).
    """
    cfg, noisy = model.cfg, window.noisy
    prob = 1.0 if cfg.self_condition == "none" else cfg.mercury_self_condition_prob
    chosen = random_uniform(split_key(keys, 1), 1) < prob  # (B, W, 1)
    if cfg.self_condition == "soft":
        return window._replace(previous=expected_embedding(model, logits) * chosen[..., None])
    drawn = random_uniform(split_key(keys, 2), noisy.xt.shape[-1])  # (B, W, S)
    replaced = chosen & (drawn < cfg.mercury_self_condition_fraction) & noisy.corrupted
    xt = torch.where(replaced, logits.argmax(-1), noisy.xt)
    return window._replace(noisy=noisy._replace(xt=xt))


def window_size(cfg: Config, now: ScheduleState) -> int:
    """Draw the window size of a step, on all ranks the same, as the slowest decides; 0: none."""
    late = now.step >= cfg.diffusion_start_step and now.progress >= cfg.diffusion_start_frac
    if not cfg.diffusion or not late:
        return 0
    sizes, shares = zip(*cfg.sizes(cfg.diffusion_windows), strict=True)
    draw = random.Random(f"window {cfg.seed} {now.step} 0")  # 0: one stream for all parts
    return int(draw.choices(sizes, shares)[0])


def train_step(
    state: TrainState, objective: Objective, now: ScheduleState, size: int | None = None
) -> Tensor:
    """Take one optimizer step with windows of `size` (0: none; None: it is drawn), without a device
    sync; return this rank's two loss terms, (2,).
    """
    cfg, run = state.cfg, state.run
    T, size = cfg.train_seq_len, window_size(cfg, now) if size is None else size
    num_rows = cfg.train_batch_tokens // cfg.micro_batches // T
    sums = torch.zeros(2, device=run.device)
    for part in range(run.rank, cfg.micro_batches, run.world_size):
        position = now.step * cfg.train_batch_tokens + part * num_rows * T
        rows = state.loader.rows(position, num_rows, T, run.device)
        with run.autocast():
            loss, terms = objective(rows, part, size, now)
        (loss / cfg.micro_batches).backward()  # type: ignore[no-untyped-call]
        sums += terms / cfg.micro_batches
    if run.world_size > 1:  # one transfer for all gradients
        grads = [p.grad for p in state.model.parameters() if p.grad is not None]
        flat = run.sum(nn.utils.parameters_to_vector(grads))
        nn.utils.vector_to_parameters(flat, grads)
    state.update(now)
    return sums


def check_finite(state: TrainState, sums: Tensor) -> dict[str, float]:
    """Add losses over ranks: the one place that waits for the device. UserError: not finite."""
    cfg = state.cfg
    ar_loss, window_loss = state.run.sum(sums.clone()).tolist()
    if math.isfinite(ar_loss + window_loss):
        return {"train_loss": ar_loss, "denoise_loss": window_loss}
    found = f"loss is not finite at step {state.step} ({ar_loss}, denoising {window_loss})"
    raise UserError(f"{found}; {furthest(cfg)}; last checkpoint, if any: {cfg.checkpoints[0]}")


def warm_up(state: TrainState, objective: Objective) -> None:
    """Take whole steps of every window size before the clock starts, which compile, reduce and
    allocate; then restore what they changed.
    """
    cfg, step = state.cfg, state.step
    saved = [w.clone() for w in state.tensors.values()]
    first = window_size(cfg, ScheduleState.at(cfg, step, state.seconds))
    for size in [*{first, *objective.masks}] * cfg.warmup_steps:
        train_step(state, objective, ScheduleState(step, 1.0, 0.0), size)
    torch._foreach_copy_([*state.tensors.values()], saved)
    state.step = step


def train(state: TrainState, val: TokenLoader, counter: ByteCounter) -> None:
    """Run optimizer steps until ITERATIONS or the time limit; only validation stops the clock."""
    cfg, run = state.cfg, state.run
    objective, fast = Objective(cfg, run, state.model), compile_passes(state.model, run)
    if run.compile:
        warm_up(state, objective)
    saved_at, sums = state.seconds, torch.zeros(2, device=run.device)
    began = run.clock() - state.seconds
    for _ in tqdm(range(state.step, cfg.iterations), "train", disable=run.rank > 0 or None):
        state.seconds = run.from_rank0(time.perf_counter() - began)
        stop_if_asked()
        if 0 < cfg.max_wallclock_seconds <= state.seconds:
            break
        if 0 < cfg.checkpoint_seconds <= state.seconds - saved_at:
            check_finite(state, sums)
            state.save()
            saved_at = state.seconds
        now = ScheduleState.at(cfg, state.step, state.seconds)
        sums = train_step(state, objective, now)
        every = cfg.train_log_every
        due = every > 0 and (state.step <= 10 or state.step % every == 0)
        if due or run.device.type == "cpu":  # where it is free, the loss of each step is checked
            losses = check_finite(state, sums)
        if due:
            state.seconds = time.perf_counter() - began
            state.log("train", losses)
        every = cfg.val_loss_every
        if every and state.step % every == 0 and state.step < cfg.iterations:
            state.seconds = run.from_rank0(run.clock() - began)
            state.log("val", evaluate_exact(fast, run, val, counter))
            began = run.clock() - state.seconds
    check_finite(state, sums)
    state.save()
    state.log("val", evaluate_exact(fast, run, val, counter))


# ==== 10  MAIN -- settings, data, train, export, reload, evaluate =================================
def evaluate(run: Run, model: GPT, val: TokenLoader, counter: ByteCounter) -> None:
    """Log every score of the reloaded artifact."""
    cfg, split = run.cfg, (compile_passes(model, run), run, val, counter)
    exact = run.timed("val_bpb", evaluate_exact, *split)
    run.log.event("final", name=cfg.export_scheme.replace("+", "_"), **exact)
    if abs(run.bytes_ratio - 1) > BYTES_TOLERANCE:
        run.log.event("val_bpb_source_bytes", bpb=exact["bpb"] * run.bytes_ratio)
    if cfg.eval_stride:
        sliding = run.timed("val_bpb_sliding", evaluate_exact, *split, cfg.eval_stride)
        run.log.event("val_bpb_sliding", **sliding)
    for size, _ in cfg.sizes(cfg.nelbo_windows) if cfg.diffusion else []:
        bound = run.timed(f"nelbo_bpb_{size}", evaluate_bound, *split, size)
        run.log.event("nelbo", window=size, **bound)
    run.timed("parallel_eval", evaluate_parallel, model, run, val)


def prepare_streams() -> None:
    """Let closed streams and narrow encodings (LC_ALL=C) not end a run."""
    sys.stdout, sys.stderr = (stream or io.StringIO() for stream in (sys.stdout, sys.stderr))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def log_data(run: Run, facts: Facts, warnings: Sequence[str]) -> None:
    """Log what check_data found; checkpoints and artifact of the run carry its identity."""
    run.log.event("data", **facts)
    for warning in warnings:
        run.log.event("warning", reason=warning)
    run.identity = {name: facts[name] for name in IDENTITY[:2]} | run.identity
    run.bytes_ratio = facts["val_bytes"] / facts["source_bytes"]


def execute(run: Run, loader: TokenLoader, val: TokenLoader, counter: ByteCounter) -> None:
    """Train, export, and score the reloaded artifact."""
    cfg = run.cfg
    log_data(run, *check_data(cfg, loader, val, counter))
    check_memory(cfg, run, val.total)
    state = TrainState(cfg, run, loader)
    state.resume()
    train(state, val, counter)
    run.timed("export", save_artifact, cfg.artifact, state.weights(), run)
    model, _ = load_artifact(cfg.artifact, run.device)  # what is scored and decoded is the file
    evaluate(run, model, val, counter)
    total = sum(run.seconds.values()) - run.seconds["export"]
    seconds = {"train": state.seconds, **run.seconds, "evaluation": total}
    found = {f"{name}_seconds": round(value, 2) for name, value in seconds.items()}
    run.log.event("timing", **found, evaluation_limit_seconds=EVALUATION_SECONDS)
    if total > EVALUATION_SECONDS:
        run.log.event("warning", reason=f"evaluation took {total:.0f} s: raise EVAL_STRIDE")
    memory = torch.cuda.max_memory_allocated() // 2**20 if run.device.type == "cuda" else 0
    with contextlib.suppress(ImportError):  # Windows does not say
        import resource

        memory = memory or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024  # from KiB
    files = {"artifact": str(cfg.artifact), "log": str(run.log.path), "steps": state.step}
    run.log.event("done", **files, train_seconds=state.seconds, peak_memory_mib=memory)


def main(argv: Sequence[str] = ()) -> int:
    """Run the program; return 0, 2 after an error that the user can repair, 130 after a signal."""
    prepare_streams()
    hints = list[str]()
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        hints += near_misses(os.environ)
        if {"-h", "--help"} & set(argv):
            print(f"{__doc__}\n{Config().table({})}")
            return 0
        if argv:
            raise UserError(f"{argv[0]!r}: settings are environment variables; --help lists them")
        cfg, source = Config.from_env(os.environ)
        loader, val = TokenLoader(cfg, "train"), TokenLoader(cfg, "val")
        counter = ByteCounter(cfg)
        with Run.start(cfg) as run:
            run.header(source)
            hints.clear()  # they stand in its log
            execute(run, loader, val, counter)
    except (UserError, OSError, KeyboardInterrupt) as error:
        text = (str(error) or "interrupted before training").replace("\n", "\nerror: ")
        print(*[f"warning: {hint}" for hint in hints], f"error: {text}", sep="\n", file=sys.stderr)
        return getattr(error, "status", 130 if isinstance(error, KeyboardInterrupt) else 2)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

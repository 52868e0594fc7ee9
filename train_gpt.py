"""Train, score, export and decode one set of weights that is an exact autoregressive and a text-diffusion model.

    python train_gpt.py                                     one process, CPU or GPU
    torchrun --standalone --nproc_per_node=8 train_gpt.py   one process a device
    RECIPE=retrograde SEED=42 python train_gpt.py           every setting is an environment variable (section 1)

A clean stream reads text causally and predicts the next token: exact likelihood, autoregressive decoding. Windows of S
tokens, some corrupted, read the clean keys before them and themselves both ways: denoising, infill, parallel decoding.
Shapes: B batch rows, T tokens a row, V vocabulary, D width, H query heads, G key/value heads, C channels a head,
W windows a row, S tokens a window, N = W * (S + 1) tokens of the noisy stream, K Monte Carlo samples.
Names: x0 clean tokens, xt corrupted ones, t noise level in (0, 1] with 1 fully corrupted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import hashlib
import io
import json
import lzma
import math
import os
import random
import re
import resource
import runpy
import signal
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast, get_type_hints

import numpy as np
import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm


# 1  SETTINGS AND RECIPES -- one frozen table; default < RECIPE row < PRESET row < environment =========================
class UserError(Exception):
    """A fault that the user can repair; printed without a traceback."""


def opt(default: Any, text: str, unit: str = "", *, choices: str = "", **limits: Any) -> Any:
    """Declare a setting: default, help, unit, and what it may be: choices, or from the limit low, to high if given."""
    meta = {"help": text, "unit": unit, "choices": tuple(choices.split()), "low": None, "high": None, "free": False}
    return dataclasses.field(default=default, metadata=meta | limits)


free = functools.partial(opt, free=True)  # a setting that moves no training step: it may differ on RESUME


@dataclasses.dataclass(frozen=True)
class Config:
    """All settings; environment name: field in upper case, booleans 0 or 1. UserError names all faults and remedies."""

    recipe: str = free("direct", "row of RECIPES or scripts/ladder.toml the other defaults come from")
    preset: str = free("auto", "row of PRESETS (hardware size); auto looks at this machine")
    run_id: str = free("", "name of log and checkpoint; empty: recipe, seed and a hash of the settings")
    seed: int = opt(1337, "fixes initial weights, data order and noise", low=0, high=2**31 - 1)
    out_dir: str = free(".", "folder of final_model.*.ptz, logs/ and checkpoints/", "path")
    resume: str = free("no", "auto: continue from checkpoints/RUN_ID.pt if it is there", choices="no auto")
    init_from: str = opt("", "artifact whose weights training starts from; empty: from scratch", "path")
    checkpoint_seconds: float = free(60.0, "time between checkpoints; 0: only the last", "s", low=0)
    device: str = free("auto", "where to compute", choices="auto cpu cuda")
    compile: str = free("auto", "torch.compile; auto: on CUDA only", choices="auto 0 1")
    data_path: str = free("./data/datasets/fineweb10B_sp1024", "folder of *_train_*.bin and *_val_*.bin", "path")
    tokenizer_path: str = free("./data/tokenizers/fineweb_1024_bpe.model", "SentencePiece model", "path")
    vocab_size: int = opt(1024, "tokens V; must equal the tokenizer's", "tokens", low=2, high=65535)
    num_layers: int = opt(9, "transformer blocks", "layers", low=1)  # up to the softcap: the parameter-golf baseline
    model_dim: int = opt(512, "width D", "channels", low=2)
    num_heads: int = opt(8, "query heads H", "heads", low=1)
    num_kv_heads: int = opt(4, "key/value heads G", "heads", low=1)
    mlp_mult: int = opt(2, "MLP width over D", "x", low=1)
    tie_embeddings: bool = opt(True, "the embedding is the output matrix too")
    tied_embed_init_std: float = opt(0.005, "standard deviation of initial tied embeddings; untied: 1", low=0)
    rope_base: float = opt(10000.0, "rotary base", low=1)
    rope_scale: float = opt(1.0, "positions are divided by it: reads longer text (arXiv:2306.15595)", low=1)
    qk_gain_init: float = opt(1.5, "initial gain on normalised queries", low=0)
    value_residual: bool = opt(False, "later layers mix the first one's values into theirs (arXiv:2410.17897)")
    bigram_vocab_size: int = opt(0, "rows of a hashed table of token pairs, one more input; 0: none", "rows", low=0)
    logit_softcap: float = opt(30.0, "logits are softcap * tanh(logits / softcap)", low=1, high=1000)
    look_ahead: int = opt(8, "windows: how far ahead the next sure token is an input; 0: never", "tokens", low=0)
    time_embed_dim: int = opt(0, "features of the noise level t; 0: no time input", "features", low=0)
    self_condition: str = opt("none", "previous prediction fed back as an input", choices="none soft commit")
    mercury_self_condition_prob: float = opt(0.5, "share of windows that get it in training", low=0, high=1)
    mercury_self_condition_fraction: float = opt(1.0, "commit: share of corrupted tokens replaced", low=0, high=1)
    iterations: int = opt(20_000, "most optimizer steps", "steps", low=1)
    max_wallclock_seconds: float = opt(600.0, "training time cap; 0: none", "s", low=0)
    train_batch_tokens: int = opt(524_288, "global batch", "tokens", low=1)
    train_seq_len: int = opt(1024, "tokens a row T", "tokens", low=2)
    micro_batches: int = opt(8, "parts of the global batch; WORLD_SIZE must divide it", low=1)
    warmup_steps: int = free(1, "passes that prime compiled kernels before the clock starts", "passes", low=0)
    warmdown_iters: int = opt(1200, "last steps, with the rate falling to 0", "steps", low=0)
    warmdown_frac: float = opt(0.5, "warm-down is at most this share of the run", low=0, high=1)
    train_log_every: int = free(200, "steps between train lines; 0: none", "steps", low=0)
    val_loss_every: int = free(1000, "steps between validations; 0: only at the end", "steps", low=0)
    val_batch_size: int = free(524_288, "evaluation batch over all ranks", "tokens", low=1)
    matrix_lr: float = opt(0.04, "Muon rate of matrices", low=0)  # from here on: optimizers and loss
    tied_embed_lr: float = opt(0.05, "Adam rate of the tied embedding", low=0)
    embed_lr: float = opt(0.6, "Adam rate of an untied embedding", low=0)
    head_lr: float = opt(0.008, "Adam rate of an untied output matrix", low=0)
    scalar_lr: float = opt(0.04, "Adam rate of gains, scales and mixes", low=0)
    adapter_lr: float = opt(0.003, "Adam rate of time, self-conditioning and low-rank projections", low=0)
    muon_momentum: float = opt(0.95, "Nesterov momentum", low=0, high=1)
    muon_backend_steps: int = opt(5, "Newton-Schulz iterations", low=1)
    muon_momentum_warmup_start: float = opt(0.85, "momentum at step 0", low=0, high=1)
    muon_momentum_warmup_steps: int = opt(500, "steps to full momentum", "steps", low=0)
    muon_weight_decay: float = opt(0.0, "decoupled decay of matrices", low=0)
    beta1: float = opt(0.9, "Adam beta1", low=0, high=1)
    beta2: float = opt(0.95, "Adam beta2", low=0, high=1)
    adam_eps: float = opt(1e-8, "Adam epsilon", low=0)
    grad_clip_norm: float = opt(0.0, "clip of the global gradient norm; 0: off", low=0)
    ema_decay: float = opt(0.0, "fp32 average of weights, exported in their place; 0: off", low=0, high=0.99999)
    mercury_clean_loss_weight: float = opt(1.0, "weight of the clean stream's next-token loss", low=0)
    diffusion_loss_weight: float = opt(0.1, "weight of the windows' loss; 0: no denoiser", low=0)
    diffusion_loss: str = opt("elbo", "LOSSES row", choices="mean elbo middle score_entropy sedd_uniform consistency")
    diffusion_loss_clip: float = opt(10.0, "largest 1/t weight (sedd_uniform: 1/(1-t))", low=1)
    diffusion_start_step: int = opt(0, "steps with the next-token loss alone", "steps", low=0)
    diffusion_start_frac: float = opt(0.6, "share of the run with the next-token loss alone", low=0, high=1)
    diffusion_passes: int = opt(1, "unrolled denoising passes that carry loss", "passes", low=1)
    diffusion_windows: str = opt("8:1,16:1,32:1,64:1", "window sizes S with their shares; T: a whole row")
    diffusion_row_frac: float = opt(0.25, "share of rows that carry the noisy stream", low=1e-6, high=1)
    diffusion_causal: bool = opt(False, "attention inside a window is causal")
    diffusion_anneal_frac: float = opt(0.0, "share of the run in which windows turn from causal", low=0, high=1)
    diffusion_shift: bool = opt(True, "in a window, too, position i predicts token i + 1")
    diffusion_corruption_mode: str = opt("mask", "what replaces a token", choices="mask uniform hybrid gaussian")
    diffusion_hybrid_mask_prob: float = opt(0.5, "hybrid: share of corrupted tokens masked", low=0, high=1)
    diffusion_regions: str = opt("iid:3,infill:1", "where: iid spans continuation infill, with their shares")
    mercury_task_mode: str = opt("none", "overrides regions", choices="none mixed continuation infill")
    mercury_continuation_prob: float = opt(0.75, "mixed: share of continuation, the rest infill", low=0, high=1)
    diffusion_rate: str = opt("uniform", "how t is chosen in [min, max]", choices="uniform fixed")
    diffusion_progressive: bool = opt(True, "fixed: t goes from min to max over the run; 0: it stays at max")
    diffusion_min_mask_ratio: float = opt(0.0, "least noise level", low=0, high=1)
    diffusion_max_mask_ratio: float = opt(1.0, "greatest noise level", low=1e-6, high=1)
    diffusion_ramp: str = opt("run", "progressive over what will be run, or ITERATIONS", choices="run iterations")
    diffusion_full_prob: float = opt(0.3, "share of windows at t = 1", low=0, high=1)
    diffusion_span_len: int = opt(8, "tokens a span", "tokens", low=1)
    diffusion_spans_per_seq: int = opt(8, "most spans a window", "spans", low=1)
    export_scheme: str = free("int8+zlib", "SCHEMES row", choices="int8+zlib int6+lzma")
    nelbo_windows: str = free("1,16,T", "window sizes of nelbo_bpb; empty: none")
    nelbo_samples: int = free(8, "Monte Carlo samples K a window", "samples", low=2)
    nelbo_sequences: int = free(0, "validation rows scored, evenly spaced; 0: all", "rows", low=0)
    eval_stride: int = free(64, "val_bpb_sliding: tokens that a row scores; 0: none", "tokens", low=0)
    parallel_eval_examples: int = free(16, "examples a task; 0: no parallel_eval", low=0)
    parallel_eval_prefix_len: int = free(128, "visible tokens before the span", "tokens", low=2)
    parallel_eval_span_len: str = free("64,8", "decoded tokens, one table each", "tokens")
    parallel_eval_suffix_len: int = free(64, "infill: visible tokens after the span", "tokens", low=1)
    parallel_eval_steps: str = free("1,2,4,8", "refinement passes", "passes")
    eval_seed: int = free(0, "fixes the noise of evaluation", low=0)

    def __post_init__(self) -> None:
        faults, shown = [], {name.upper(): f"{name.upper()}={value!r}" for name, value in vars(self).items()}
        for f in dataclasses.fields(self):
            name, value, meta = f.name.upper(), getattr(self, f.name), f.metadata
            if meta["choices"] and value not in meta["choices"]:
                faults.append(f"{shown[name]} must be one of: {', '.join(meta['choices'])}")
            low, high = meta["low"], math.inf if meta["high"] is None else meta["high"]
            if low is not None and not low <= value <= high:
                faults.append(f"{name}={value} must be in [{low}, {high}] ({meta['help']})")
        for holds, message in RULES:
            try:
                broken = not holds(self)
            except (ValueError, ZeroDivisionError) as error:  # a list that does not parse; a zero is reported above
                broken = isinstance(error, ValueError)
            if broken:
                faults.append(re.sub(r"[A-Z_]+[A-Z]", lambda m: shown.get(m[0], m[0]), message))
        if faults:
            raise UserError("\n".join(faults))

    @property
    def head_dim(self) -> int:
        return self.model_dim // self.num_heads

    @property
    def diffusion(self) -> bool:
        return self.diffusion_loss_weight > 0

    def sizes(self, text: str) -> list[tuple[int, float]]:
        return [(self.train_seq_len if size == "T" else int(size), share) for size, share in parse_shares(text)]

    def tiles(self, text: str) -> bool:
        return all(size > 0 and self.train_seq_len % size == 0 for size, _ in self.sizes(text))

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> tuple[Config, dict[str, str], list[str]]:
        """Return settings, the source of each, warnings about near-miss names; UserError lists all faults at once."""
        known = {name.upper(): kind for name, kind in get_type_hints(cls).items()}
        values, source, faults = dict[str, Any](), dict.fromkeys(map(str.lower, known), "default"), list[str]()
        gpu = "1xgpu" if env.get("WORLD_SIZE", "1") == "1" else "8xh100"
        machine = gpu if torch.cuda.is_available() and env.get("DEVICE") != "cpu" else "cpu"
        legacy = {"mercury": "retrograde", "none": "ar"}.get(env.get("DIFFUSION_TRAIN_MODE", ""), "direct")
        recipe, preset = env.get("RECIPE", legacy), env.get("PRESET", "auto").replace("auto", machine)
        recipes = RECIPES if recipe in RECIPES else all_recipes()
        for key, chosen, rows in (("RECIPE", recipe, recipes), ("PRESET", preset, PRESETS)):
            if chosen not in rows:
                close = ", ".join(difflib.get_close_matches(chosen, rows, 3, cutoff=0.4)) or "none"
                faults.append(f"{key}={chosen!r} is not in {key}S; closest: {close}; known: {', '.join(rows)}")
            values |= rows.get(chosen, {})
            source |= dict.fromkeys(rows.get(chosen, {}), f"{key.lower()} {chosen}")
        for key in sorted(env.keys() & known.keys()):
            kind, text, value = known[key], env[key], math.nan
            with contextlib.suppress(ValueError):  # what does not parse stays NaN
                value = {"0": False, "1": True}.get(text, value) if kind is bool else kind(text)
            if kind is str or -math.inf < value < math.inf:
                values[key.lower()], source[key.lower()] = value, "env"
            else:
                rule = {bool: "0 or 1", int: "a whole number"}.get(kind, "a finite number")
                faults.append(f"{key}={text!r} must be {rule}")
        try:
            cfg = cls(**values | {"preset": preset, "recipe": recipe})
        except UserError as error:
            faults.append(str(error))
        if faults:
            raise UserError("\n".join(faults))
        near = {key: difflib.get_close_matches(key, known, 1, cutoff=0.85) for key in sorted(env.keys() - known.keys())}
        return cfg, source, [f"{key} is not a setting; did you mean {near[key][0]}?" for key in near if near[key]]

    def regions(self) -> list[tuple[str, float]]:
        p = self.mercury_continuation_prob
        tasks = {"none": self.diffusion_regions, "mixed": f"continuation:{p},infill:{1 - p}"}
        return parse_shares(tasks.get(self.mercury_task_mode, self.mercury_task_mode))

    def path(self, folder: str, suffix: str) -> Path:
        digest = hashlib.sha256(json.dumps(self.training_settings(), sort_keys=True).encode()).hexdigest()
        return Path(self.out_dir, folder, (self.run_id or f"{self.recipe}_seed{self.seed}_{digest[:8]}") + suffix)

    def training_settings(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if not f.metadata["free"]}

    def table(self, source: Mapping[str, str]) -> str:
        rows = [(f.name, getattr(self, f.name), f.metadata) for f in dataclasses.fields(self)]
        return "\n".join(f"{n.upper():32}{v!s:42}{source[n]:20}{m['unit']:10}{m['help']}" for n, v, m in rows)


def parse_shares(text: str) -> list[tuple[str, float]]:
    """Read `name:share,name:share` (a bare name has share 1) and scale the shares to sum to 1."""
    pairs = [part.partition(":") for part in text.split(",") if part.strip()]
    shares = [(name.strip(), float(share) if colon else 1.0) for name, colon, share in pairs]
    total = sum(share for _, share in shares)
    if shares and (not 0 < total < math.inf or any(share < 0 for _, share in shares)):
        raise ValueError("needs shares that are not negative and do not sum to 0")
    return [(name, share / total) for name, share in shares if share > 0]


run_once = functools.cache(runpy.run_path)
SCRIPTS = Path(__file__).with_name("scripts")  # more recipes, losses and the like, where it stands beside this program


def beside(file: str, name: str, otherwise: Any = None) -> Any:
    """Return what `file` of the folder scripts/ beside this program calls `name`; without it, `otherwise`."""
    path = SCRIPTS / file
    return run_once(str(path))[name] if path.exists() else otherwise


def all_recipes() -> dict[str, dict[str, Any]]:
    """Return settings of RECIPES and rows of scripts/ladder.toml, by name; UserError: a row or the file is faulty."""
    resolve = beside("ladder.py", "resolve", lambda built_in, *_: built_in)
    return cast(dict[str, dict[str, Any]], resolve(RECIPES, Config, UserError))


# fmt: off
REGIONS = ("iid", "spans", "continuation", "infill")
RULES: tuple[tuple[Callable[[Config], bool], str], ...] = (  # what must hold; what is said if not, values added
    (lambda c: c.model_dim % (2 * c.num_heads) == 0, "MODEL_DIM must be a multiple of 2 x NUM_HEADS; change either"),
    (lambda c: c.num_heads % c.num_kv_heads == 0, "NUM_HEADS must be a multiple of NUM_KV_HEADS; change either"),
    (lambda c: c.train_batch_tokens % (c.micro_batches * c.train_seq_len) == 0,
     "TRAIN_BATCH_TOKENS must be a multiple of MICRO_BATCHES x TRAIN_SEQ_LEN; change one of them"),
    (lambda c: not c.diffusion or (c.sizes(c.diffusion_windows) != [] and c.tiles(c.diffusion_windows)),
     "DIFFUSION_WINDOWS must be sizes (or T) that divide TRAIN_SEQ_LEN: 8:1,T:2"),
    (lambda c: c.tiles(c.nelbo_windows), "NELBO_WINDOWS must be sizes (or T) that divide TRAIN_SEQ_LEN: 1,16,T"),
    (lambda c: c.regions() != [] and all(name in REGIONS for name, _ in c.regions()),
     f"DIFFUSION_REGIONS must name {', '.join(REGIONS)}: iid:3,infill:1"),
    (lambda c: (SCRIPTS / "objectives.py").exists() or not (
        c.diffusion_loss not in ("mean", "elbo") or c.diffusion_corruption_mode == "gaussian" or c.diffusion_passes > 1
        or c.self_condition != "none" or "spans" in dict(c.regions()) or c.diffusion_anneal_frac or c.init_from),
     "a setting of this recipe needs the folder scripts/ beside this program; copy it, too, or take the recipe direct"),
    (lambda c: c.diffusion_loss != "sedd_uniform" or c.diffusion_corruption_mode == "uniform",
     "DIFFUSION_LOSS is of uniform noise, not of DIFFUSION_CORRUPTION_MODE; make that uniform or take score_entropy"),
    (lambda c: c.diffusion_min_mask_ratio <= c.diffusion_max_mask_ratio,
     "DIFFUSION_MIN_MASK_RATIO exceeds DIFFUSION_MAX_MASK_RATIO; swap them"),
    (lambda c: not c.diffusion_anneal_frac or c.diffusion_anneal_frac > c.diffusion_start_frac + c.diffusion_causal,
     "DIFFUSION_ANNEAL_FRAC leaves nothing to anneal: it must exceed DIFFUSION_START_FRAC, without DIFFUSION_CAUSAL"),
    (lambda c: c.mercury_clean_loss_weight > 0 or c.diffusion,
     "MERCURY_CLEAN_LOSS_WEIGHT and DIFFUSION_LOSS_WEIGHT leave nothing to train; set one above 0"),
    (lambda c: all(int(n) >= 1 for n, _ in parse_shares(f"{c.parallel_eval_steps},{c.parallel_eval_span_len}")),
     "PARALLEL_EVAL_STEPS and PARALLEL_EVAL_SPAN_LEN must list numbers from 1"),
    (lambda c: not c.parallel_eval_examples or c.parallel_eval_prefix_len + c.parallel_eval_suffix_len
     + max((int(n) for n, _ in parse_shares(c.parallel_eval_span_len)), default=0) <= c.train_seq_len,
     "PARALLEL_EVAL_PREFIX_LEN, PARALLEL_EVAL_SPAN_LEN and PARALLEL_EVAL_SUFFIX_LEN must fit TRAIN_SEQ_LEN; cut one"),
    (lambda c: bool(re.fullmatch(r"[\w.-]*", c.run_id)), "RUN_ID names files; use letters, digits, '.', '_' and '-'"),
)

RECIPES: dict[str, dict[str, Any]] = {  # only what differs from the defaults; scripts/ladder.toml has those published
    "direct": dict(),
    "ar": dict(diffusion_loss_weight=0.0),  # the naive baseline of the challenge
}

PRESETS: dict[str, dict[str, Any]] = {  # how large: model, batch and time, never the objective
    "8xh100": dict(),
    "1xgpu": dict(train_batch_tokens=131_072, micro_batches=4, val_batch_size=131_072),
    "cpu": dict(
        num_layers=4, model_dim=160, num_heads=4, num_kv_heads=2, train_seq_len=256, train_batch_tokens=4096,
        micro_batches=4, max_wallclock_seconds=150.0, matrix_lr=0.02, tied_embed_lr=0.03, train_log_every=20,
        muon_momentum_warmup_steps=100, val_batch_size=8192, val_loss_every=0, nelbo_sequences=256, eval_stride=0),
}
# fmt: on

# 2  RUN CONTEXT AND LOG -- device, precision, kernels and ranks, chosen once; one call writes both logs ===============
LINES = {  # what other programs parse, in the challenge's and the predecessor's form; the rest is `name key:value`
    "train": "step:{step}/{iterations} train_loss:{train_loss:.4f} train_time:{train_ms:.0f}ms step_avg:{step_ms:.2f}ms"
    " denoise_loss:{denoise_loss:.4f} tok_per_sec:{tok_per_sec:.0f} mfu:{mfu:.3f}",
    "val": "step:{step}/{iterations} val_loss:{loss:.4f} val_bpb:{bpb:.4f} train_time:{train_ms:.0f}ms",
    "size": "Total submission size {scheme}: {total_bytes} bytes (code {code_bytes} + model {model_bytes})",
    "final": "final_int8_zlib_roundtrip_exact val_loss:{loss:.8f} val_bpb:{bpb:.8f}",
    "nelbo": "nelbo_bpb window:{window} bound:{bpb:.6f} se:{standard_error:.6f} K:{samples} tokens:{tokens}",
    "config": "{table}",
    "parallel_eval": "parallel_eval task:{task} steps:{steps} token_acc:{token_acc:.4f} exact_seq:{exact_seq:.4f} "
    "tokens:{tokens} tok_per_sec:{tok_per_sec:.2f} span:{span} forwards:{forwards} mode:{mode}",
}


class Log:
    """Write each event once to OUT_DIR/logs/RUN_ID.txt for people and RUN_ID.jsonl for programs; rank 0 only."""

    def __init__(self, cfg: Config, rank: int, continued: bool) -> None:
        self.path, self.active = cfg.path("logs", ".txt"), rank == 0
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            for old in (self.path, self.path.with_suffix(".jsonl")) if self.active and not continued else ():
                if old.exists():  # never overwritten
                    old.rename(old.with_name(f"{old.stem}.{int(old.stat().st_mtime)}{old.suffix}"))
        except OSError as error:
            raise UserError(f"OUT_DIR={cfg.out_dir!r} cannot be written ({error.strerror}); name another") from error

    def write(self, text: str, suffix: str = ".txt", echo: bool = True) -> None:
        if self.active:
            with contextlib.suppress(OSError), open(self.path.with_suffix(suffix), "a", encoding="utf-8") as file:
                file.write(text + "\n")  # a full disk must not end the run
            if echo:
                tqdm.write(text)

    def event(self, name: str, /, **values: Any) -> None:
        """Render one event for people, as LINES says, and for programs; NaN becomes null in JSON."""
        self.write(LINES.get(name, name + "".join(f" {k}:{{{k}}}" for k in values)).format(**values))
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        self.write(json.dumps({"event": name, **finite}, allow_nan=False), ".jsonl", echo=False)


@dataclasses.dataclass
class Run:
    """What one process is: its rank, device, kernels and log."""

    cfg: Config
    rank: int
    world_size: int
    device: torch.device
    log: Log
    control: dist.ProcessGroup | None = None  # gloo: host decisions travel without a device sync
    compile: bool = False

    @classmethod
    @contextlib.contextmanager
    def start(cls, cfg: Config) -> Iterator[Run]:
        """Pick device and kernels, join the process group and leave it on any exit; UserError: a rank was lost."""
        again = "the last checkpoint is kept: start the same command with RESUME=auto"
        given = {k: os.environ.get(k, d) for k, d in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))}
        if bad := [f"{name}={text!r}" for name, text in given.items() if not text.isdecimal()]:
            raise UserError(f"{', '.join(bad)} must be a whole number; torchrun sets it, unset it otherwise")
        rank, world, local = map(int, given.values())
        if world < 1 or cfg.micro_batches % world:
            raise UserError(f"WORLD_SIZE={world} must divide MICRO_BATCHES={cfg.micro_batches}; raise MICRO_BATCHES")
        found = torch.cuda.device_count() if cfg.device != "cpu" and torch.cuda.is_available() else 0
        if (cuda := cfg.device == "cuda" or found > 0) and local >= found:
            raise UserError(f"DEVICE={cfg.device}: {found} CUDA devices, local rank {local} has none; use DEVICE=cpu")
        device = torch.device("cuda", local) if cuda else CPU
        log = Log(cfg, rank, continued=cfg.resume == "auto" and cfg.path("checkpoints", ".pt").exists())
        run = cls(cfg, rank, world, device, log, compile=cfg.compile == "1" or (cfg.compile == "auto" and cuda))
        previous = signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends a run as Ctrl-C does
        try:
            torch.get_device_module(device).set_device(device)
            torch.set_float32_matmul_precision("high" if cuda else "highest")
            torch.use_deterministic_algorithms(not cuda)
            torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
            if world > 1:
                dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
                run.control = dist.new_group(backend="gloo") if cuda else dist.group.WORLD
            yield run
        except UserError as error:
            log.event("error", reason=str(error))
            raise
        except KeyboardInterrupt:
            raise UserError(f"rank {rank}: ended by a signal; {again}") from None
        except RuntimeError as error:
            if world == 1 or not any(word in str(error) for word in ("onnect", "roken pipe", "NCCL", "peer")):
                raise
            why = f"lost another rank, which probably died ({str(error)[:200]!r})"
            raise UserError(f"rank {rank} {why}; {again}") from error
        finally:
            signal.signal(signal.SIGTERM, previous)
            if world > 1 and dist.is_initialized():
                dist.destroy_process_group()

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Compute in bf16 on CUDA, in fp32 on CPU (where bf16 matrix products are emulated)."""
        return torch.autocast("cuda", torch.bfloat16) if self.device.type == "cuda" else contextlib.nullcontext()

    def clock(self) -> float:
        torch.get_device_module(self.device).synchronize()
        return time.perf_counter()

    def sum(self, values: Tensor) -> Tensor:
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def from_rank0(self, value: float) -> float:
        """Give every rank rank 0's number, so that all decide the same on time; also a barrier."""
        box = torch.tensor([value], dtype=torch.float64)
        if self.control is not None:
            dist.broadcast(box, 0, group=self.control)
        return box.item()

    def header(self, source: Mapping[str, str], warnings: Sequence[str]) -> None:
        """Open the log with the program itself, the machine, versions, kernels and settings."""
        code, cuda = Path(__file__).read_text(encoding="utf-8"), self.device.type == "cuda"
        machine = beside("flops.py", "machine", torch.cuda.get_device_name if cuda else str)(str(self.device))
        self.log.write(code + "=" * 100, echo=False)
        kernels = {"precision": "bf16" if cuda else "fp32", "compile": self.compile, "threads": torch.get_num_threads()}
        kernels |= {"device": str(self.device), "world_size": self.world_size, "python": sys.version.split()[0]}
        kernels |= {"torch": torch.__version__, "sha256": hashlib.sha256(code.encode()).hexdigest()}
        about = {"time": time.strftime("%FT%TZ", time.gmtime()), "command": " ".join(sys.argv), "machine": machine}
        self.log.event("header", **about, **kernels)
        self.log.event("config", table=self.cfg.table(source), values=dataclasses.asdict(self.cfg), source=dict(source))
        for warning in warnings:
            self.log.event("warning", reason=warning)


def atomic_write(path: Path, data: bytes, what: str) -> None:
    """Replace a file as a whole; on failure, a full disk included, the old one stays and UserError says why."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        why = f"was not written ({error.strerror}); the old one, if any, is intact"
        raise UserError(f"{what} {path} of {len(data):,} bytes {why}; free space or set OUT_DIR") from error


# 3  DATA AND BYTES -- shards, the order of training tokens, and exactly how many bytes a token stands for =============
SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER = 20240520, 1, 256  # the challenge's: int32 header, then uint16 tokens
SCAN_TOKENS = 1 << 28  # ids of up to this many tokens are checked before training; all of them are on reading
PREPARE, CPU = "python scripts/prepare_data.py", torch.device("cpu")


class TokenLoader:
    """One endless stream of tokens over all shards of a split, in file order; its state is `position`. Every row has a
    fixed place in it, for any number of ranks. UserError: no or damaged shards, foreign token ids, too few tokens."""

    def __init__(self, cfg: Config, split: str) -> None:
        self.vocab_size, self.position = cfg.vocab_size, 0
        self.paths = sorted(p for p in Path(cfg.data_path).glob(f"*_{split}_*.bin") if p.is_file())
        if not self.paths:
            raise UserError(f"DATA_PATH={cfg.data_path!r} holds no *_{split}_*.bin; name another or: {PREPARE}")
        self.shards = [self.open_shard(path) for path in self.paths]
        self.ends = np.cumsum([len(shard) for shard in self.shards])
        self.total = int(self.ends[-1])
        if self.total <= cfg.train_seq_len:
            held = f"the {self.total:,} {split} tokens of DATA_PATH={cfg.data_path!r}; shorten it or prepare more text"
            raise UserError(f"TRAIN_SEQ_LEN={cfg.train_seq_len} is longer than {held}")
        for i in range(len(self.shards) if self.total <= SCAN_TOKENS else 1):
            self.check(self.shards[i], i)

    @staticmethod
    def open_shard(path: Path) -> np.typing.NDArray[Any]:
        """Map a shard's tokens, (tokens,) uint16, after checking its header and size."""
        header, size = np.fromfile(path, dtype="<i4", count=SHARD_HEADER), path.stat().st_size
        found, rule = [header.size, *header[:2].tolist()], [SHARD_HEADER, SHARD_MAGIC, SHARD_VERSION]
        if found != rule:
            raise UserError(f"{path} is not a token shard: its header is {found}, not {rule}; rebuild it: {PREPARE}")
        count, held = int(header[2]), (size - SHARD_HEADER * 4) / 2
        if count < 1 or held != count:
            raise UserError(f"{path} announces {count:,} tokens but holds {held:,}: truncated; copy or build it again")
        return np.memmap(path, dtype="<u2", mode="r", offset=SHARD_HEADER * 4, shape=(count,))

    def check(self, tokens: np.typing.NDArray[Any], shard: int) -> None:
        if tokens.size and (worst := int(tokens.max())) >= self.vocab_size:
            raise UserError(f"{self.paths[shard]} holds token {worst}; VOCAB_SIZE={self.vocab_size} must be above it")

    def rows(self, start: int, num_rows: int, seq_len: int, device: torch.device = CPU) -> Tensor:
        """Rows of T + 1 tokens that overlap by one, (num_rows, T + 1) int64: inputs are [:, :-1], targets [:, 1:]."""
        parts, count = list[Any](), num_rows * seq_len + 1
        while count:
            start %= self.total
            i = int(np.searchsorted(self.ends, start, side="right"))
            parts.append(self.shards[i][start - int(self.ends[i]) :][:count])  # the place, counted from its end
            self.check(parts[-1], i)
            start, count = start + len(parts[-1]), count - len(parts[-1])
        flat = torch.from_numpy(np.concatenate(parts).astype(np.int64))
        if device.type == "cuda":
            flat = flat.pin_memory().to(device, non_blocking=True)
        return flat.unfold(0, seq_len + 1, seq_len)


class ByteCounter:
    """Count the bytes of text that tokens stand for, as the challenge does: UserError if the tokenizer does not fit. A
    piece counts its UTF-8 bytes, a byte token 1, control, unknown and unused tokens 0; the space that opens a piece,
    unless the tokenizer drops it after such a boundary. On whole documents the sum is len(decode(tokens).encode())."""

    def __init__(self, cfg: Config) -> None:
        path, name = Path(cfg.tokenizer_path), f"TOKENIZER_PATH={cfg.tokenizer_path!r}"
        try:
            self.sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
            self.tokenizer = sp = spm.SentencePieceProcessor(model_file=str(path))
            size = sp.vocab_size()
        except (RuntimeError, OSError) as error:
            raise UserError(f"{name} is no SentencePiece model ({error}); name one or: {PREPARE}") from error
        if size != cfg.vocab_size:
            raise UserError(f"VOCAB_SIZE={cfg.vocab_size} but {name} has {size} pieces; use the one the shards need")
        silent = [sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i) for i in range(size)]
        pieces = ["?" if sp.is_byte(i) else sp.id_to_piece(i).replace("\u2581", " ") for i in range(size)]
        text = ["" if mute else piece for mute, piece in zip(silent, pieces, strict=True)]
        drops = not any(sp.decode([i]).startswith(" ") for i in range(size) if text[i][:1] == " " != text[i][1:2])
        self.base_bytes = torch.tensor([len(t.removeprefix(" ").encode()) for t in text])
        self.opens = torch.tensor([t.startswith(" ") for t in text])
        self.boundary = torch.tensor([s and drops for s in silent])  # none where the tokenizer keeps indentation

    def count(self, prev: Tensor, target: Tensor) -> Tensor:
        """Bytes of each target token given the token before it: any equal shapes, int64, all on the CPU."""
        return self.base_bytes[target] + (self.opens[target] & ~self.boundary[prev])


def bits_per_byte(sum_nats: float, sum_bytes: float) -> float:
    """Turn a sum of nats and a sum of bytes into bits per byte: the only such division in the project."""
    return sum_nats / math.log(2) / sum_bytes


# 4  NOISE, MASKS, LOSSES -- pure functions of tensors; nothing here knows about devices or ranks ======================
MIX1, MIX2, GOLDEN = -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15, -0x61C8864680B583EB  # as signed int64


def derive(keys: Tensor, *parts: int | Tensor) -> Tensor:
    """Make keys of sub-streams, int64 of the broadcast shape, by the finaliser of splitmix64 (Steele et al. 2014)."""
    for part in parts:
        h = (keys + 1) * GOLDEN + part  # products wrap
        h = (h ^ ((h >> 30) & 0x3FFFFFFFF)) * MIX1
        h = (h ^ ((h >> 27) & 0x1FFFFFFFFF)) * MIX2
        keys = h ^ ((h >> 31) & 0x1FFFFFFFF)
    return keys


def uniform(keys: Tensor, count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Draw uniforms in [0, 1) from int64 keys, (...) to (..., count): the same for any batch, world and device."""
    h, bits = derive(keys[..., None], torch.arange(count, device=keys.device)), 53 if dtype == torch.float64 else 24
    return ((h >> (64 - bits)) & ((1 << bits) - 1)).to(dtype) * 2.0**-bits


class Corruption(NamedTuple):
    """Noised windows. `suspect` is what a decoder knows too: tokens that may be wrong and so take the noisy path."""

    xt: Tensor  # (B, W, S) int64; [MASK] is V, one past the vocabulary: an input that is never predicted
    corrupted: Tensor  # (B, W, S) bool, where loss is taken
    suspect: Tensor  # (B, W, S) bool, where time and self-conditioning act
    t: Tensor  # (B, W) float32 in (0, 1]
    noise: Tensor | None = None  # (B, W, S, D) Gaussian noise of embeddings, mode gaussian only


def noise_level(cfg: Config, keys: Tensor, window_index: Tensor, ramp: float) -> Tensor:
    """Choose t of each window, (B, W) float32 in (0, 1]; a share DIFFUSION_FULL_PROB is at 1. The uniform rate steps by
    the golden ratio with `window_index` (B, W), so any run of windows covers [min, max]. `ramp`: place of a fixed t."""
    low, high = cfg.diffusion_min_mask_ratio, cfg.diffusion_max_mask_ratio
    u = (window_index.double() * 0.6180339887498949).frac().float()  # in [0, 1), so t stays above `low`
    if cfg.diffusion_rate == "fixed":
        u = torch.full_like(u, 1 - ramp if cfg.diffusion_progressive else 0.0)
    full = uniform(derive(keys, 1), 1)[..., 0] < cfg.diffusion_full_prob
    return torch.where(full, 1.0, high - (high - low) * u).clamp_min(1e-6)


def region_mask(name: str, t: Tensor, keys: Tensor, size: int, cfg: Config) -> Tensor:
    """Mark the tokens to corrupt in each window, (B, W, S) bool, for one of REGIONS at noise level t (B, W)."""
    i, span = torch.arange(size, device=t.device), min(cfg.diffusion_span_len, size)
    length = (t * size).round().clamp(1, size).long()[..., None]
    if name in ("continuation", "infill"):  # one run, up to the end or with text after it
        start = (uniform(keys, 1) * (size - length)).long() if name == "infill" else size - length
        return (i >= start) & (i < start + length)
    if name == "spans":
        return cast(Tensor, beside("objectives.py", name)(uniform(keys, cfg.diffusion_spans_per_seq), length, i, span))
    return uniform(keys, size) < t[..., None]  # iid


def corrupt(x0: Tensor, t: Tensor, keys: Tensor, cfg: Config) -> Corruption:
    """Corrupt windows of clean tokens (B, W, S) at noise levels t (B, W), with randomness from keys (B, W)."""
    full, corrupted, low = (t >= 1)[..., None], torch.ones_like(x0, dtype=torch.bool), 0.0
    region = uniform(derive(keys, 2), 1)  # (B, W, 1): a region's share of [0, 1) chooses it
    for name, share in cfg.regions():
        marked = full | region_mask(name, t, derive(keys, 3), x0.shape[-1], cfg)
        corrupted, low = torch.where(region >= low, marked, corrupted), low + share
    masked = {"mask": 1.0, "hybrid": cfg.diffusion_hybrid_mask_prob}.get(cfg.diffusion_corruption_mode, 0.0)
    return apply_noise(x0, corrupted, t, derive(keys, 4), cfg, masked)


def apply_noise(x0: Tensor, corrupted: Tensor, t: Tensor, keys: Tensor, cfg: Config, mask_share: float) -> Corruption:
    """Replace the marked tokens by [MASK] (a share `mask_share`) or random tokens; mode gaussian blurs embeddings."""
    mode, size = cfg.diffusion_corruption_mode, x0.shape[-1]
    if mode == "gaussian":  # what should be masked becomes pure noise: no trace of the token
        noise = beside("objectives.py", "gaussian")(uniform(derive(keys, 1), 2 * size * cfg.model_dim), size)
        return Corruption(x0, corrupted, corrupted, torch.ones_like(t) if mask_share else t, noise)
    random_token = (uniform(derive(keys, 2), size) * cfg.vocab_size).long()
    masked = uniform(derive(keys, 3), size) < mask_share  # all or none: arXiv:2107.03006, a share: arXiv:2503.04482
    xt = torch.where(corrupted, torch.where(masked, cfg.vocab_size, random_token), x0)
    # Where any token may be a wrong one, nothing may tell the model which: all of the window is suspect.
    return Corruption(xt, corrupted, corrupted if mode == "mask" else torch.ones_like(corrupted), t)


def may_read(first: Callable[[Tensor], Tensor], size: int, before: int, causal: bool) -> Callable[..., Tensor]:
    """The rule of attention, (batch, head, query, key) to bool, in windows of `size` tokens, each after a clean token,
    that follow `before` keys: w reads keys before its clean token, at `first(w)`, and itself, only back if `causal`."""

    def rule(batch: Any, head: Any, query: Tensor, key: Tensor) -> Tensor:
        window, noisy = query // (size + 1), key - before
        own = (noisy >= 0) & (noisy // (size + 1) == window)
        return (key < first(window)) | (own & (noisy <= query) if causal else own)

    return rule


def window_mask(seq_len: int, size: int, causal: bool, device: torch.device) -> Tensor:
    """Which keys of [clean ; noisy] may each noisy query read? (N, T + N) bool for windows that tile a row: window w
    covers tokens w S + 1 .. w S + S, after the clean token w S."""
    num, rule = seq_len // size * (size + 1), may_read(lambda w: w * size, size, seq_len, causal)
    return rule(0, 0, torch.arange(num, device=device)[:, None], torch.arange(seq_len + num, device=device))


def next_sure(sure: Tensor, positions: Tensor, reach: int) -> tuple[Tensor, Tensor]:
    """Find the next sure token after each token of windows, sure (B, N) bool at positions (N,) or (B, N). Returns where
    it stands in the row and how far away, both (B, N) int64. Distance 0: none within `reach` in the same window, or a
    sure token that is followed by a sure one, where nothing is to be found."""
    i, n = torch.arange(sure.shape[1], device=sure.device), sure.shape[1]
    at_or_after = torch.where(sure, i, n).flip(-1).cummin(-1).values.flip(-1)
    at, places = F.pad(at_or_after[:, 1:], (0, 1), value=n), positions.expand(sure.shape)
    far, found = at - i, at.clamp(max=n - 1)
    together = places.gather(1, found) - places == far  # else another window lies between
    return found, far * (together & (far > sure.long()) & (far <= reach))


def tile(rows: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Cut rows (B, T + 1) into windows: tokens (B, W, S), the clean token before each (B, W, 1), positions (N,)."""
    positions = torch.arange(rows.shape[1], device=rows.device).unfold(0, size + 1, size).flatten()
    return rows[:, 1:].reshape(len(rows), -1, size), rows[:, :-1:size, None], positions


def token_nll(logits: Tensor, x0: Tensor, *_: Any) -> Tensor:
    """Cross-entropy of each token, nats: (..., V) and (...) to (...)."""
    return F.cross_entropy(logits.flatten(0, -2), x0.flatten(), reduction="none").view_as(x0)


# Nats of each token; weight by t (1/t unclipped: negative ELBO); mean by weight, or (False) over all tokens; whether
# tokens that could be wrong but are not carry loss, too. scripts/objectives.py has more.
Loss = tuple[Callable[..., Tensor], Callable[[Tensor, float], Tensor], bool, bool]
LOSSES: dict[str, Loss] = {
    "mean": (token_nll, lambda t, _: torch.ones_like(t), True, False),
    "elbo": (token_nll, lambda t, clip: (1 / t).clamp_max(clip), False, False),  # arXiv:2406.07524, arXiv:2406.04329
}


def losses(logits: Tensor, clean_logits: Tensor, x0: Tensor, noisy: Corruption, cfg: Config) -> Tensor:
    """DIFFUSION_LOSS of windows, nats a token: logits and the clean stream's (B, W, S, V) for x0 (B, W, S) to ()."""
    row = LOSSES.get(cfg.diffusion_loss) or beside("objectives.py", "LOSSES")[cfg.diffusion_loss]
    nats, weigh, as_mean, everywhere = row
    weight = weigh(noisy.t, cfg.diffusion_loss_clip)[..., None] * (noisy.suspect if everywhere else noisy.corrupted)
    total = (nats(logits, x0, clean_logits, noisy) * weight).sum()
    return total / (weight.sum().clamp_min(1e-6) if as_mean else weight.numel())


# 5  MODEL -- one trunk; the clean stream and the noisy windows are two ways through it ================================
KV = tuple[Tensor, Tensor]  # rotated keys and values of a layer, (B, G, tokens, C); last, for pairs: tokens, twice


class Stream(NamedTuple):
    """How tokens pass the trunk."""

    rotary: Tensor  # from `rotary`
    mask: Tensor | None  # which keys a token reads; None: those up to itself
    time: Tensor | None = None  # (B, N, F) features of the noise level, 0 where a token is not suspect; None if F is 0
    slots: Tensor | None = None  # (B, tokens): where keys and values go in buffers; None: they follow `past`
    values: tuple[Tensor, Tensor] | None = None  # shares (2,) of a layer's own values and of the first one's, and those


def take(x: Tensor, rows: Tensor | None = None) -> Tensor:
    """Choose tokens of x (B, N, ...) by index (B, n), to (B, n, ...); None: all."""
    return x if rows is None else x.take_along_dim(rows.view(*rows.shape, *[1] * (x.ndim - 2)), dim=1)


def rms_norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:])


def rotary(positions: Tensor, cfg: Config) -> Tensor:
    """Cosines and sines of rotary position embedding (arXiv:2104.09864): (..., N) to (2, ..., 1, N, C / 2)."""
    pairs = torch.arange(0, cfg.head_dim, 2, device=positions.device).float()
    angle = positions.float()[..., None, :, None] / cfg.rope_scale * cfg.rope_base ** -(pairs / cfg.head_dim)
    return torch.stack((angle.cos(), angle.sin()))


class Attention(nn.Module):
    """Grouped-query attention with QK-norm, a gain per head and rotary positions."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.cfg, dim, kv_dim = cfg, cfg.model_dim, cfg.num_kv_heads * cfg.head_dim
        self.c_q, self.c_k, self.c_v, self.proj = (nn.Linear(dim, n, bias=False) for n in (dim, kv_dim, kv_dim, dim))
        self.q_gain = nn.Parameter(torch.full((cfg.num_heads,), cfg.qk_gain_init))

    def forward(self, x: Tensor, stream: Stream, past: KV | None) -> tuple[Tensor, KV]:
        heads = (*x.shape[:2], -1, self.cfg.head_dim)
        q, k, v = (m(x).view(heads).transpose(1, 2) for m in (self.c_q, self.c_k, self.c_v))
        v = v if stream.values is None else stream.values[0][0] * v + stream.values[0][1] * stream.values[1]
        (cos, sin), pairs = stream.rotary, (rms_norm(x).chunk(2, dim=-1) for x in (q, k))  # norms are fp32
        q, k = (torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), dim=-1) for x1, x2 in pairs)  # (B, H or G, T, C)
        q, k = (q * self.q_gain[:, None, None]).to(v.dtype), k.to(v.dtype)
        own = k, v
        if past is not None and stream.slots is not None:
            index = stream.slots[:, None, :, None].expand_as(k)
            k, v = past[0].scatter_(2, index, k), past[1].scatter_(2, index, v)
        elif past is not None:
            k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
        if q.is_cuda and stream.mask is not None:  # the fused kernel with a dense mask there knows no groups
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        how: dict[str, Any] = {"is_causal": stream.mask is None, "enable_gqa": q.shape[1] != k.shape[1]}
        y = F.scaled_dot_product_attention(q, k, v, stream.mask, **how)
        return self.proj(y.transpose(1, 2).flatten(2)), own


class Block(nn.Module):
    """Residual mix, attention, relu^2 MLP; suspect tokens are also scaled and shifted by the noise level."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        dim, hidden, features = cfg.model_dim, cfg.mlp_mult * cfg.model_dim, cfg.time_embed_dim * cfg.diffusion
        self.attn = Attention(cfg)
        self.fc, self.proj = nn.Linear(dim, hidden, bias=False), nn.Linear(hidden, dim, bias=False)
        self.attn_scale, self.mlp_scale = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.ones(dim))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(dim), torch.zeros(dim))))
        self.time_proj = nn.Parameter(torch.zeros(4 * dim, features)) if features else None

    def forward(self, x: Tensor, emb0: Tensor, stream: Stream, past: KV | None) -> tuple[Tensor, KV]:
        x = self.resid_mix[0] * x + self.resid_mix[1] * emb0
        time, proj = stream.time, self.time_proj
        mods = None if time is None or proj is None else F.linear(time, proj).chunk(4, dim=-1)
        h = rms_norm(x)
        y, kv = self.attn(h if mods is None else h * (1 + mods[0]) + mods[1], stream, past)
        x = x + self.attn_scale * y
        h = rms_norm(x)
        h = F.relu(self.fc(h if mods is None else h * (1 + mods[2]) + mods[3])).square()
        return x + self.mlp_scale * self.proj(h), kv


class Window(NamedTuple):
    """Input of the noisy stream: the clean token before each window, then the window."""

    before: Tensor  # (B, W, 1) int64
    noisy: Corruption
    positions: Tensor  # (N,) or (B, N) true positions in the text
    mask: Tensor  # which keys of past and windows a token reads, (N, keys) or (B, 1, N, keys) bool
    previous: Tensor | None = None  # (B, W, S, D) expected embedding under the last pass; zero where there was none
    slots: Tensor | None = None  # (B, N) scratch places in the buffers of `past`
    only: Tensor | None = None  # (B, n) read these of the N tokens; mask and slots have just their rows


class GPT(nn.Module):
    """The baseline's U-Net Transformer (17,059,912 parameters by default), with a clean and a noisy way through it."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.cfg, self.num_down, dim = cfg, cfg.num_layers // 2, cfg.model_dim
        self.tok_emb = nn.Parameter(torch.empty(cfg.vocab_size, dim))
        self.bigram_emb = nn.Parameter(torch.zeros(cfg.bigram_vocab_size, dim)) if cfg.bigram_vocab_size else None
        self.lm_head = None if cfg.tie_embeddings else nn.Parameter(torch.zeros(cfg.vocab_size, dim))
        self.skip_weights = nn.Parameter(torch.ones(self.num_down, dim))
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.num_layers))
        self.value_mix = nn.Parameter(torch.tensor([[1.0, 0.5]] * (cfg.num_layers - 1))) if cfg.value_residual else None
        self.mask_emb = nn.Parameter(torch.empty(dim)) if cfg.diffusion else None
        ahead = cfg.look_ahead if cfg.diffusion and not cfg.diffusion_causal else 0
        self.ahead_gain = nn.Parameter(torch.ones(ahead, dim)) if ahead else None
        self.ahead_proj = nn.Parameter(torch.zeros(dim, dim)) if ahead else None
        self.self_cond = nn.Parameter(torch.zeros(dim, dim)) if cfg.diffusion and cfg.self_condition == "soft" else None
        shared, extra = (torch.Generator().manual_seed(cfg.seed + offset) for offset in (0, 1 << 32))
        for name, p in self.named_parameters():
            source = extra if name == "mask_emb" else shared  # so that recipes share their start
            if name in ("tok_emb", "mask_emb"):
                nn.init.normal_(p, 0, cfg.tied_embed_init_std if cfg.tie_embeddings else 1.0, generator=source)
            elif name.endswith("proj.weight"):
                nn.init.zeros_(p)
            elif name.endswith(".weight"):  # the rest starts as it is
                nn.init.uniform_(p, -(p.shape[1] ** -0.5), p.shape[1] ** -0.5, generator=source)

    def pairs(self, emb: Tensor, ids: Tensor, at: Tensor, past: Any, slots: Any, *only: Any) -> tuple[Tensor, list[KV]]:
        """Add to embedded tokens (B, N, D), ids (B, N), rows of a hashed table (arXiv:1709.03933): one for each with
        the token before it, none where either is [MASK]. The last pair of a cache tells what stands before a window."""
        if self.bigram_emb is None:
            return emb, []
        places, before = at.expand(ids.shape), F.pad(ids[:, :-1], (1, 0), value=(mask := self.cfg.vocab_size))
        if past is not None:
            known = past[-1][0][:, 0, :, 0]
            known = known if slots is None else known.scatter_(1, slots, take(ids, *only))
            earlier = known.gather(1, (places - 1).clamp(0, known.shape[1] - 1))
            before = torch.where(F.pad(places.diff() == 1, (1, 0)), before, earlier).masked_fill(places == 0, mask)
        row = F.embedding(derive(before, ids) % len(self.bigram_emb), self.bigram_emb)
        return emb + row * ((before < mask) & (ids < mask))[..., None], [(ids[:, None, :, None],) * 2]

    def trunk(self, emb0: Tensor, stream: Stream, past: Sequence[KV] | None) -> tuple[Tensor, list[KV]]:
        """Logits (B, N, V) float32 of embedded tokens (B, N, D), and their keys and values."""
        x, outs, kvs, num = emb0, [], [], self.num_down  # type: ignore[var-annotated]
        for i, block in enumerate(self.blocks):
            if num <= i < 2 * num:
                x = x + self.skip_weights[i - num] * outs[2 * num - 1 - i]
            if self.value_mix is not None and i:
                stream = stream._replace(values=(self.value_mix[i - 1], kvs[0][1]))
            x, kv = block(x, emb0, stream, None if past is None else past[i])
            kvs.append(kv)
            outs.append(x)
        cap, table = self.cfg.logit_softcap, self.tok_emb if self.lm_head is None else self.lm_head
        twice = F.linear(rms_norm(x) * (2 / cap), table).float()
        return torch.rsub(torch.sigmoid(twice), -cap, alpha=-2 * cap), kvs  # cap * tanh(twice / 2), a faster kernel

    def clean(self, ids: Tensor, past: list[KV] | None = None, at: Tensor | None = None) -> tuple[Tensor, list[KV]]:
        """Read tokens (B, T) causally: from the start, or at positions `at` (B, T) after what the buffers `past` hold.
        Returns logits (B, T, V) float32, position i predicting token i + 1, and these tokens' keys and values."""
        positions, mask = torch.arange(ids.shape[1], device=ids.device) if at is None else at, None
        if past is not None:  # a slot is a position; what an earlier draft left behind stands later and is not read
            mask = (torch.arange(past[0][0].shape[2], device=ids.device) <= positions[..., None])[:, None]
        stream = Stream(rotary(positions, self.cfg), mask, slots=at)
        emb, tokens = self.pairs(rms_norm(F.embedding(ids, self.tok_emb)), ids, positions, past, at)
        logits, kvs = self.trunk(emb, stream, past)
        return logits, kvs + tokens

    def next_token(self, rows: Tensor) -> tuple[Tensor, Tensor, list[KV]]:
        """Next-token loss of rows (B, T + 1), nats a token, and logits (B, T, V); softcap and loss compile to one."""
        logits, kvs = self.clean(rows[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()), logits.detach(), kvs

    def window(self, window: Window, past: Sequence[KV] | None) -> Tensor:
        """Denoise windows that may read the clean keys and values `past`; logits (B, W, S, V) for their tokens."""
        (batch, num, size), logits = window.noisy.xt.shape, self.read(window, past)
        return logits.view(batch, num, size + 1, -1).narrow(2, int(not self.cfg.diffusion_shift), size)

    def read(self, window: Window, past: Sequence[KV] | None) -> Tensor:
        """Logits (B, N, V) at every token of windows, the clean one before included, or at those of `only`."""
        assert self.mask_emb is not None, "read() needs a model built with diffusion on"
        cfg, noisy, table = self.cfg, window.noisy, torch.cat((self.tok_emb, self.mask_emb[None]))
        ids = torch.cat((window.before, noisy.xt), dim=-1)
        emb = rms_norm(F.embedding(ids, table))  # (B, W, S + 1, D)
        if noisy.noise is not None:
            emb, ids = beside("objectives.py", "blur")(emb, ids, noisy, cfg.vocab_size)
        gate = F.pad(noisy.suspect, (1, 0))[..., None].to(emb.dtype)  # the clean token before is never suspect
        if self.self_cond is not None and window.previous is not None:
            emb = emb + F.pad(F.linear(window.previous, self.self_cond), (0, 0, 1, 0)) * gate
        half_turns = noisy.t[..., None, None] * torch.arange(cfg.time_embed_dim, device=emb.device)  # the first is 0
        time = torch.cos(math.pi / 2 * half_turns) * gate
        ids, emb, gate, time = (x.flatten(1, 2) for x in (ids, emb, gate, time))
        emb, _ = self.pairs(emb, ids, window.positions, past, window.slots, window.only)
        if self.ahead_gain is not None and self.ahead_proj is not None:
            at, far = next_sure(gate[..., 0] == 0, window.positions, cfg.look_ahead)
            ahead = take(emb, at) * F.embedding(far, F.pad(self.ahead_gain, (0, 0, 1, 0)))  # nothing at distance 0
            emb = emb + F.linear(ahead, self.ahead_proj)
        emb, time, places = (take(x, window.only) for x in (emb, time, window.positions))
        stream = Stream(rotary(places, cfg), window.mask, time=time, slots=window.slots)
        return self.trunk(emb, stream, past)[0]


# 6  OPTIMIZERS AND SCHEDULES -- who trains each parameter, how fast, and when =========================================
# A parameter goes to the first row that takes it: name, test, learning rate. Matrices train by Muon, the rest by Adam.
GROUPS: tuple[tuple[str, Callable[[str, Tensor], bool], Callable[[Config], float]], ...] = (
    ("embed", lambda n, p: n.endswith("_emb"), lambda c: c.tied_embed_lr if c.tie_embeddings else c.embed_lr),
    ("head", lambda n, p: n == "lm_head", lambda c: c.head_lr),
    ("adapter", lambda n, p: n.endswith(("time_proj", "self_cond", "lora_a", "lora_b")), lambda c: c.adapter_lr),
    ("scalar", lambda n, p: p.ndim < 2 or n.endswith(("_mix", "_weights", "_gain")), lambda c: c.scalar_lr),
    ("matrix", lambda n, p: p.ndim == 2, lambda c: c.matrix_lr),
)


def assign_groups(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Give every parameter to exactly one row of GROUPS; ValueError if none takes it (it would never train)."""
    groups: dict[str, list[nn.Parameter]] = {name: [] for name, _, _ in GROUPS}
    for name, p in ((name, p) for name, p in model.named_parameters() if p.requires_grad):
        taker = next((group for group, takes, _ in GROUPS if takes(name, p)), None)
        if taker is None:
            raise ValueError(f"no optimizer group takes {name} {tuple(p.shape)}; add a row to GROUPS")
        groups[taker].append(p)
    return groups


def orthogonalize(g: Tensor, steps: int) -> Tensor:
    """Move singular values of (n, rows, cols) towards 1 by quintic Newton-Schulz; bf16 on CUDA, fp32 on CPU."""
    a, b, c = 3.4445, -4.7750, 2.0315  # Jordan et al. 2024, kellerjordan.github.io/posts/muon
    x: Tensor = g.bfloat16() if g.is_cuda else g
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    x = x.mT if (flipped := x.shape[-2] > x.shape[-1]) else x
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT.to(g.dtype) if flipped else x.to(g.dtype)


@torch.no_grad()
def muon_step(params: Sequence[Tensor], buffers: Sequence[Tensor], lr: float, momentum: float, cfg: Config) -> None:
    """Nesterov momentum kept in `buffers`, then an orthogonal update; matrices of one shape go together."""
    live = [(p, p.grad, v) for p, v in zip(params, buffers, strict=True) if p.grad is not None]
    for shape in dict.fromkeys(p.shape for p, _, _ in live):
        group, grads, velocity = zip(*(m for m in live if m[0].shape == shape), strict=True)
        torch._foreach_mul_(velocity, momentum)
        torch._foreach_add_(velocity, grads)
        nesterov = torch.stack(torch._foreach_add(grads, velocity, alpha=momentum))  # (n, rows, cols)
        torch._foreach_mul_(group, 1 - lr * cfg.muon_weight_decay)
        updates = orthogonalize(nesterov, cfg.muon_backend_steps).unbind()
        torch._foreach_add_(group, updates, alpha=-lr * max(1.0, shape[0] / shape[1]) ** 0.5)


class Moment(NamedTuple):
    """Where in a run a step is, as every rank agrees: share done, and learning-rate factor."""

    step: int
    progress: float
    rate: float

    @classmethod
    def at(cls, cfg: Config, step: int, seconds: float) -> Moment:
        """Take as the run's length the fewer of ITERATIONS and what fits the wall clock at the pace so far. The rate
        falls linearly to 0 over the last WARMDOWN_ITERS steps, or WARMDOWN_FRAC of the run if that is less."""
        left = float(max(cfg.iterations - step, 0))
        if cfg.max_wallclock_seconds > 0 and step > 0:
            left = min(left, max(cfg.max_wallclock_seconds - seconds, 0) * step / max(seconds, 1e-9))
        warmdown = min(cfg.warmdown_iters, cfg.warmdown_frac * (step + left))
        return cls(step, step / max(step + left, 1), min(left / warmdown, 1.0) if warmdown > 0 else 1.0)


# 7  EVALUATION AND DECODING -- exact score, diffusion bound, one decode loop ==========================================
@torch.no_grad()
def score(model: GPT, ids: Tensor) -> Tensor:
    """Nats of every token but the first given all before it: exact, (B, T) int64 to (B, T - 1) float32."""
    return token_nll(model.clean(ids[:, :-1])[0], ids[:, 1:])


@torch.no_grad()
def window_bounds(model: GPT, rows: Tensor, keys: Tensor, size: int, samples: int, mask: Tensor) -> Tensor:
    """Sample upper bounds of the windows' negative log-likelihood, nats: (K, B, W) float64 for rows (B, T + 1), keys
    (B, W). The chain rule in a random order of a window's S tokens: for m = S .. 1 still masked, the nats of the next.
    With m uniform, stratified over samples, S / m * (sum of masked nats) is unbiased for an upper bound (Jensen, over
    orders) from all t = m / S, exact at S = 1. Windows chain left to right. arXiv:1310.1757, arXiv:2110.02037."""
    (x0, before, positions), past = tile(rows, size), model.clean(rows[:, :-1])[1]
    start, estimates = uniform(derive(keys, 1), 1)[..., 0], []
    for k in range(samples):
        m = (((start + k / samples) % 1.0) * size).long().clamp(max=size - 1) + 1  # (B, W)
        order = uniform(derive(keys, 2, k), size).argsort(dim=-1).argsort(dim=-1)
        noisy = apply_noise(x0, order < m[..., None], m.float() / size, derive(keys, 3, k), model.cfg, 1.0)
        nll = token_nll(model.window(Window(before, noisy, positions, mask), past), x0).double()
        estimates.append((nll * noisy.corrupted).sum(-1) * size / m)
    return torch.stack(estimates)


def evaluate_bpb(
    model: GPT, run: Run, val: TokenLoader, counter: ByteCounter, size: int = 0, stride: int = 0
) -> dict[str, Any]:
    """Score validation rows of T tokens: size 0 exactly (all rows; with a stride they overlap, and all but the first
    score their last `stride` tokens), size S by the bound over windows of S (NELBO_SEQUENCES rows, evenly apart). Ranks
    share them. Returns loss (nats a token), bpb, its standard error (0 where exact: sizes 0, 1), K, tokens, bytes."""
    cfg, T, step = run.cfg, run.cfg.train_seq_len, min(stride or 1 << 30, run.cfg.train_seq_len)
    total = (val.total - 1 - T) // step + 1
    num_rows = min(cfg.nelbo_sequences or total, total) if size else total
    mine = torch.arange(num_rows)[run.rank :: run.world_size] * total // num_rows
    at_once, K = max(cfg.val_batch_size // (T * run.world_size), 1), cfg.nelbo_samples if size > 1 else 1
    mask = window_mask(T, size, cfg.diffusion_causal, run.device) if size else None
    sums = torch.zeros(4, dtype=torch.float64, device=run.device)
    for index in tqdm(torch.split(mine, at_once)[: len(mine)], "eval", leave=False, disable=run.rank > 0 or None):
        rows = torch.cat([val.rows(j * step, 1, T) for j in index.tolist()])
        scored = (index[:, None] == 0) | (torch.arange(T) >= T - step)  # (B, T)
        num_bytes = (counter.count(rows[:, :-1], rows[:, 1:]) * scored).sum().to(sums)
        count, rows, scored = int(scored.sum()), rows.to(run.device), scored.to(run.device)
        keys = derive(index[:, None], cfg.eval_seed, torch.arange(T // (size or T))).to(run.device)
        with run.autocast():
            nats = score(model, rows)[None] if mask is None else window_bounds(model, rows, keys, size, K, mask)
        nats = (nats.double() if size else nats.double() * scored).sum(-1)  # (K, B)
        variance = nats.var(dim=0).sum() / K if K > 1 else sums.new_zeros(())
        sums += torch.stack([nats.mean(0).sum(), variance, sums.new_tensor(count), num_bytes])
    mean, spread, tokens, num = run.sum(sums).tolist()
    values = {"loss": mean / tokens, "bpb": bits_per_byte(mean, num), "standard_error": bits_per_byte(spread**0.5, num)}
    return values | {"samples": K, "tokens": int(tokens), "bytes": int(num), "stride": step}


class Decoding(NamedTuple):
    """How to decode; the defaults fill the whole span as one window, greedily (`refine`). AR is window 0."""

    window: int = 1 << 30  # tokens proposed together; 0: none, one token a cycle from the clean stream
    steps: int = 8  # most denoising passes a window
    threshold: float = math.inf  # tokens at least this probable are committed sooner
    draft: str = ""  # windows only repair what `redo` names, of a span that `ar` has written, or that was `given`
    reuse: bool = False  # window tokens that have not changed keep their keys and values: faster, approximate
    redo: float = 0.0  # tokens less probable than this to the clean stream are masked and filled in again, once
    verify: bool = False  # keep only what the clean stream itself would choose: exactly AR's output
    propose: Callable[..., tuple[Tensor, Tensor]] | None = None  # verify: also try what this finds: look_up, policy.py
    longest: int = 16  # verify: most tokens proposed at once
    temperature: float = 0.0  # 0: greedy
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    seed: int = 0
    end: int = -1  # a row stops at this token and repeats it to its end; -1: none
    watch: Callable[..., None] | None = None  # gets of a pass: places, tokens, log-probabilities, still open: (B, n)


AR, REFINE = Decoding(window=0), Decoding()  # more, by name: MODES of scripts/policy.py


def pick(logits: Tensor, how: Decoding, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Choose tokens (B, n) from logits (B, n, V) with randomness from keys (B, n); also their log-probabilities."""
    if how.temperature <= 0:
        best = logits.max(dim=-1)
        return best.indices, (best.values - logits.logsumexp(-1)).double()
    log_p, V = logits.double().log_softmax(-1), logits.shape[-1]
    scores = log_p / how.temperature
    if how.top_k or how.top_p < 1:
        ranked, order = scores.sort(dim=-1, descending=True)
        before = ranked.softmax(-1).cumsum(-1) - ranked.softmax(-1)  # a token stays if those before it leave room
        out = (before >= how.top_p) | (torch.arange(V, device=logits.device) >= (how.top_k or V))
        scores = scores.masked_fill(torch.zeros_like(out).scatter(-1, order, out), -math.inf)
    u = uniform(keys, V, torch.float64).clamp(1e-300, 1 - 1e-16)  # Gumbel noise in fp32 would cut the tail off
    tokens = (scores - torch.log(-torch.log(u))).argmax(-1)
    return tokens, log_p.gather(-1, tokens[..., None])[..., 0]


class Decoded(NamedTuple):
    ids: Tensor  # (B, L)
    forwards: Tensor  # (B, 1) passes until each row was done, not counting the one over the prompt


class Decoder(NamedTuple):
    """What stays the same while rows are decoded, and the two ways to take a pass."""

    model: GPT
    how: Decoding
    past: list[KV]  # static: a token's place is its position, and the last places are scratch of windows
    keys: Tensor  # (B, 1) randomness of each row

    def denoise(
        self, clean: Tensor, at: Tensor, ids: Tensor, hole: Tensor, first: Tensor, salt: int = 0, **fed: Any
    ) -> tuple[Tensor, Tensor]:
        """Take one pass over clean tokens (B, n) at positions `at`, which enter the cache, and over windows ids (B, W,
        S + 1), each after its clean token at position `first` (B, W), with holes (B, W, S) bool to be found. Returns
        logits of the tokens after the clean ones, (B, n, V), and of the windows' own, (B, W, S, V). `fed`: fields of
        Window, `previous` and `only`, (B, m) of these tokens; others keep keys and values of an earlier pass, get 0."""
        cfg, size, num, length = self.model.cfg, hole.shape[2], clean.shape[1], self.past[0][0].shape[2]
        index, slot = (torch.arange(n, device=ids.device) for n in (hole.shape[1] * (size + 1), length))
        rule = may_read(lambda w: first[:, w], size, length - len(index), cfg.diffusion_causal)
        mask = torch.cat((slot <= at[..., None], rule(0, 0, index[:, None], slot)), dim=1)
        positions = torch.cat((at, first.repeat_interleave(size + 1, dim=1) + index % (size + 1)), dim=1)
        places = torch.cat((at, (length - len(index) + index).expand(len(ids), -1)), dim=1)
        tokens, inside = torch.cat((clean, ids.flatten(1)), dim=1)[:, None], F.pad(index % (size + 1) > 0, (num, 0))[1:]
        hole = F.pad(F.pad(hole, (1, 0)).flatten(1), (num, 0))[:, None, 1:]
        t, blank = (hole.sum(-1) / inside.sum()).clamp_min(1e-6), float(cfg.diffusion_corruption_mode != "uniform")
        noisy = apply_noise(tokens[..., 1:], hole, t, derive(self.keys, first[:, :1], salt), cfg, blank)
        noisy = noisy._replace(suspect=noisy.suspect & inside)  # never clean tokens, nor the ones before windows
        only = fed.get("only")
        mask, places = take(mask, only)[:, None], take(places, only)
        logits = self.model.read(Window(tokens[..., :1], noisy, positions, mask, slots=places, **fed), self.past)
        if only is not None:
            whole = logits.new_zeros(len(ids), tokens.shape[2], logits.shape[2])
            logits = whole.scatter(1, only[..., None].expand_as(logits), logits)
        return logits[:, :num], logits[:, num:].view(*ids.shape, -1).narrow(2, int(not cfg.diffusion_shift), size)

    def refine(self, ids: Tensor, hole: Tensor, shown: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
        """Fill the holes of one window a row, the most confident first, in at most `how.steps` passes: ids (B, 1 + S),
        clean token, at `first` (B, 1), and window; hole (B, S) bool; shown (B, n), text after. Returns the tokens and
        the passes that each row took (B, 1)."""
        how, size, none, fed = self.how, hole.shape[1], ids[:, :0], dict[str, Tensor | None]()
        x, hole = torch.cat((ids, shown), dim=1), F.pad(hole, (0, shown.shape[1]))
        total, passes, used = hole.sum(1, keepdim=True), torch.zeros_like(first), 0
        places = first + torch.arange(1, x.shape[1], device=ids.device)
        while bool(hole.any()):
            passes = passes + hole.any(1, keepdim=True)
            logits = self.denoise(none, none, x[:, None], hole[:, None], first, used, **fed)[1]
            token, log_p = pick(logits[:, 0], how, derive(self.keys, places))
            x[:, 1:], used = torch.where(hole, token, x[:, 1:]), used + 1
            rank = log_p.masked_fill(~hole, math.inf).argsort(dim=-1).argsort(dim=-1)
            before = hole
            hole = hole & (rank < total - -(-total * used // total.clamp(1, how.steps))) & (log_p.exp() < how.threshold)
            if how.reuse:  # tokens that were filled in, and those at whose place the next token is predicted
                due = F.pad(before, (1, 0)) | F.pad(hole, (0, 1))
                due |= F.pad(before, (2, 0))[:, :-1] & (self.model.bigram_emb is not None)  # now in another pair
                order, count = due.int().argsort(dim=1, descending=True), due.sum(1, keepdim=True)
                fed["only"] = order.gather(1, torch.arange(int(count.max())).to(order) % count.clamp(1))  # a row's own
            if self.model.cfg.self_condition == "soft":
                fed["previous"] = beside("objectives.py", "expected_embedding")(self.model, logits)
            if how.watch:
                how.watch(places, x[:, 1:], log_p, hole)
        return x[:, 1 : size + 1], passes

    def check(self, x: Tensor, at: Tensor, ahead: int) -> tuple[Tensor, Tensor, Tensor]:
        """Read the last token that stands and proposals after it, at positions `at` (B, 1 + n), with the clean stream.
        The same pass drafts `ahead` tokens for each number of proposals that may stand (TiDAR, arXiv:2511.08923).
        Returns x (B, L) with the clean stream's choice, how many proposals equal it (B, 1), and drafts for after it."""
        ids, ends = x.gather(1, at), at[:, : min(ahead, at.shape[1] - 1) + 1]
        if ahead:  # a window after each end, a token longer: its first will be the clean stream's own choice
            windows = F.pad(x.gather(1, ends)[..., None], (0, ahead + 1))
            hole = torch.ones_like(windows[..., 1:], dtype=torch.bool)
            logits, guess = self.denoise(ids, at, windows, hole, ends)
        else:
            logits = self.model.clean(ids, self.past, at)[0]
            guess = logits[:, None, :1]
        target, log_p = pick(logits, self.how, derive(self.keys, at + 1))
        agreed = (target[:, :-1] == ids[:, 1:]).cumprod(1).sum(1, keepdim=True)
        if self.how.watch:
            self.how.watch(at + 1, target, log_p, at > at[:, :1] + agreed)
        guess = guess[torch.arange(len(x)), agreed[:, 0].clamp(max=guess.shape[1] - 1), 1:]
        places = at[:, :1] + agreed + 2 + torch.arange(ahead, device=x.device)
        return x.scatter(1, at + 1, target), agreed, pick(guess, self.how, derive(self.keys, places))[0]


@torch.no_grad()
def decode(model: GPT, ids: Tensor, start: int, stop: int, how: Decoding = AR) -> Decoded:
    """Fill tokens [start, stop) of rows (B, L): the one decode loop. A cycle proposes a window of tokens and reads it
    once with the clean stream, which keeps its keys and values. With `verify` a row keeps what the clean stream would
    have chosen and its next token: AR's output for any sampling, as noise depends on row and position only. Else it
    keeps all, and the last window reads the text after `stop`. UserError: span outside the rows, or no denoiser."""
    if not 1 <= start <= stop <= ids.shape[1]:
        raise UserError(f"span {start}..{stop} must lie in 1..{ids.shape[1]}: a token (BOS will do) comes before it")
    if how.window > 0 and model.mask_emb is None:
        rule = "decode it with mode ar, which reads no text after the span"
        raise UserError(f"this model has no trained denoiser (DIFFUSION_LOSS_WEIGHT=0); {rule}")
    verify, used = how.verify or how.window == 0, torch.zeros_like(ids[:, :1])
    window = min(how.window, stop - start, how.longest if verify else stop)
    if how.draft == "ar":
        ids, used = decode(model, ids, start, stop, how._replace(window=0, draft=""))
    longest = max(window, how.longest if verify and how.propose else 0)
    x, suffix, column = F.pad(ids[:, :stop], (0, longest + 1)), ids[:, stop:], torch.arange(stop + longest + 1).to(ids)
    room = len(column) - start + ((window + 1) * (window + 2) if verify else window + 1 + suffix.shape[1])
    past = [(F.pad(k, (0, 0, 0, room)), F.pad(v, (0, 0, 0, room))) for k, v in model.clean(ids[:, :start])[1]]
    run = Decoder(model, how, past, derive(torch.arange(len(ids)).to(ids)[:, None], how.seed))
    done, drafts = torch.full_like(used, start), x[:, :0]  # tokens that stand, a row; the last pass's proposals
    trust, reach = 0.6, 4  # tokens that a window and `propose` may try: about twice what was right of late
    while len(ids) and (fewest := int(done.min())) < stop:
        busy, passes, size = done < stop, torch.ones_like(done), min(window, stop - fewest)
        if verify:
            found, hit = how.propose(x, done, longest) if how.propose else (x, torch.zeros_like(busy))
            ours, width = busy & ~hit, drafts.shape[1]  # rows whose proposals are a window's
            if how.propose and bool((hit & busy).any()):
                drafts = torch.where(hit, found, F.pad(drafts, (0, longest - width)))[:, : max(reach, width)]
            at = done - 1 + column[: drafts.shape[1] + 1]
            ahead = min(round(trust) or int(x.is_cuda), window) if bool(ours.any()) else 0
            x, agreed, drafts = run.check(x.scatter(1, at[:, 1:], drafts), at, ahead)
            if width and bool(ours.any()):
                trust = 0.75 * trust + 0.5 * agreed[ours].double().mean().item()
            done, reach = done + agreed + 1, min(int(2 * agreed[busy].double().mean()) + 1, longest)
        else:
            at, shown = done - 1 + column[: size + 1], suffix[:, : 0 if fewest + size < stop else None]
            hole, passes = torch.full_like(at[:, 1:], not how.draft, dtype=torch.bool), torch.zeros_like(done)
            for last in (False, True) if how.redo else (True,):
                if last or not how.draft:
                    found, count = run.refine(x.gather(1, at), hole, shown, at[:, :1])
                    x, passes = x.scatter(1, at[:, 1:], found), passes + count
                if not last or fewest + size < stop:  # nobody reads the last window of all
                    logits, passes = model.clean(x.gather(1, at), past, at)[0], passes + 1
                    hole = token_nll(logits[:, :-1], x.gather(1, at[:, 1:])) > -math.log(how.redo or 1.0)
            done = done + size
        if how.end >= 0:
            over = ((x == how.end) & (column >= start) & (column < done)).cumsum(1) > 0
            x, done = torch.where(over, how.end, x), torch.where(over.any(1, keepdim=True), stop, done)
        done, used = done.clamp(max=stop), used + busy * passes
    return Decoded(torch.cat((x[:, :stop], suffix), dim=1), used)


def generate(model: GPT, prompt: Tensor, count: int, how: Decoding = AR) -> Decoded:
    """Continue prompts (B, P) by `count` tokens."""
    return decode(model, F.pad(prompt, (0, count)), prompt.shape[1], prompt.shape[1] + count, how)


def infill(model: GPT, prefix: Tensor, suffix: Tensor, count: int, how: Decoding = REFINE) -> Decoded:
    """Fill `count` tokens between prefixes (B, P) and suffixes (B, Q), reading both."""
    ids = torch.cat((F.pad(prefix, (0, count)), suffix), dim=1)
    return decode(model, ids, prefix.shape[1], prefix.shape[1] + count, how)


def evaluate_parallel(model: GPT, run: Run, val: TokenLoader) -> None:
    """Decode spans of validation text by the predecessor's protocol (greedy; 16 examples, prefix 128, span 64, suffix
    64) in N passes, and left to right with a cache. Speeds: median of 3 after a warm-up, device synchronised."""
    cfg, start, count = run.cfg, run.cfg.parallel_eval_prefix_len, run.cfg.parallel_eval_examples
    passes = [int(n) for n, _ in parse_shares(cfg.parallel_eval_steps)] if model.mask_emb is not None else []
    for span in [int(n) for n, _ in parse_shares(cfg.parallel_eval_span_len)]:
        stop, need = start + span, start + span + cfg.parallel_eval_suffix_len
        rows = torch.cat([val.rows(i * (val.total - need) // count, 1, need - 1, run.device) for i in range(count)])
        jobs = [(task, n) for task in ("continuation", "infill") for n in passes if n <= span]
        for task, steps in [("continuation", 0), *jobs]:
            ids, seconds = rows if task == "infill" else rows[:, :stop], []
            for _ in range(4):
                began = run.clock()
                with run.autocast():
                    out = decode(model, ids, start, stop, Decoding(steps=steps) if steps else AR)
                seconds.append(run.clock() - began)
            right = (out.ids[:, start:stop] == rows[:, start:stop]).float()
            about = {"task": task, "steps": steps or span, "span": span, "mode": "refine" if steps else "ar_cached"}
            found = {"token_acc": right.mean().item(), "exact_seq": right.amin(-1).mean().item()}
            speed = {"tok_per_sec": right.numel() / sorted(seconds[1:])[1], "forwards": int(out.forwards.max())}
            run.log.event("parallel_eval", **about, **found, **speed, tokens=right.numel())


# 8  ARTIFACT -- integer rows and fp16 rest, compressed, its own settings inside; size = code + model ==================
SIZE_LIMIT = 16_000_000  # bytes of code + model the challenge allows
ARTIFACT_FORMAT = "text-diffusion-int8-zlib-2"
KEEP_FLOAT_NUMEL = 65_536  # tensors of up to this many numbers stay fp16, as the predecessor's
# Largest integers of matrices (the first that fits is taken), that of tokens and head (0: the same), compression.
SCHEMES: dict[str, tuple[tuple[int, ...], int, Callable[[bytes], bytes]]] = {
    "int8+zlib": ((127, 111, 95, 79, 63), 0, functools.partial(zlib.compress, level=9)),
    "int6+lzma": ((31, 27, 23, 19, 15), 127, functools.partial(lzma.compress, preset=9 | lzma.PRESET_EXTREME)),
}


def quantize_rows(w: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Round rows of (rows, cols) to integers in [-levels, levels] times fp16 scales (rows,), without a floor."""
    scale = (w.float().abs().amax(dim=1) / levels).clamp(2.0**-24, 65504.0).half()
    return (w.float() / scale.float()[:, None]).round().clamp(-levels, levels).to(torch.int8), scale


def pack(weights: Mapping[str, Tensor], cfg: Config, tokenizer_sha256: str, levels: int) -> bytes:
    tensors, scales, buffer, (_, embedding, compress) = {}, {}, io.BytesIO(), SCHEMES[cfg.export_scheme]
    for name, w in weights.items():
        tensors[name] = w.detach().cpu().half()
        if w.ndim == 2 and w.numel() > KEEP_FLOAT_NUMEL:
            most = embedding if embedding and name in ("tok_emb", "lm_head") else levels
            tensors[name], scales[name] = quantize_rows(w.detach().cpu(), most)
    about = {"format": ARTIFACT_FORMAT, "config": dataclasses.asdict(cfg), "tokenizer_sha256": tokenizer_sha256}
    torch.save(about | {"tensors": tensors, "scales": scales}, buffer)
    return compress(buffer.getvalue())


def save_artifact(path: Path, weights: Mapping[str, Tensor], cfg: Config, tokenizer_sha256: str, log: Log) -> None:
    """Write the artifact with the finest levels that fit the limit, atomically; UserError: none fits, or disk full."""
    code, scheme = Path(__file__).stat().st_size, cfg.export_scheme
    for levels in SCHEMES[scheme][0]:
        data = pack(weights, cfg, tokenizer_sha256, levels)
        if (total := code + len(data)) <= SIZE_LIMIT:
            break
    atomic_write(path, data, "artifact")
    sizes = {"total_bytes": total, "code_bytes": code, "model_bytes": len(data), "limit_bytes": SIZE_LIMIT}
    log.event("size", scheme=scheme, levels=levels, **sizes)
    if total > SIZE_LIMIT:
        parts = f"code {code:,} + model {len(data):,} bytes ({scheme}, levels {levels})"
        remedy = "RESUME=auto EXPORT_SCHEME=int6+lzma (the checkpoint is kept), or cut NUM_LAYERS or BIGRAM_VOCAB_SIZE"
        raise UserError(f"submission of {total:,} bytes exceeds {SIZE_LIMIT:,}: {parts}; {remedy}")


def load_artifact(path: Path, device: torch.device) -> tuple[GPT, str]:
    """Rebuild a model (settings: model.cfg) and its tokenizer's sha256, running no code of the file; else UserError."""
    try:
        data = path.read_bytes()
        unpacker = lzma.LZMADecompressor() if data.startswith(b"\xfd7zXZ") else zlib.decompressobj()
        raw = unpacker.decompress(data, 1 << 31)  # more than any needs
        payload = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True) if unpacker.eof else None
        if payload is None or payload["format"] != ARTIFACT_FORMAT:
            raise UserError("truncated" if payload is None else f"its format is not {ARTIFACT_FORMAT!r}")
        weights = {name: w.float() for name, w in payload["tensors"].items()}
        weights |= {name: weights[name] * scale.float()[:, None] for name, scale in payload["scales"].items()}
        model = GPT(Config(**payload["config"]))
        model.load_state_dict(weights, strict=True)
        return model.to(device).eval(), str(payload["tokenizer_sha256"])
    except Exception as error:  # zlib, zipfile, pickle and torch each fail in their own ways on foreign bytes
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise UserError(f"artifact {path} is missing, damaged or not ours ({why}); copy or export it again") from error


# 9  TRAINING -- one loop for every recipe; all that changes is in TrainState ==========================================
class TrainState:
    """All that a step changes; what a checkpoint holds."""

    def __init__(self, cfg: Config, run: Run, loader: TokenLoader, model: GPT | None = None) -> None:
        self.cfg, self.run, self.loader, self.step, self.seconds, self.operations = cfg, run, loader, 0, 0.0, 0.0
        self.count_operations = beside("flops.py", "per_token", lambda *_: math.nan)
        self.model = (model or GPT(cfg)).to(run.device)
        groups, rates = assign_groups(self.model), {name: rate(cfg) for name, _, rate in GROUPS}
        adam = [dict(params=p, lr=0.0, base_lr=rates[name]) for name, p in groups.items() if p and name != "matrix"]
        self.adam = torch.optim.Adam(adam, betas=(cfg.beta1, cfg.beta2), eps=cfg.adam_eps, fused=True)
        self.matrices, self.momenta = groups["matrix"], [torch.zeros_like(p) for p in groups["matrix"]]
        self.ema = [p.detach().clone() for p in self.model.parameters()] if cfg.ema_decay else []
        counts = {name: sum(p.numel() for p in params) for name, params in groups.items()}
        run.log.event("model", model_params=sum(counts.values()), **counts)

    def update(self, now: Moment) -> None:
        """Apply the gradients and forget them; average the weights if EMA_DECAY says so."""
        cfg, params = self.cfg, list(self.model.parameters())
        if cfg.grad_clip_norm > 0:
            torch.nn.utils.clip_grad_norm_(params, cfg.grad_clip_norm)
        warm = min(now.step / max(cfg.muon_momentum_warmup_steps, 1), 1.0)
        for group in self.adam.param_groups:
            group["lr"] = group["base_lr"] * now.rate
        momentum = (1 - warm) * cfg.muon_momentum_warmup_start + warm * cfg.muon_momentum
        muon_step(self.matrices, self.momenta, cfg.matrix_lr * now.rate, momentum, cfg)
        self.adam.step()
        self.model.zero_grad(set_to_none=True)
        if self.ema:  # early averages forget the initial weights
            decay = min(cfg.ema_decay, (1 + now.step) / (10 + now.step))
            torch._foreach_lerp_(self.ema, [p.detach() for p in params], 1 - decay)
        self.step += 1

    def weights(self) -> dict[str, Tensor]:
        return dict(zip(dict(self.model.named_parameters()), self.ema or self.model.parameters(), strict=True))

    def log(self, event: str, values: dict[str, float]) -> None:
        tokens, ms = self.cfg.train_batch_tokens * self.step, max(self.seconds, 1e-9) * 1e3
        pace = {"train_ms": ms, "step_ms": ms / max(self.step, 1), "tok_per_sec": tokens / ms * 1e3}
        pace["mfu"] = self.operations / ms * 1e3 / beside("flops.py", "peak", lambda _: math.nan)(str(self.run.device))
        self.run.log.event(event, step=self.step, iterations=self.cfg.iterations, **values, **pace)

    def save(self) -> None:
        """Write the checkpoint atomically (rank 0); a failure is logged and the run goes on with the older one."""
        path = self.cfg.path("checkpoints", ".pt")
        if not math.isfinite(torch.stack([p.detach().sum() for p in self.model.parameters()]).sum().item()):
            raise UserError(f"weights are not finite at step {self.step}; lower MATRIX_LR; last good: {path}")
        if self.run.rank == 0:
            buffer, states = io.BytesIO(), {"model": self.model.state_dict(), "adam": self.adam.state_dict()}
            kept = {"momenta": self.momenta, "ema": self.ema, "config": dataclasses.asdict(self.cfg), "step": self.step}
            kept |= {"seconds": self.seconds, "operations": self.operations, "position": self.loader.position}
            torch.save(states | kept, buffer)
            try:
                atomic_write(path, buffer.getvalue(), "checkpoint")
            except UserError as error:
                self.run.log.event("warning", reason=str(error))

    def resume(self, tokenizer_sha256: str = "") -> None:
        """Continue from the checkpoint if RESUME=auto; UserError: damaged, or other training settings (named)."""
        path, run = self.cfg.path("checkpoints", ".pt"), self.run
        if self.cfg.resume != "auto" or not path.exists():
            if self.cfg.init_from:
                beside("start_from.py", "adopt")(self, tokenizer_sha256, load_artifact, UserError)
            return
        try:
            saved = torch.load(path, map_location=run.device, weights_only=True)
            old, new = saved["config"], self.cfg.training_settings()
        except Exception as error:  # torch raises many kinds on damaged files
            raise UserError(f"checkpoint {path} is damaged ({error}); move it away to start afresh") from error
        if changed := [f"{k.upper()} {old.get(k)!r} -> {new[k]!r}" for k in new if old.get(k) != new[k]]:
            raise UserError(f"RESUME: {path} has other settings: {'; '.join(changed)}; restore them, or change RUN_ID")
        self.model.load_state_dict(saved["model"])
        self.adam.load_state_dict(saved["adam"])
        self.momenta, self.ema = saved["momenta"], saved["ema"]
        self.step, self.seconds, self.operations = saved["step"], saved["seconds"], saved.get("operations", math.nan)
        self.loader.position = saved["position"]
        run.log.event("resume", checkpoint=str(path), step=self.step, train_seconds=self.seconds)


class Objective:
    """Loss of one part of a batch: next-token loss of the clean stream plus the windows' loss."""

    def __init__(self, cfg: Config, run: Run, model: GPT) -> None:
        self.cfg, self.model, self.next_token, self.window = cfg, model, model.next_token, model.window
        alone = cfg.diffusion_passes == 1 and cfg.self_condition == "none"  # else a pass reads what the last predicted
        self.unroll = None if alone else beside("objectives.py", "unroll")
        if run.compile:  # one graph a stream, window size and gradient mode
            torch._dynamo.config.recompile_limit = 64
            self.next_token = torch.compile(model.next_token, dynamic=False, fullgraph=True)
            self.window = torch.compile(model.window, dynamic=False, fullgraph=True)
        sizes, how = cfg.sizes(cfg.diffusion_windows) if cfg.diffusion else [], (cfg.diffusion_causal, run.device)
        self.masks = {size: window_mask(cfg.train_seq_len, size, *how) for size, _ in sizes}

    def __call__(self, rows: Tensor, part: int, size: int, now: Moment) -> tuple[Tensor, Tensor]:
        """Take part `part` of a batch, rows (B, T + 1), and windows of `size`, 0: none; return loss and what to log."""
        cfg, (ar_loss, clean_logits, kvs) = self.cfg, self.next_token(rows)
        if not size:
            return ar_loss, torch.stack((ar_loss.detach(), torch.zeros_like(ar_loss)))
        count = max(round(len(rows) * cfg.diffusion_row_frac), 1)
        (x0, before, positions), mask = tile(rows[:count], size), self.masks[size]
        row = part * len(rows) + torch.arange(count, device=rows.device)[:, None]  # (B, 1), place in the global batch
        windows = torch.arange(x0.shape[1], device=rows.device)
        keys = derive(row, cfg.seed, now.step, windows)
        window_index = random.Random(f"t {cfg.seed} {now.step}").randrange(1 << 30) + row * len(windows) + windows
        ramp = now.progress if cfg.diffusion_ramp == "run" else now.step / cfg.iterations
        noisy = corrupt(x0, noise_level(cfg, keys, window_index, ramp), keys, cfg)
        clean_logits, past = clean_logits[:count].view(*x0.shape, -1), [(k[:count], v[:count]) for k, v in kvs]
        if now.progress < (frac := cfg.diffusion_anneal_frac):
            mask = beside("objectives.py", "anneal")(mask, now.progress / frac, cfg.seed, now.step, size)
        window = Window(before, noisy, positions, mask)
        found = self.unroll(self, window, past, keys, uniform, derive) if self.unroll else [self.window(window, past)]
        loss = torch.stack([losses(logits, clean_logits, x0, noisy, cfg) / len(found) for logits in found]).sum()
        total = cfg.mercury_clean_loss_weight * ar_loss + cfg.diffusion_loss_weight * loss
        return total, torch.stack((ar_loss, loss)).detach()


def train_step(state: TrainState, objective: Objective, now: Moment) -> Tensor:
    """Take one optimizer step, without a device sync; return this rank's next-token and windows' loss, (2,)."""
    cfg, run, sums = state.cfg, state.run, torch.zeros(2, device=state.run.device)
    num_rows, T = cfg.train_batch_tokens // cfg.micro_batches // cfg.train_seq_len, cfg.train_seq_len
    noisy = cfg.diffusion and now.step >= cfg.diffusion_start_step and now.progress >= cfg.diffusion_start_frac
    sizes, shares = zip(*cfg.sizes(cfg.diffusion_windows) if noisy else [(0, 1.0)], strict=True)
    for part in range(run.rank, cfg.micro_batches, run.world_size):
        rows = state.loader.rows(state.loader.position + part * num_rows * T, num_rows, T, run.device)
        size = random.Random(f"window {cfg.seed} {now.step} {part}").choices(sizes, shares)[0]
        with run.autocast():
            loss, terms = objective(rows, part, size, now)
        (loss / cfg.micro_batches).backward()  # type: ignore[no-untyped-call]
        state.operations += state.count_operations(cfg, size) * rows[:, 1:].numel()
        sums += terms / cfg.micro_batches
    if run.world_size > 1:  # one transfer for all gradients
        grads = [p.grad for p in state.model.parameters() if p.grad is not None]
        nn.utils.vector_to_parameters(run.sum(nn.utils.parameters_to_vector(grads)), grads)
    state.loader.position += cfg.train_batch_tokens
    state.update(now)
    return sums


def check_finite(state: TrainState, sums: Tensor) -> dict[str, float]:
    """Add losses over ranks, the one place that waits for the device; UserError says why one is NaN or infinite."""
    cfg, (ar_loss, window_loss) = state.cfg, state.run.sum(sums.clone()).tolist()
    if math.isfinite(ar_loss + window_loss):
        return {"train_loss": ar_loss, "denoise_loss": window_loss}
    look = f"MATRIX_LR={cfg.matrix_lr} or TIED_EMBED_LR={cfg.tied_embed_lr}, or set GRAD_CLIP_NORM=1"
    if math.isfinite(ar_loss):
        look = f"DIFFUSION_LOSS_WEIGHT={cfg.diffusion_loss_weight} or DIFFUSION_LOSS_CLIP={cfg.diffusion_loss_clip}"
    found = f"loss is not finite at step {state.step} (next-token {ar_loss}, windows {window_loss})"
    raise UserError(f"{found}; lower {look}; last good checkpoint, if one was due: {cfg.path('checkpoints', '.pt')}")


def train(state: TrainState, val: TokenLoader, byte_counter: ByteCounter) -> None:
    """Run optimizer steps until ITERATIONS or the wall-clock cap; only validation stops the clock."""
    cfg, run, T, objective = state.cfg, state.run, state.cfg.train_seq_len, Objective(state.cfg, state.run, state.model)
    for size in ([*objective.masks] or [0]) * cfg.warmup_steps if run.compile else []:  # before the clock starts
        rows = state.loader.rows(0, cfg.train_batch_tokens // cfg.micro_batches // T, T, run.device)
        with run.autocast():
            loss, _ = objective(rows, 0, size, Moment(cfg.iterations, 1.0, 0.0))
        loss.backward()  # type: ignore[no-untyped-call]
    state.model.zero_grad(set_to_none=True)
    began, saved_at, sums = run.clock() - state.seconds, state.seconds, torch.zeros(2, device=run.device)
    for _ in tqdm(range(state.step, cfg.iterations), "train", disable=run.rank > 0 or None):  # None: on a terminal only
        state.seconds = run.from_rank0(time.perf_counter() - began)
        if 0 < cfg.max_wallclock_seconds <= state.seconds:
            break
        if 0 < cfg.checkpoint_seconds <= state.seconds - saved_at:
            check_finite(state, sums)
            state.save()
            saved_at = state.seconds
        sums = train_step(state, objective, Moment.at(cfg, state.step, state.seconds))
        report = cfg.train_log_every and (state.step <= 10 or state.step % cfg.train_log_every == 0)
        if report or run.device.type == "cpu":  # where reading a loss is free, a NaN is named by its very step
            values, state.seconds = check_finite(state, sums), time.perf_counter() - began
            if report:
                state.log("train", values)
        if cfg.val_loss_every and state.step % cfg.val_loss_every == 0 and state.step < cfg.iterations:
            state.seconds = run.from_rank0(run.clock() - began)
            state.log("val", evaluate_bpb(state.model, run, val, byte_counter))
            began = run.clock() - state.seconds
    check_finite(state, sums)
    state.save()
    state.log("val", evaluate_bpb(state.model, run, val, byte_counter))


# 10  MAIN -- settings, data, train, export, reload, evaluate ==========================================================
def main() -> int:
    try:
        cfg, source, warnings = Config.from_env(os.environ)
        loader, val, byte_counter = TokenLoader(cfg, "train"), TokenLoader(cfg, "val"), ByteCounter(cfg)
        artifact = Path(cfg.out_dir) / f"final_model.{cfg.export_scheme[:4]}.ptz"
        with Run.start(cfg) as run:
            run.header(source, warnings)
            run.log.event("data", train_tokens=loader.total, val_tokens=val.total, train_shards=len(loader.paths))
            state = TrainState(cfg, run, loader)
            state.resume(byte_counter.sha256)
            train(state, val, byte_counter)
            if run.rank == 0:
                save_artifact(artifact, state.weights(), cfg, byte_counter.sha256, run.log)
            run.from_rank0(0.0)  # nobody reads the artifact before it is written
            model, _ = load_artifact(artifact, run.device)  # what is scored and decoded is the file
            run.log.event("final", **evaluate_bpb(model, run, val, byte_counter))
            if cfg.eval_stride:
                run.log.event("val_bpb_sliding", **evaluate_bpb(model, run, val, byte_counter, stride=cfg.eval_stride))
            for size, _ in cfg.sizes(cfg.nelbo_windows) if cfg.diffusion else []:
                run.log.event("nelbo", window=size, **evaluate_bpb(model, run, val, byte_counter, size))
            if run.rank == 0 and cfg.parallel_eval_examples:
                evaluate_parallel(model, run, val)
            run.from_rank0(0.0)  # the others wait
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024  # KiB on Linux
            peak = torch.cuda.max_memory_allocated() // 2**20 if run.device.type == "cuda" else peak
            done = {"steps": state.step, "train_seconds": state.seconds, "peak_memory_mib": peak}
            run.log.event("done", artifact=str(artifact), log=str(run.log.path), **done)
    except (UserError, OSError) as error:
        print("\n".join(f"error: {line}" for line in str(error).splitlines()), file=sys.stderr, flush=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

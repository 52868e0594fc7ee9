"""What is traced: training steps, scores and decoding on the fake device, and compiled graphs.

Sizes are those of one rank of the preset 8xh100: 64 rows of 1,024 tokens.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import train_gpt as tg
from scripts.bench.evaluation import OneByte
from scripts.bench.train import random_text
from tests.conftest import Recorder as SilentLog
from tests.cuda_trace.record import (
    CUDA,
    Recording,
    attention_kernel,
    cost,
    kernels,
    replaced,
    traced,
    without_driver,
)

backends: Any = torch.backends.cuda
MAIN = ("ar", "direct", "record", "retrograde")  # traced at full depth
SHALLOW = 2  # layers of other recipes; 1 has no skip connection
BATCH = 65_536  # tokens of a rank
Found = dict[str, Any]


class FakeRun(tg.Run):
    """A run of one process on the fake device."""

    def sum(self, values: Tensor) -> Tensor:
        """Give sums of a score numbers, which the host reads at its end."""
        return torch.ones(values.shape) if values.dtype == torch.float64 else values


def fake_run(cfg: tg.Config) -> FakeRun:
    """Open a run of one process on the fake device."""
    run = FakeRun(cfg, 0, 1, CUDA, SilentLog())
    with without_driver():
        run.open()
    return run


def configure(recipe: str, folder: Path, **more: Any) -> tg.Config:
    """Settings of one rank, with one window size: a step is always alike."""
    usual: Found = dict(recipe=recipe, preset="8xh100", data_path=folder, out_dir=folder)
    usual |= dict(train_batch_tokens=BATCH, micro_batches=1, val_batch_size=BATCH, init_from="")
    env = {name.upper(): str(value) for name, value in (usual | more).items()}
    cfg = tg.Config.from_env(env)[0]
    return dataclasses.replace(cfg, diffusion_windows=more.get("diffusion_windows", one_size(cfg)))


def one_size(cfg: tg.Config) -> str:
    """Take 16 in place of a list of window sizes."""
    return "16" if "," in cfg.diffusion_windows else cfg.diffusion_windows


def kinds(folder: Path) -> list[str]:
    """Choose recipes that together have every choice, switch, region and option of all recipes."""
    chosen, seen = list[str](), set[tuple[str, Any]]()
    recipes = tg.all_recipes()
    for recipe in [*MAIN, *(name for name in recipes if name not in MAIN)]:
        cfg = configure(recipe, folder)
        found: set[tuple[str, Any]] = {("region", name) for name, _ in cfg.regions()}
        for field in dataclasses.fields(cfg):
            meta, value = field.metadata, getattr(cfg, field.name)
            if meta["choices"] or isinstance(value, bool):
                found.add((field.name, value))
            elif meta["low"] == 0 and not meta["free"]:
                found.add((field.name, value > 0))
        found.add(("passes", cfg.diffusion_passes > 1))
        if not found <= seen and (cfg.diffusion or recipe in MAIN):
            chosen.append(recipe)
        seen |= found
    return chosen


def fake_parameters(model: nn.Module) -> None:
    """Put fake parameters on the device in place of those of a model."""
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = nn.Parameter(torch.empty(p.shape, device=CUDA))
    model.to = lambda *_, **__: model  # type: ignore[method-assign]  # fake ones cannot be moved


class AttentionCalls:
    """Stand in for F.scaled_dot_product_attention, and note what it is given."""

    def __init__(self) -> None:
        self.calls = dict[str, Found]()  # distinct ones

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        call: Found = {
            name: str(t.dtype)[6:] for name, t in zip("qkv", (query, key, value), strict=True)
        }
        call |= {"heads": [query.shape[1], key.shape[1]], "gqa": enable_gqa, "causal": is_causal}
        call |= {"lengths": [query.shape[2], key.shape[2]], "grad": query.requires_grad}
        call |= {"mask": None if attn_mask is None else str(attn_mask.dtype)[6:]}
        call |= {"cudnn": backends.cudnn_sdp_enabled()}
        self.calls[str(call)] = call
        return attention_kernel(query, key, value, attn_mask, is_causal)


class Trace:
    """A recipe's model on the fake device, and what is recorded of it."""

    def __init__(self, recipe: str, folder: Path, **more: Any) -> None:
        self.cfg = configure(recipe, folder, **more)
        self.run = fake_run(self.cfg)
        random_text(folder, self.cfg, 2 * BATCH + 1)
        self.loader = tg.TokenLoader(self.cfg, "train")
        self.recording, self.attention = Recording(), AttentionCalls()
        self.stream = set[str]()  # dtypes of the residual stream
        self.model = tg.GPT(self.cfg)

    @contextlib.contextmanager
    def recorded(self) -> Iterator[None]:
        """Run what follows on the fake device."""
        with traced(self.recording, self.attention):
            if all(p.device != CUDA for p in self.model.parameters()):
                fake_parameters(self.model)
                for block in self.model.blocks:
                    block.register_forward_hook(self.note_stream)
            self.recording.clear()
            self.attention.calls.clear()
            yield

    def note_stream(self, _block: nn.Module, inputs: Any, output: Any) -> None:
        """Note the dtype of what a block reads and adds to."""
        self.stream |= {str(x.dtype)[6:] for x in (inputs[0], output[0])}

    def found(self, name: str, seconds: float, **more: Any) -> Found:
        """Sum up what was recorded."""
        whole = list(kernels(self.recording.ops))
        parts = {
            "graphs": [one for one in whole if one[1].phase == "loss" and one[1].region],
            "eager": [one for one in whole if one[1].phase == "loss" and not one[1].region],
            "update": [one for one in whole if one[1].phase == "update"],
        }
        return {
            "case": name,
            "recipe": self.cfg.recipe,
            "cost": cost(whole)._asdict(),
            "parts": {part: cost(members)._asdict() for part, members in parts.items()},
            "parameters": [name for name, _ in self.model.named_parameters()],
            "copies": self.recording.copies,
            "syncs": self.recording.syncs,
            "stream": sorted(self.stream),
            "attention": [*self.attention.calls.values()],
            "seconds": round(seconds, 1),
            **more,
        }


def schedule(cfg: tg.Config, windows: bool) -> tg.ScheduleState:
    """Return a place of a run before or after windows start."""
    if not windows:
        return tg.ScheduleState(0, 0.0, 1.0)
    progress = max(cfg.diffusion_start_frac, cfg.diffusion_anneal_frac / 2)
    return tg.ScheduleState(cfg.diffusion_start_step + 1, progress, 1.0)


def watch_update(state: tg.TrainState, recording: Recording) -> Found:
    """Note the gradients that each update is given; what follows in a step is that update."""
    seen, update = dict[str, Any](), state.update

    def noted(now: tg.ScheduleState) -> None:
        grads = {name: p.grad for name, p in state.model.named_parameters() if p.numel()}
        seen["without_grad"] = sorted(name for name, g in grads.items() if g is None)
        held = {name: g for name, g in grads.items() if g is not None}
        seen["strided"] = [name for name, g in held.items() if not g.is_contiguous()]
        recording.phase = "update"
        update(now)

    state.update = noted  # type: ignore[method-assign]
    return seen


def steps(recipe: str, folder: Path, stages: Sequence[bool] = (), **more: Any) -> Iterator[Found]:
    """Trace a whole training step with windows, and of MAIN one without, as far as a recipe has
    any. That of retrograde is that of ar.
    """
    more = more or ({} if recipe in MAIN else {"num_layers": SHALLOW})
    stages = stages or ((False, True) if recipe in MAIN[:3] else (True,))
    trace, state, seen = Trace(recipe, folder, **more), None, dict[str, Any]()
    for windows in stages:
        now = schedule(trace.cfg, windows)
        if bool(tg.window_size(trace.cfg, now)) is not windows:
            continue
        began = time.process_time()
        with trace.recorded():
            if state is None:
                state = tg.TrainState(trace.cfg, trace.run, trace.loader, trace.model)
                objective = tg.Objective(trace.cfg, trace.run, trace.model)
                seen = watch_update(state, trace.recording)
            trace.recording.clear()
            tg.train_step(state, objective, now)
        name = f"step {recipe}" + " with windows" * windows
        yield trace.found(name, time.process_time() - began, **seen)


def sizes(recipe: str, folder: Path) -> Iterator[Found]:
    """Trace a step with windows of each size of a recipe, of 1 layer."""
    row = {"RECIPE": recipe, "PRESET": "8xh100"}
    cfg = tg.Config.from_env(row)[0]
    for size, _ in cfg.sizes(cfg.diffusion_windows):
        more = {"num_layers": 1, "diffusion_windows": str(size)}
        for found in steps(recipe, folder, (True,), **more):
            yield found | {"case": f"{found['case']} of {size}"}


def scores(recipe: str, folder: Path) -> Iterator[Found]:
    """Trace one batch of the exact score, and one of each bound with two samples."""
    trace = Trace(recipe, folder, nelbo_samples=2, nelbo_sequences=BATCH // 1024)
    cfg = trace.cfg
    random_text(folder, cfg, BATCH + 1)
    split: Any = (tg.TokenLoader(cfg, "val"), OneByte())

    def score(function: Callable[..., Any], *more: int) -> None:
        function(tg.compile_passes(trace.model, trace.run), trace.run, *split, *more)

    jobs = {f"exact score {recipe}": functools.partial(score, tg.evaluate_exact)}
    for size, _ in cfg.sizes(cfg.nelbo_windows) if cfg.diffusion else ():
        jobs[f"bound {size} {recipe}"] = functools.partial(score, tg.evaluate_bound, size)
    for name, job in jobs.items():
        began = time.process_time()
        with trace.recorded():
            job()
        yield trace.found(name, time.process_time() - began)


def decoding(recipe: str, folder: Path) -> Iterator[Found]:
    """Trace decoding of 16 rows: 3 tokens left to right, and a window of 8 in 2 passes."""
    trace, start = Trace(recipe, folder), 128
    jobs: dict[str, Callable[[Tensor], Any]] = {
        "left to right": lambda ids: tg.decode_autoregressive(trace.model, ids, start, start + 3),
        "refine": lambda ids: tg.decode_refine(trace.model, ids, start, start + 8, 2),
    }
    for name, job in jobs.items():
        began = time.process_time()
        with trace.recorded():
            ids = torch.zeros((16, start + 72), dtype=torch.int64, device=CUDA)
            trace.recording.clear()
            with trace.run.autocast():
                job(ids)
        yield trace.found(f"decode {name} {recipe}", time.process_time() - began)


class FakeRows:
    """In place of a loader: rows on the fake device."""

    def rows(self, _start: int, num_rows: int, seq_len: int, device: torch.device) -> Tensor:
        """Make rows of T + 1 tokens."""
        return torch.zeros((num_rows, seq_len + 1), dtype=torch.int64, device=device)


COMPILE = torch.compile


def whole_graphs(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """Compile as the program asks, but for no processor: Dynamo and AOTAutograd alone."""
    kept = {name: options[name] for name in ("dynamic", "fullgraph") if name in options}
    return COMPILE(function, backend="aot_eager", **kept)


def flex(recipe: str, folder: Path) -> Iterator[Found]:
    """Trace the graphs of a training step whose windows are read by FlexAttention."""
    for found in compiled(recipe, folder, window_attention="flex"):
        yield found | {"case": f"{found['case']} with flex"}


def compiled(recipe: str, folder: Path, **more: Any) -> Iterator[Found]:
    """Trace the graphs of a training step, which must be whole; of 1 or 2 layers, on short rows."""
    layers = SHALLOW if recipe == "direct" else 1
    small: Found = dict(
        more, num_layers=layers, train_seq_len=64, train_batch_tokens=512, nelbo_windows="16"
    )
    cfg = configure(recipe, folder, parallel_eval_prefix_len=2, parallel_eval_examples=0, **small)
    began, counters = time.process_time(), torch._dynamo.utils.counters
    counters.clear()
    run, rows = fake_run(cfg), FakeRows()
    model = tg.GPT(cfg)
    with (
        without_driver(),
        replaced(torch, "compile", whole_graphs),
        FakeTensorMode(allow_non_fake_inputs=True),
    ):
        fake_parameters(model)
        state: Any = tg.TrainState(cfg, run, rows, model)  # type: ignore[arg-type]
        objective = tg.Objective(cfg, run, model)
        tg.train_step(state, objective, schedule(cfg, cfg.diffusion))
    graphs = counters["stats"]["unique_graphs"]
    breaks = [str(reason) for reason in counters["graph_break"]]
    seconds = round(time.process_time() - began, 1)
    masks = sorted({type(mask).__name__ for mask in objective.masks.values()})
    found: Found = {"case": f"compiled {recipe}", "graphs": graphs, "breaks": breaks}
    yield found | {"masks": masks, "seconds": seconds}

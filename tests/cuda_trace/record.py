"""Record the operators of a program on fake CUDA tensors, and estimate what they cost on a GPU.

Fake tensors have a shape, a type and a device, but no numbers. Tensors of the host stay real, so
that the program's own decisions (which rows, which window size) are those of a run.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from scripts.bench.train import PEAKS

CUDA = torch.device("cuda", 0)
AUTOGRAD: Any = torch.autograd
# Of an H100 with HBM3, from its data sheet: bf16 FLOPs and bytes per second.
PEAK_FLOPS, PEAK_BYTES = PEAKS["H100"], 3.35e12
# Operators that launch no kernel, views beside them.
SILENT = "empty new_empty empty_like empty_strided new_empty_strided detach lift_fresh alias device"
NO_KERNEL = frozenset((*SILENT.split(), "_unsafe_view", "_reshape_alias"))
# Operators that a compiler calls as they are; it fuses all others with their neighbours.
OPAQUE = ("mm", "bmm", "addmm", "baddbmm", "sort", "cummin", "cumsum", "embedding_dense_backward")
OPAQUE_PREFIXES = ("_scaled_dot_product", "_fused_adam", "scatter", "index_put", "_flash")
COPIES = ("_to_copy", "copy_")
FORBIDDEN = ("_local_scalar_dense",)  # the host waits for a value

Access = tuple[int, int]  # storage and bytes


class Op(NamedTuple):
    """One operator that ran on the device."""

    name: str  # mm
    region: str  # the function given to torch.compile that it is part of; empty: it runs eagerly
    phase: str  # loss or update
    reads: tuple[Access, ...]
    writes: tuple[Access, ...]
    flops: float
    sums_rows: bool  # a reduction over leading dimensions: a kernel of its own, also if fused


class Recording:
    """What ran on the device, in order, and what passed between it and the host."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget what was recorded so far."""
        self.ops = list[Op]()
        self.copies = list[tuple[str, tuple[int, ...]]]()  # direction and shape
        self.syncs = list[str]()  # operators that the host waits for
        self.region, self.phase = "", "loss"
        self.spans = list[tuple[int, int, str]]()  # autograd's sequence numbers of a region
        self.kept = dict[int, Any]()  # storages: none may take the number of another

    def access(self, t: Tensor) -> Access:
        """Which storage a tensor lies in, and how many bytes of it."""
        storage = t.untyped_storage()
        self.kept[storage._cdata] = storage
        return storage._cdata, min(t.numel() * t.element_size(), storage.nbytes())

    def region_now(self) -> str:
        """Find the compiled function of an operator, in the backward pass that of its forward."""
        node = torch._C._current_autograd_node()
        if node is None:
            return self.region
        number = node._sequence_nr()
        return next((name for low, high, name in self.spans if low <= number < high), "")

    @contextlib.contextmanager
    def inside(self, name: str) -> Iterator[None]:
        """Record what follows as part of a compiled function; the outermost counts."""
        if self.region:
            yield
            return
        self.region, start = name, AUTOGRAD._get_sequence_nr()
        try:
            yield
        finally:
            self.region = ""
            self.spans.append((start, AUTOGRAD._get_sequence_nr(), name))

    def note(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Record an operator that ran on the device."""
        given, made = tensors(tree_leaves((args, kwargs))), tensors(tree_leaves(out))
        name = short_name(func)
        elsewhere = [x for x in given if made and x.device.type != made[0].device.type]
        # A number of the host may be an operand; only a copy transfers one.
        if any(x.ndim or name in COPIES for x in elsewhere):
            direction = "to device" if made[0].device.type == "cuda" else "to host"
            self.copies.append((direction, tuple(made[0].shape)))
        if is_silent(func) or not any(x.numel() for x in made + given):
            return
        changed = written(func, args, kwargs)
        sums = name == "sum" and made[0].numel() > 1 and made[0].shape[0] != given[0].shape[0]
        self.ops.append(
            Op(
                name,
                self.region_now(),
                self.phase,
                tuple({t: self.access(t) for t in given}.values()),
                tuple(dict.fromkeys(self.access(t) for t in [*made, *changed])),
                flops(func, args, kwargs, out),
                sums,
            )
        )


@functools.cache
def short_name(func: Any) -> str:
    """`mm` of aten.mm.default."""
    return str(func.name()).split("::")[-1].split(".")[0]


def tensors(values: Sequence[Any]) -> list[Tensor]:
    """Keep what is a tensor."""
    return [value for value in values if isinstance(value, Tensor)]


@functools.cache
def changed_arguments(func: Any) -> list[tuple[int, str]]:
    """Places and names of arguments that an operator changes in place."""
    found = [(i, a.name, a.alias_info) for i, a in enumerate(func._schema.arguments)]
    return [(i, name) for i, name, alias in found if alias is not None and alias.is_write]


def written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """List what an operator changes in place."""
    places = changed_arguments(func)
    return tensors(tree_leaves([args[i] if i < len(args) else kwargs.get(n) for i, n in places]))


@functools.cache
def is_silent(func: Any) -> bool:
    """Tell whether an operator launches no kernel."""
    return bool(func.is_view) or short_name(func) in NO_KERNEL


def flops(func: Any, args: Any, kwargs: Any, out: Any) -> float:
    """Count the operations of matrix products and attention; causal attention does half."""
    formula = flop_registry.get(func.overloadpacket)
    if formula is None:
        return 0.0
    causal = "flash_attention" in short_name(func) and any(value is True for value in args)
    return (0.5 if causal else 1.0) * float(formula(*args, **kwargs, out_val=out))


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Run operators of the fake device on fake tensors, and record them; others run as ever."""

    def __init__(self, recording: Recording) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.recording = recording
        self.fakes = FakeTensorMode(allow_non_fake_inputs=True)

    def __enter__(self) -> Any:
        self.lifted = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=CUDA) is a copy
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        torch._C._set_only_lift_cpu_tensors(self.lifted)
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, short_name(func)
        if name in ("is_pinned", "_pin_memory"):
            return args[0] if name == "_pin_memory" else False  # a host without a device has none
        given = tree_leaves((args, kwargs))
        if not any(isinstance(v, FakeTensor) or v == CUDA for v in given if is_placed(v)):
            return func(*args, **kwargs)
        if name in FORBIDDEN:
            self.recording.syncs.append(name)
            return 1.0  # go on, so that all of them are found
        with self.fakes:
            out = func(*args, **kwargs)
        self.recording.note(func, args, kwargs, out)
        return out


def is_placed(value: Any) -> bool:
    """Tell whether an argument can name a device."""
    return isinstance(value, FakeTensor | torch.device)


# ==============================================================================
# KERNELS
# ==============================================================================


class Cost(NamedTuple):
    """What operators cost."""

    eager: int  # kernels that the program launches one by one
    compiled: int  # estimate of the kernels of compiled functions, which start without Python
    gigabytes: float  # read and written
    teraflops: float
    floor_ms: float  # no H100 is faster: each kernel takes its bytes or its FLOPs at full speed


class Kernel(NamedTuple):
    """Some operators in one launch."""

    flops: float
    bytes: float
    launches: int

    @property
    def seconds(self) -> float:
        return max(self.flops / PEAK_FLOPS, self.bytes / PEAK_BYTES)


def is_opaque(op: Op) -> bool:
    """Tell whether a compiler leaves an operator as it is."""
    return op.name in OPAQUE or op.name.startswith(OPAQUE_PREFIXES)


def fuse(ops: Sequence[Op]) -> list[list[int]]:
    """Group operators as a compiler would: neighbours of one region, unless an opaque operator
    stands between them. An opaque or an eager operator is a group of its own.
    """
    parent, level = list(range(len(ops))), [0] * len(ops)
    writer = dict[int, int]()  # of each storage, the last

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for i, op in enumerate(ops):
        sources = {writer[storage] for storage, _ in op.reads if storage in writer}
        level[i] = max((level[j] + is_opaque(ops[j]) for j in sources), default=0)
        level[i] = max([level[i], *(level[j] + 1 for j in sources if ops[j].region != op.region)])
        for j in sources if op.region and not is_opaque(op) else ():
            if (level[j], ops[j].region) == (level[i], op.region) and not is_opaque(ops[j]):
                parent[root(i)] = root(j)
        writer |= dict.fromkeys((storage for storage, _ in op.writes), i)
    groups = dict[int, list[int]]()
    for i in range(len(ops)):
        groups.setdefault(root(i), []).append(i)
    return list(groups.values())


def kernels(ops: Sequence[Op]) -> Iterator[tuple[Kernel, Op]]:
    """Yield the kernels of operators, each with its first operator. What a fused group writes
    counts where an operator outside of it reads it, or none does.
    """
    groups = fuse(ops)
    place = {i: number for number, group in enumerate(groups) for i in group}
    writer, kept = dict[int, int](), set[int]()  # operators whose result leaves their group
    sources = list[dict[int, int]]()  # of each operator: storage to operator
    for i, op in enumerate(ops):
        found = {storage: writer[storage] for storage, _ in op.reads if storage in writer}
        sources.append(found)
        kept |= {j for j in found.values() if place[j] != place[i]}
        writer |= dict.fromkeys((storage for storage, _ in op.writes), i)
    used = {j for found in sources for j in found.values()}
    kept |= set(range(len(ops))) - used
    for number, group in enumerate(groups):
        read, wrote = dict[tuple[int, int], int](), dict[int, int]()
        for i in group:
            for storage, size in ops[i].reads:
                source = sources[i].get(storage, -1)
                if source < 0 or place[source] != number:
                    key = storage, source
                    read[key] = max(read.get(key, 0), size)
            if i in kept:
                wrote |= dict(ops[i].writes)
        launches = 1 + sum(ops[i].sums_rows for i in group[1:])
        moved = float(sum(read.values()) + sum(wrote.values()))
        yield Kernel(sum(ops[i].flops for i in group), moved, launches), ops[group[0]]


def cost(found: Sequence[tuple[Kernel, Op]]) -> Cost:
    """Sum up what kernels cost."""
    return Cost(
        sum(kernel.launches for kernel, op in found if not op.region),
        sum(kernel.launches for kernel, op in found if op.region),
        sum(kernel.bytes for kernel, _ in found) / 1e9,
        sum(kernel.flops for kernel, _ in found) / 1e12,
        1e3 * sum(kernel.seconds for kernel, _ in found),
    )


# ==============================================================================
# STAND-INS -- for what PyTorch decides by asking a device
# ==============================================================================


def attention_kernel(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """Call an operator of an H100: FlashAttention, or with a mask cuDNN's, whose memory-efficient
    sibling reads and writes the same.
    """
    aten: Any = torch.ops.aten
    if mask is None:
        out = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)
    else:
        bias = torch.where(mask, q.new_zeros(()), -math.inf).expand(*q.shape[:3], k.shape[2])
        out = aten._scaled_dot_product_cudnn_attention(q, k, v, bias, q.requires_grad)
    y: Tensor = out[0]
    return y


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Give an attribute another value for a while."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextlib.contextmanager
def without_driver() -> Iterator[None]:
    """Let PyTorch make tensors on the device, and autocast to bf16, without asking a driver."""
    with (
        replaced(torch.cuda, "_lazy_init", lambda: None),
        replaced(torch.cuda, "set_device", lambda _: None),
        replaced(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
        replaced(torch.cuda, "is_bf16_supported", lambda *_, **__: True),
    ):
        yield


def marked(recording: Recording, function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """Stand in for torch.compile: run a function as it is, and record which it was."""
    if function is None:
        return functools.partial(marked, recording, **options)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with recording.inside(getattr(function, "__qualname__", type(function).__name__)):
            return function(*args, **kwargs)

    return call


@contextlib.contextmanager
def traced(recording: Recording, attention: Callable[..., Tensor]) -> Iterator[None]:
    """Run what follows on the fake device, with torch.compile and attention replaced."""
    compile_as = functools.partial(marked, recording)
    with (
        without_driver(),
        replaced(torch, "compile", compile_as),
        replaced(F, "scaled_dot_product_attention", attention),
        Recorder(recording),
    ):
        yield

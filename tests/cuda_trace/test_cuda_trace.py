"""The CUDA path, traced on fake tensors in a process of its own: no wait for the device, the right
types, no more kernels and bytes than a budget, whole graphs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.cuda_trace import guard
from tests.cuda_trace.record import Cost, Op, cost, kernels

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(guard.compiler() is None, reason="no C++ compiler to build the guard with"),
]

STREAM = "bfloat16"  # what the residual stream should be on a GPU
# What is traced by two processes, which take about as long.
CASES = (
    ["steps:*", "sizes:direct", "scores:direct", "decoding:direct"],
    ["compiled:*", "flex:direct"],
)
FLEX = "compiled direct with flex"
# Parameters that only windows use, by the last part of their names.
OF_WINDOWS = {"mask_emb", "next_visible_gain", "next_visible_proj", "time_proj", "self_cond"}
# Of one rank at the default size, a little above what was traced: kernels that are launched one by
# one for noise, losses or a score, kernels in compiled graphs, kernels of the update, and gigabytes
# read and written.
# fmt: off
BUDGETS = {
    "step ar": (12, 490, 215, 93),
    "step direct": (12, 490, 215, 93),
    "step direct with windows": (22, 1030, 215, 124),
    "step record": (12, 605, 215, 120),
    "step record with windows": (22, 1190, 215, 156),
    "step retrograde with windows": (22, 1130, 215, 210),
    "exact score direct": (20, 215, 0, 24),
    "bound 16 direct": (440, 700, 0, 93),
    "bound 1024 direct": (440, 590, 0, 78),
}
# fmt: on


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, Any]]:
    """Everything that was traced, by case."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.cuda_trace", "--json"]
    streams: Any = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    streams |= dict(cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    processes = [subprocess.Popen([*command, *cases], **streams) for cases in CASES]
    lines = list[str]()
    try:
        for process in processes:
            out, err = process.communicate()
            assert process.returncode == 0, err[-3000:]
            lines += out.splitlines()
    finally:
        for process in processes:
            process.kill()
    return {case["case"]: case for case in map(json.loads, lines)}


Cases = dict[str, dict[str, Any]]


def steps(found: Cases) -> Iterator[tuple[str, dict[str, Any]]]:
    """Training steps."""
    return ((name, case) for name, case in found.items() if name.startswith("step "))


def traced(found: Cases) -> Iterator[tuple[str, dict[str, Any]]]:
    """All cases of which operators are known."""
    return ((name, case) for name, case in found.items() if "cost" in case)


def test_all_kinds_of_steps_are_traced(found: Cases) -> None:
    recipes = {case["recipe"] for _, case in steps(found)}
    assert {"ar", "direct", "record", "retrograde"} < recipes
    assert len(recipes) > 10
    assert sum(name.endswith("with windows") for name in found) == len(recipes) - 1  # not of ar
    assert all(case["cost"]["teraflops"] > 0.01 for _, case in traced(found))


def test_nothing_waits_for_the_device(found: Cases) -> None:
    assert {name: case["syncs"] for name, case in traced(found) if case["syncs"]} == {}


def copies(case: dict[str, Any]) -> list[str]:
    """Copies between host and device, without those of the tokens."""
    tokens = [[65537]]  # of a batch
    if not case["case"].startswith("step"):
        tokens = [[64, 1025], [64], []]  # rows to score, their places, and two counts of them
    return [f"{to} {shape}" for to, shape in case["copies"] if shape not in tokens]


def test_only_tokens_are_copied_to_the_device(found: Cases) -> None:
    others = {name: copies(case) for name, case in traced(found)}
    assert {name: case for name, case in others.items() if case} == {}
    assert all(len(case["copies"]) == 1 for _, case in steps(found) if case["recipe"] == "direct")


def test_the_residual_stream_is_in_the_dtype_of_products(found: Cases) -> None:
    assert {name for name, case in traced(found) if case["stream"] != [STREAM]} == set()


def test_the_residual_stream_has_one_dtype(found: Cases) -> None:
    assert {name for name, case in traced(found) if len(case["stream"]) != 1} == set()


def test_gradients_are_contiguous(found: Cases) -> None:
    assert {name: case["strided"] for name, case in steps(found) if case["strided"]} == {}


def test_only_parameters_of_windows_wait_for_windows(found: Cases) -> None:
    for name, case in steps(found):
        waiting = [p for p in case["parameters"] if p.split(".")[-1] in OF_WINDOWS]
        assert case["without_grad"] == ([] if "with windows" in name else sorted(waiting)), name
    assert found["step direct"]["without_grad"]


def attention(found: Cases) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every distinct call of attention."""
    return ((name, call) for name, case in traced(found) for call in case["attention"])


def test_attention_reads_bf16(found: Cases) -> None:
    wrong = [(name, c) for name, c in attention(found) if {c[x] for x in "qkv"} != {"bfloat16"}]
    assert wrong == []


def test_attention_is_causal_or_has_a_mask_of_bools(found: Cases) -> None:
    kinds = {(call["mask"], call["causal"]) for _, call in attention(found)}
    assert kinds == {("bool", False), (None, True)}


def test_groups_of_heads_are_announced_or_repeated(found: Cases) -> None:
    for name, call in attention(found):
        query, key = call["heads"]
        assert call["gqa"] == (query != key), name
        assert call["mask"] is None or query == key, (
            name
        )  # fused kernels with a mask know no groups


def hazardous(call: dict[str, Any]) -> bool:
    """Tell whether the backward pass of cuDNN attention may be NaN: a mask, and a length of 64
    modulo 128 (pytorch#196678).
    """
    length = any(n % 128 == 64 for n in call["lengths"])
    return bool(call["cudnn"] and call["grad"] and call["mask"] and length)


def test_no_gradient_passes_a_mask_through_cudnn_at_lengths_that_give_nan(found: Cases) -> None:
    assert [(name, call) for name, call in attention(found) if hazardous(call)] == []


def test_noise_and_losses_are_compiled(found: Cases) -> None:
    assert found["step direct with windows"]["parts"]["eager"]["eager"] < 40


@pytest.mark.parametrize("case", ["exact score direct", "bound 16 direct"])
def test_scores_are_compiled(found: Cases, case: str) -> None:
    assert found[case]["cost"]["compiled"] > found[case]["cost"]["eager"]


@pytest.mark.parametrize("case", BUDGETS)
def test_kernels_and_bytes_stay_within_budget(found: Cases, case: str) -> None:
    parts, whole = found[case]["parts"], found[case]["cost"]
    eager, update = parts["eager"]["eager"], parts["update"]
    measured = (eager, parts["graphs"]["compiled"], update["eager"] + update["compiled"])
    most = BUDGETS[case]
    assert all(a <= b for a, b in zip((*measured, whole["gigabytes"]), most, strict=True)), (
        f"{case}: {(*measured, round(whole['gigabytes'], 1))} exceeds {most}"
    )


def test_every_kind_compiles_to_whole_graphs(found: Cases) -> None:
    cases = {name: case for name, case in found.items() if name.startswith("compiled ")}
    assert len(cases) > 10
    assert {name: case["breaks"] for name, case in cases.items() if case["breaks"]} == {}
    assert sum(case["graphs"] for case in cases.values()) > 5  # recipes share some
    assert [name for name, case in cases.items() if case["masks"] == ["BlockMask"]] == [FLEX]
    assert cases[FLEX]["graphs"] > 0


def op(name: str, reads: str, writes: str, region: str = "f", flops: float = 0.0) -> Op:
    """An operator on storages named by letters, of 100 bytes each."""
    read, wrote = (tuple((ord(letter), 100) for letter in text) for text in (reads, writes))
    return Op(name, region, "loss", read, wrote, flops, False)


def of(ops: list[Op]) -> Cost:
    """What operators cost."""
    return cost(list(kernels(ops)))


def test_a_compiler_fuses_neighbours_up_to_a_product() -> None:
    chain = [op("mul", "a", "b"), op("add", "b", "c"), op("mm", "c", "d"), op("mul", "d", "e")]
    found = of([*chain, op("relu", "e", "f")])
    # mul+add, mm, mul+relu: each reads 100 bytes and writes 100.
    assert (found.eager, found.compiled, found.gigabytes) == (0, 3, 600 / 1e9)
    eager = of([step._replace(region="") for step in chain])
    assert (eager.eager, eager.compiled, eager.gigabytes) == (4, 0, 800 / 1e9)


def test_what_a_fused_kernel_keeps_for_others_is_written() -> None:
    kept = of([op("mul", "a", "b"), op("add", "b", "c"), op("mm", "b", "d")])
    assert (kept.compiled, kept.gigabytes) == (2, (100 + 200 + 200) / 1e9)


def test_no_gpu_beats_the_floor() -> None:
    product = op("mm", "a", "b", flops=989.4e12)
    assert of([product]).floor_ms == pytest.approx(1000)
    assert of([product._replace(flops=0.0)]).floor_ms == pytest.approx(200 / 3.35e12 * 1e3)

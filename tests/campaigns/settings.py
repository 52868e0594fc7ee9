"""Campaigns settings and subsets: values of settings, impossible ones and possible ones."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import train_gpt as tg
from tests.campaigns.processes import Limits
from tests.campaigns.tries import Try

# Some settings may rightly make a run long: it is asked to end then. What does not fit into memory
# is an allocation that fails, as on a machine without so much.
LIMITS = Limits(seconds=8.0, mib=6000.0, address_mib=4096, slow=True)
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
FIELDS = {field.name: field for field in dataclasses.fields(tg.Config)}
# fmt: off
SPECIAL = (
    "", " ", "0", "1", "2", "3", "-1", "-0", "+1", "1.0", "0.5", "1e30", "1e-30", "-1e30", "1e400",
    "-1e400", "nan", "inf", "-inf", "infinity", "5e-324", "2147483647", "2147483648", "4294967296",
    "9223372036854775807", "9223372036854775808", "18446744073709551616", "1" + "0" * 40,
    "9" * 5000, "1_000", "0x10", "1e3", "true", "True", "None", "null", "auto", "text", "T", "T:1",
    "\u0661\u0662", "\u65e5\u672c", "\U0001f642", "a\nb", "\x1b[31m", "a\tb", "..", "/", ".", "-",
    "../../x", "a" * 300, "a" * 5000, ",", ",,", "1,,2", "1,2", "1;2", "4:1,8:1", "4:0", "4:-1",
    "4:nan", "4:inf", "4:1e308,8:1e308", "4:", ":", ":1", "T:1,T:1", "16", "32", "1,16,T", "0:1",
    "-4:1", "4:1:1", "iid", "iid:1,infill:0", "{SEED}", "{}", "%s", "no", "mask", "$HOME", "~",
    "1,2,4,8,16", "1," * 2000 + "1", "0.0", "1.5", "0.999999999", "1e-9", "1e9", "100000", "-5",
)
VALID = {  # of settings that neither choices nor limits describe
    "run_id": ("a", "a.b-c_d"), "out_dir": ("out", "a/b", "\u65e5\u672c", "with space"),
    "recipe": ("record", "ar", "direct", "retrograde", "mdlm_30_70", "ar_record", "record_bound"),
    "preset": ("auto", "cpu", "1xgpu", "8xh100"), "diffusion_windows": ("T", "4:1,8:1", "1", "2:3"),
    "diffusion_regions": ("iid", "spans", "iid:3,infill:1", "continuation:1,spans:2"),
    "nelbo_windows": ("", "1", "1,4", "T"), "parallel_eval_steps": ("1", "1,2"),
    "parallel_eval_span_len": ("4", "1,2"), "train_seq_len": (8, 16, 32),
    "train_batch_tokens": (32, 64, 128), "model_dim": (8, 16, 24, 32), "num_heads": (1, 2, 4),
    "num_kv_heads": (1, 2), "micro_batches": (1, 2, 4),
}
FIXED = ["vocab_size", "init_from", "data_path", "tokenizer_path", "compile", "device"]
FIXED += ["window_attention"]  # needs a GPU
# fmt: on


def settings(t: Try) -> None:
    """Give one setting a special value: it is refused by name, or the run ends with scores."""
    name = t.draw.choice([*FIELDS, *(key.lower() for key in LAUNCHER)]).upper()
    value = t.draw.choice(SPECIAL)
    if t.draw.random() < 0.6:  # a number where one is meant, so that fewer are refused at once
        value = t.draw.choice([*numbers_for(name.lower()), value])
    t.note(f"{name}={shown(value)}")
    outcome = t.train(t.inputs.env() | {name: value}, LIMITS)
    t.judge_run(outcome, [name, "memory"])


def shown(value: object) -> str:
    """A value on one line, shortened."""
    found = repr(value)
    return found if len(found) < 100 else f"{found[:60]}... ({len(str(value))} characters)"


def numbers_for(name: str) -> list[str]:
    """Values of a setting's type, among them its limits and what is just beyond them."""
    field = FIELDS.get(name)
    if field is None or field.metadata["low"] is None:
        return [*map(str, VALID.get(name, ())), *(field.metadata["choices"] if field else ())]
    limits = [field.metadata["low"], field.metadata["high"]]
    finite = [limit for limit in limits if math.isfinite(limit)]
    whole = isinstance(field.default, int)
    near = list[float]()
    for limit in finite:
        below = limit - 1 if whole else math.nextafter(limit, -math.inf)
        near += [below, limit, limit + 1 if whole else math.nextafter(limit, math.inf)]
    near += (2, 3, 5, 16, 100, 10**4, 10**6, 10**9) if whole else (1e-30, 1e-3, 0.3, 1.0, 30.0, 1e6)
    return [str(value) for value in near]


def subsets(t: Try) -> None:
    """Give a few settings values that are each valid; an error may name any of them."""
    names = t.draw.sample([n for n in FIELDS if n not in FIXED], t.draw.randint(2, 6))
    changed = {name.upper(): str(valid(t, name)) for name in names}
    t.note(" ".join(f"{key}={shown(value)}" for key, value in changed.items()))
    outcome = t.train(t.inputs.env() | changed, LIMITS)
    t.judge_run(outcome, [*changed, "memory"])


def valid(t: Try, name: str) -> Any:
    """Draw a value within the limits of one setting."""
    field, draw = FIELDS[name], t.draw
    low, high = field.metadata["low"], field.metadata["high"]
    if name in VALID:
        return draw.choice(VALID[name])
    if field.metadata["choices"]:
        return draw.choice(field.metadata["choices"])
    if isinstance(field.default, bool):
        return draw.randrange(2)
    if isinstance(field.default, int):
        return draw.choice([low, low + 1, draw.randint(low, int(min(high, low + 30)))])
    if high <= 1:
        return draw.choice([low, high, draw.uniform(low, high)])
    return draw.choice([low, field.default, min(high, low + draw.lognormvariate(-2, 2))])

"""scripts/policy.py: measures by hand, the guard against mode ar, and the choice from tables of
which all is known.
"""

from __future__ import annotations

import math

import pytest
import torch

import train_gpt as tg
from scripts import policy
from scripts.policy import LIMITS, Limits, Measured, Quality
from tests.conftest import random_rows, randomise, tiny

V = 32
BLOCK = tg.Decoding(window=4, steps=2)
HOT = BLOCK._replace(temperature=1.3, top_k=20, top_p=0.95, seed=5)


def model_of(recipe: str = "direct") -> tg.GPT:
    return randomise(tg.GPT(tiny(recipe, vocab_size=V, train_seq_len=32)))


def found(**values: list[float]) -> Quality:
    """Good rows of 16 tokens, but for what is given."""
    given = dict(nats=[1.0], entropy=[4.0], distinct=[1.0], repeat=[0.0], tokens=[16]) | values
    return Quality(**{name: torch.tensor(given[name]) for name in Quality._fields})


@pytest.mark.parametrize(
    ("tokens", "entropy", "distinct", "repeat"),
    [
        ([3, 3, 3, 3, 3], 0.0, 0.25, 1.0),
        ([1, 2, 3, 4], 2.0, 1.0, 0.0),
        (
            [1, 2, 1, 2, 1, 9],
            -(3 * math.log2(1 / 2) + 2 * math.log2(1 / 3) + math.log2(1 / 6)) / 6,
            3 / 5,
            5 / 6,
        ),
        ([9, 1, 2, 1, 8, 8], None, 1.0, 2 / 6),  # 1 2 1 is not twice in full
        ([*range(8), *range(8)], 3.0, 8 / 15, 1.0),
        ([*range(9), *range(9)], math.log2(9), 9 / 17, 0.0),  # a longer period than is looked for
        ([5, 5, 5, 1, 5, 5], None, 3 / 5, 3 / 6),  # two runs do not add up
        ([7], 0.0, 1.0, 0.0),
        ([], 0.0, 1.0, 0.0),
    ],
)
def test_measures_by_hand(
    tokens: list[int], entropy: float | None, distinct: float, repeat: float
) -> None:
    assert policy.distinct(tokens) == pytest.approx(distinct)
    assert policy.repeat(tokens) == pytest.approx(repeat)
    if entropy is not None:
        assert policy.entropy(tokens) == pytest.approx(entropy)


def test_quality_describes_the_span_only() -> None:
    model, ids = model_of(), random_rows(3, 14, V)
    ids[1, 5:11] = 7
    got = policy.quality(model, ids, 5, 11)
    torch.testing.assert_close(got.nats, tg.score(model, ids)[:, 4:10].double().mean(1))
    assert got.entropy[1] == 0 < got.entropy[0] <= math.log2(6)
    assert got.repeat.tolist()[1] == 1
    assert got.tokens.tolist() == [6, 6, 6]
    alone = policy.quality(model, ids[1:2], 5, 11)
    torch.testing.assert_close([v[0] for v in alone], [v[1] for v in got])


def test_tokens_after_the_end_do_not_count() -> None:
    model, ids = model_of(), random_rows(2, 14, V - 1)
    ids[0, 8:11] = V - 1
    ended, whole = (policy.quality(model, ids, 5, 11, end) for end in (V - 1, -1))
    assert ended.tokens.tolist() == [4, 6]
    torch.testing.assert_close(ended.nats[0], policy.quality(model, ids, 5, 9).nats[0])
    assert ended.repeat[0] < whole.repeat[0]


def test_a_row_of_one_token_is_refused_however_likely_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, ids = model_of(), torch.cat((torch.full((1, 20), 3), torch.arange(20)[None]))
    monkeypatch.setattr(policy, "score", lambda model, ids: torch.zeros(len(ids), ids.shape[1] - 1))
    monkeypatch.setattr(policy, "decode", lambda *_: tg.Decoded(ids, ids))
    got = policy.quality(model, ids, 4, 20)
    for lax in (
        Limits(repeat=1, distinct=0),
        Limits(entropy=0, distinct=0),
        Limits(entropy=0, repeat=1),
    ):
        assert [verdict.tolist() for verdict in policy.judge(got, V, lax)] == [[True, False]] * 2
    assert not policy.judge(got, V, Limits(entropy=0, distinct=0, repeat=1))[1].any()
    measured = policy.measure(model, ids, 4, 20, "ar", tg.AR)
    # The other row: 0 nats.
    assert (measured.nats, measured.repetitive) == (
        pytest.approx(math.log(V) / 2),
        0.5,
    )


def test_limits_at_their_edges() -> None:
    nats, bits = LIMITS.nats * math.log(V), LIMITS.entropy * 4
    edge = dict(nats=[nats - 1e-4, nats + 1e-4, math.nan], entropy=[bits, bits - 1e-4])
    edge |= dict(distinct=[LIMITS.distinct + 1e-6, 0.39], repeat=[LIMITS.repeat, 0.51])
    for name, values in edge.items():
        repetitive, outside = policy.judge(found(**{name: values}), V)
        assert outside.tolist() == [False, True, True][: len(values)], name
        assert repetitive.equal(outside) or (name == "nats" and not repetitive.any())
    # Of log2 V bits at most.
    assert policy.judge(found(entropy=[2.6], tokens=[4 * V]), V)[1].tolist() == [False]


def half(nats: torch.Tensor) -> Limits:
    """Limits that half of these rows are within."""
    return Limits(nats=nats.median().item() / math.log(V) + 1e-6, entropy=0, distinct=0, repeat=1)


@pytest.mark.parametrize("how", [BLOCK, HOT, HOT._replace(end=4)])
def test_rows_that_fall_back_are_those_of_ar(how: tg.Decoding) -> None:
    model, ids = model_of(), random_rows(8, 18, V)
    first, plain = (tg.decode(model, ids, 5, 18, mode) for mode in (how, how._replace(window=0)))
    nats = policy.quality(model, first.ids, 5, 18, how.end).nats
    got = policy.guard(model, ids, 5, 18, how, half(nats))
    assert got.fell_back.sum() == 4
    assert got.fell_back.equal(nats > nats.median())
    assert got.decoded.ids.equal(torch.where(got.fell_back[:, None], plain.ids, first.ids))
    assert (plain.ids != first.ids).any(1).all()
    assert got.decoded.forwards.equal(first.forwards + plain.forwards * got.fell_back[:, None])
    torch.testing.assert_close(got.quality, policy.quality(model, got.decoded.ids, 5, 18, how.end))


def test_the_fate_of_a_row_does_not_depend_on_the_others() -> None:
    model, ids = model_of(), random_rows(8, 18, V)
    limits = half(policy.quality(model, tg.decode(model, ids, 5, 18, HOT).ids, 5, 18).nats)
    got = policy.guard(model, ids, 5, 18, HOT, limits)
    for i in range(8):
        mixed = random_rows(8, 18, V, seed=1 + i)
        mixed[i] = ids[i]
        again = policy.guard(model, mixed, 5, 18, HOT, limits)
        assert again.decoded.ids[i].equal(got.decoded.ids[i])
        assert again.fell_back[i] == got.fell_back[i]


def test_what_is_ars_output_has_nothing_to_fall_back_on() -> None:
    model, ids = model_of(), random_rows(3, 12, V)
    for mode in ("ar", "speculative"):
        got = policy.guard(model, ids, 4, 12, policy.MODES[mode], Limits(nats=0))
        assert not got.fell_back.any()
        assert got.decoded.ids.equal(tg.decode(model, ids, 4, 12).ids)


TABLE = [
    Measured("ar", tg.AR, 4.0, 2.0, 0.0),
    Measured("refine", policy.MODES["refine"], 1.0, 5.0, 0.0),
    Measured("block", policy.MODES["block"], 2.0, 3.0, 0.0),
    Measured("remask", policy.MODES["remask"], 3.0, 3.0, 0.0),
]


def test_selection_from_a_table() -> None:
    for table in (TABLE, TABLE[::-1]):  # block ties with remask and is faster
        for seconds, mode in ((9, "ar"), (3.5, "block"), (1, "refine")):
            assert policy.select(table, seconds=seconds).mode == mode
        for nats, mode in ((2, "ar"), (3.5, "block"), (99, "refine")):
            assert policy.select(table, nats=nats).mode == mode


def test_a_target_out_of_reach_names_the_closest() -> None:
    with pytest.raises(
        tg.UserError,
        match=r"no mode keeps to seconds=0\.5; the closest is refine in 8 passes: 1 s, 5\.",
    ):
        policy.select(TABLE, seconds=0.5)
    with pytest.raises(
        tg.UserError, match=r"no mode keeps to nats=1; the closest is ar: 4 s, 2\.0000 nats a token"
    ):
        policy.select(TABLE, nats=1)


def test_candidates_can_read_what_there_is() -> None:
    modes = [
        {mode for mode, _ in policy.candidates(d, s, 9)}
        for d, s in ((1, 0), (1, 1), (0, 0), (0, 1))
    ]
    assert modes == [
        set(policy.MODES),
        set(policy.MODES) - {"ar", "speculative"},
        {"ar", "speculative"},
        set(),
    ]
    assert {how.window for _, how in policy.candidates(False, False, 9)} == {0}
    steps = [
        how.steps
        for mode, how in policy.candidates(True, True, 9, HOT)
        if mode == "refine" and how.seed == 5
    ]
    assert steps == [1, 2, 4, 8]


@pytest.mark.parametrize("recipe", ["direct", "ar"])
def test_the_choice_is_the_one_of_its_own_table(recipe: str) -> None:
    model, ids, like = model_of(recipe), random_rows(2, 12, V), tg.AR._replace(temperature=1.0)
    got = policy.choose(model, ids, 6, 12, nats=99, like=like)
    best = policy.select(got.table, nats=99)
    assert got[:4] == (best.how, best.mode, best.seconds, best.nats)
    assert {row.how.temperature for row in got.table} == {1.0}
    with pytest.raises(tg.UserError, match="give exactly one"):
        policy.choose(model, ids, 6, 12)
    with pytest.raises(tg.UserError, match="give exactly one"):
        policy.choose(model, ids, 6, 12, seconds=1, nats=1)
    with pytest.raises(tg.UserError, match=r"span 6\.\.6 of 2 rows is empty"):
        policy.choose(model, ids, 6, 6, seconds=1)

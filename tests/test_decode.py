"""Decoding: the same tokens as without a cache, the passes that are claimed, and nothing read that
must be found.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import train_gpt as tg
from scripts import policy
from scripts.objectives import expected_embedding
from tests.conftest import random_rows, randomise, tiny

V = 64
MODES = ["mask", "uniform", "hybrid", "gaussian"]
HOT: dict[str, Any] = dict(temperature=1.0, seed=3)


class Spy(tg.GPT):
    """A model that remembers its passes: ("clean", tokens) and ("window", window, logits)."""

    calls: list[tuple[Any, ...]]

    def clean(self, ids: Tensor, past: Any = None, at: Any = None) -> Any:
        self.calls.append(("clean", ids.shape[1]))
        return super().clean(ids, past, at)

    def read(self, window: tg.Window, past: Any) -> Tensor:
        logits = super().read(window, past)
        self.calls.append(("window", window, logits[:, None, :-1]))
        return logits


def model_of(recipe: str = "direct", **overrides: Any) -> Spy:
    model = Spy(tiny(recipe, **{"bigram_vocab_size": 50} | overrides))
    model.calls = []
    randomise(model, std=0.4)
    return model


def lookups(n: int) -> Any:
    return functools.partial(policy.look_up, n=n) if n else None


def windows_of(model: Spy) -> list[tuple[tg.Window, Tensor]]:
    return [(call[1], call[2]) for call in model.calls if call[0] == "window"]


@pytest.mark.parametrize(
    ("start", "stop", "length"), [(1, 12, 12), (5, 12, 12), (3, 9, 14), (11, 12, 12)]
)
@pytest.mark.parametrize("recipe", ["direct", "ar"])
def test_greedy_decoding_equals_a_loop_without_a_cache(
    recipe: str, start: int, stop: int, length: int
) -> None:
    model, ids = model_of(recipe), random_rows(3, length, V)
    expected = ids.clone()
    with torch.no_grad():
        for i in range(start, stop):
            expected[:, i] = model.clean(expected[:, :i])[0][:, -1].argmax(-1)
    assert tg.decode(model, ids, start, stop).ids.equal(expected)
    if stop == length:
        assert tg.generate(model, ids[:, :start], stop - start).ids.equal(expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("window", [0, 3, 8])
def test_given_text_stays_and_what_is_to_be_found_is_not_read(window: int, mode: str) -> None:
    model = model_of(diffusion_corruption_mode=mode)
    ids = random_rows(3, 16, V)
    kept = ids.clone()
    how = tg.Decoding(window, steps=3, **HOT)
    found = tg.decode(model, ids, 4, 12, how).ids
    assert ids.equal(kept)  # the caller's rows are theirs
    assert found[:, :4].equal(ids[:, :4])
    assert found[:, 12:].equal(ids[:, 12:])
    assert found.max() < V
    assert not found[:, 4:12].equal(ids[:, 4:12])
    other = ids.clone()
    other[:, 4:12] = (ids[:, 4:12] + 7) % V
    assert tg.decode(model, other, 4, 12, how).ids.equal(found)


@pytest.mark.parametrize("start", [1, 2, 6])
@pytest.mark.parametrize("span", [1, 5, 8])
@pytest.mark.parametrize(
    ("window", "steps"), [(0, 1), (8, 1), (8, 3), (8, 99), (4, 2), (3, 3), (1, 1)]
)
def test_the_number_of_passes_is_exact(start: int, span: int, window: int, steps: int) -> None:
    model, ids = model_of(), random_rows(2, start + span, V)
    found = tg.decode(model, ids, start, start + span, tg.Decoding(window, steps))
    sizes = [min(window, span - i) for i in range(0, span, window)] if window else []
    # The last is not read.
    expected = sum(min(steps, size) for size in sizes) + len(sizes) - 1 if window else span
    assert len(model.calls) == expected + 1  # the prompt
    assert int(found.forwards.max()) == expected


def test_an_empty_span_costs_nothing() -> None:
    model, ids = model_of(), random_rows(2, 6, V)
    for window in (0, 4):
        found = tg.decode(model, ids, 6, 6, tg.Decoding(window))
        assert found.ids.equal(ids)
        assert int(found.forwards.max()) == 0


@pytest.mark.parametrize(("span", "steps"), [(6, 6), (6, 4), (7, 2), (5, 1), (8, 3)])
def test_the_most_confident_tokens_are_committed_first_and_for_good(span: int, steps: int) -> None:
    model, ids = model_of(), random_rows(3, 4 + span + 3, V)
    found = tg.decode(model, ids, 4, 4 + span, tg.Decoding(span, steps)).ids[:, 4 : 4 + span]
    passes = windows_of(model)
    open_now = torch.ones(3, span, dtype=torch.bool)
    for i, (window, logits) in enumerate(passes):
        noisy = window.noisy
        hole, visible = noisy.corrupted[:, 0, :span], noisy.xt[:, 0, :span]
        assert hole.equal(open_now)
        assert (hole.sum(-1) == span - -(-span * i // steps)).all()  # even shares, none left over
        assert (visible[hole] == V).all()
        assert visible[~hole].equal(found[~hole])  # what was committed stays
        assert not noisy.corrupted[:, 0, span:].any()  # the text after is given
        torch.testing.assert_close(noisy.t[:, 0], hole.sum(-1) / (span + 3))
        confidence, tokens = logits[:, 0, :span].log_softmax(-1).max(-1)
        left = span - -(-span * (i + 1) // steps)
        unsure = confidence.masked_fill(~hole, 9.0).topk(left, largest=False).indices
        open_now = torch.zeros_like(hole).scatter(1, unsure, True)
        committed = hole & ~open_now
        assert found[committed].equal(tokens[committed])
    assert len(passes) == steps
    assert not open_now.any()


def test_one_token_a_pass() -> None:
    model, ids = model_of(), random_rows(2, 12, V)
    tg.decode(model, ids, 4, 12, tg.Decoding(8, 8))
    assert [window.noisy.corrupted[0].sum().item() for window, _ in windows_of(model)] == [
        8,
        7,
        6,
        5,
        4,
        3,
        2,
        1,
    ]


@pytest.mark.parametrize("sampling", [{}, HOT])
@pytest.mark.parametrize("mode", ["mask", "uniform"])
@pytest.mark.parametrize("window", [0, 4, 8])
def test_a_rows_result_does_not_depend_on_its_batch(
    window: int, mode: str, sampling: dict[str, Any]
) -> None:
    model, ids = model_of(diffusion_corruption_mode=mode), random_rows(4, 16, V)
    how = tg.Decoding(window, steps=3, **sampling)
    together = tg.decode(model, ids, 4, 12, how).ids
    assert tg.decode(model, ids[:1], 4, 12, how).ids.equal(together[:1])
    assert tg.decode(model, ids[:3], 4, 12, how).ids.equal(together[:3])


@pytest.mark.parametrize(
    "how",
    [
        policy.MODES["threshold"]._replace(threshold=0.15),
        tg.Decoding(12, steps=12, threshold=0.14, reuse=True),
        policy.MODES["remask"],
        policy.MODES["draft_refine"]._replace(redo=0.05, temperature=1.0),
    ],
)
def test_a_rows_passes_do_not_depend_on_its_batch(how: tg.Decoding) -> None:
    model = model_of()
    ids = random_rows(1, 20, V).expand(5, -1) if how.temperature else random_rows(5, 20, V)
    together = tg.decode(model, ids, 4, 16, how)
    alone = [tg.decode(model, ids[: i + 1], 4, 16, how) for i in range(5)]
    assert together.ids.equal(torch.cat([found.ids[i:] for i, found in enumerate(alone)]))
    assert together.forwards.equal(torch.cat([found.forwards[i:] for i, found in enumerate(alone)]))
    assert len(together.forwards.unique()) > 1


def test_rows_and_seeds_draw_apart() -> None:
    model, ids = model_of(), random_rows(1, 5, V).expand(20, -1)
    for window in (0, 8):
        assert len(tg.generate(model, ids, 8, tg.Decoding(window, 2)).ids.unique(dim=0)) == 1
        how = tg.Decoding(window, 2, **HOT)
        hot = tg.generate(model, ids, 8, how).ids
        assert len(hot.unique(dim=0)) == 20
        assert tg.generate(model, ids, 8, how).ids.equal(hot)
        assert not tg.generate(model, ids, 8, how._replace(seed=4)).ids.equal(hot)


FILTERS: list[dict[str, Any]] = [
    {},
    HOT,
    HOT | {"top_k": 3},
    HOT | {"top_p": 0.6},
    HOT | {"top_k": 9, "top_p": 0.9},
]


@pytest.mark.parametrize("sampling", FILTERS)
@pytest.mark.parametrize(("window", "lookup"), [(0, 1), (1, 0), (4, 0), (4, 1), (7, 2), (30, 0)])
def test_speculative_decoding_is_what_ar_would_have_said(
    window: int, lookup: int, sampling: dict[str, Any]
) -> None:
    model, ids = model_of(), random_rows(40, 5, V)
    expected = tg.generate(model, ids, 11, tg.AR._replace(**sampling))
    model.calls.clear()
    found = tg.generate(
        model, ids, 11, tg.Decoding(window, verify=True, propose=lookups(lookup), **sampling)
    )
    assert found.ids.equal(expected.ids)
    # Rows differ, so they stop agreeing at different places.
    assert len(expected.ids[:, 5:].unique(dim=0)) > 30
    assert int(found.forwards.max()) == len(model.calls) - 1  # a cycle is one pass, drafts included


@pytest.mark.parametrize("recipe", ["direct", "retrograde"])
@pytest.mark.parametrize("mode", MODES)
def test_drafts_are_those_of_a_window_of_their_own(recipe: str, mode: str) -> None:
    model, ids = model_of(recipe, diffusion_corruption_mode=mode), random_rows(3, 9, V)
    _, past = model.clean(ids[:, :5])
    room = [
        (torch.nn.functional.pad(k, (0, 0, 0, 40)), torch.nn.functional.pad(v, (0, 0, 0, 40)))
        for k, v in past
    ]
    run = tg.Decoder(model, tg.AR, room, torch.zeros(3, 1, dtype=torch.int64))
    # One token that stands, three proposals; drafts after each of them.
    at = torch.tensor([[4, 5, 6, 7]]).expand(3, -1)
    windows = torch.nn.functional.pad(ids.gather(1, at)[..., None], (0, 3))
    hole = torch.ones(3, 4, 3, dtype=torch.bool)
    with torch.no_grad():
        clean, guess = run.denoise(ids.gather(1, at), at, windows, hole, at)
        torch.testing.assert_close(clean, model.clean(ids[:, :8])[0][:, 4:], atol=1e-4, rtol=1e-4)
        for end in range(4):
            places = torch.arange(4 + end, 8 + end)
            marked = torch.ones(3, 1, 3, dtype=torch.bool)
            noisy = windows_of(model)[0][0].noisy  # noise that is random is that of the pass
            inside = slice(3 + 4 * end + 1, 3 + 4 * end + 4)
            alone = tg.Corruption(
                noisy.xt[..., inside],
                marked,
                marked,
                noisy.t,
                None if noisy.noise is None else noisy.noise[:, :, inside],
            )
            past = model.clean(ids[:, : 4 + end])[1]
            mask = (torch.arange(8 + end) <= places[:, None]) | (not model.cfg.diffusion_causal)
            expected = model.window(
                tg.Window(ids[:, None, 4 + end : 5 + end], alone, places, mask), past
            )[:, 0]
            torch.testing.assert_close(guess[:, end], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mode", ["ar", "speculative"])
def test_sampling_has_the_exact_distribution_of_the_chain_rule(mode: str) -> None:
    model, rows = model_of(vocab_size=3), 6000
    prompt = torch.tensor([[1, 2]])
    every = torch.cartesian_prod(*[torch.arange(3)] * 3)  # (27, 3)
    p = torch.exp(
        -tg.score(model, torch.cat((prompt.expand(27, -1), every), dim=1))[:, 1:].double().sum(1)
    )
    torch.testing.assert_close(p.sum(), torch.ones((), dtype=torch.float64))
    how = policy.MODES[mode]._replace(temperature=1.0, propose=lookups(int(mode == "speculative")))
    found = tg.generate(model, prompt.expand(rows, -1), 3, how).ids[:, 2:]
    count = torch.bincount((found * torch.tensor([9, 3, 1])).sum(1), minlength=27)
    assert (
        (count - rows * p) ** 2 / (rows * p)
    ).sum() < 64  # chi-square, 26 degrees of freedom: p = 5e-5


def test_lookup_proposes_what_followed_last_time() -> None:
    rows = [
        [5, 6, 7, 5, 6, 8, 9, 5, 6, 0, 0, 0],
        [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 0, 0],
        [4, 4, 4, 4, 4, 4, 4, 4, 4, 0, 0, 0],
    ]
    x, done = torch.tensor(rows), torch.full((3, 1), 9)
    found, hit = policy.look_up(x, done, 4, 2)
    assert hit[:, 0].tolist() == [True, False, True]
    assert found[0].tolist() == [8, 9, 5, 6]  # the latest place, not the first
    assert found[2].tolist() == [4, 4, 4, 4]  # it runs into the end: over and over
    found, hit = policy.look_up(x, torch.tensor([[5], [1], [2]]), 5, 2)  # rows of their own length
    assert hit[:, 0].tolist() == [True, False, False]
    assert found[0].tolist() == [7, 5, 6, 7, 5]


def test_lookup_saves_passes_where_text_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("ar")

    def clean(
        ids: Tensor, past: Any = None, at: Any = None
    ) -> Any:  # after n comes n + 1, modulo 5
        return torch.nn.functional.one_hot((ids + 1) % 5, V).float(), real(ids, past, at)[1]

    real = model.clean
    monkeypatch.setattr(model, "clean", clean)
    prompt = torch.tensor([[0, 1, 2, 3, 4, 0, 1]])
    slow, fast = (
        tg.generate(model, prompt, 40, tg.AR._replace(propose=lookups(n))) for n in (0, 2)
    )
    assert fast.ids.equal(slow.ids)
    assert slow.forwards.item() == 40
    assert fast.forwards.item() == 4  # 4, then 9, 16 and 16 proposals, and a token each


@pytest.mark.parametrize("mode", ["ar", "speculative", "refine", "block", "remask", "draft_refine"])
def test_a_row_stops_at_its_end(mode: str) -> None:
    model, ids = model_of(), random_rows(6, 5, V)
    whole = tg.generate(model, ids, 16, policy.MODES[mode])
    end = int(whole.ids[0, 11])
    found = tg.generate(model, ids, 16, policy.MODES[mode]._replace(end=end))
    for row, expected in zip(found.ids[:, 5:].tolist(), whole.ids[:, 5:].tolist(), strict=True):
        cut = expected.index(end) if end in expected else 16
        assert row[: cut + 1] == expected[: cut + 1]
        assert set(row[cut:]) <= {end}
    if mode in ("ar", "speculative"):
        assert found.forwards[0] < whole.forwards[0]
    assert end in ids or found.ids[:, :5].equal(ids)


def test_an_edit_changes_what_is_improbable_and_nothing_else() -> None:
    model, ids = model_of(), random_rows(4, 20, V)
    how = policy.MODES["draft_refine"]._replace(redo=0.01)
    nats = tg.score(model, ids)[:, 3:15]
    found = policy.edit(model, ids, 4, 16, how).ids
    hole = windows_of(model)[0][0].noisy.corrupted[:, 0, :12]
    assert hole.equal(nats > -math.log(0.01))
    assert 0 < hole.sum() < hole.numel()
    assert found[:, 4:16][~hole].equal(ids[:, 4:16][~hole])
    assert not found[:, 4:16][hole].equal(ids[:, 4:16][hole])
    assert found[:, :4].equal(ids[:, :4])
    assert found[:, 16:].equal(ids[:, 16:])
    other = torch.cat((ids[:, :16], (ids[:, 16:] + 1) % V), dim=1)
    # It reads the text after.
    assert not policy.edit(model, other, 4, 16, how).ids[:, :16].equal(found[:, :16])
    nothing = policy.edit(model, ids, 4, 16, how._replace(redo=0.0))
    assert nothing.ids.equal(ids)
    assert not nothing.forwards.any()


def test_a_draft_of_ar_is_repaired() -> None:
    model, ids = model_of(), random_rows(4, 20, V)
    written = tg.decode(model, ids, 4, 16)
    expected = policy.edit(model, written.ids, 4, 16)
    found = tg.decode(model, ids, 4, 16, policy.MODES["draft_refine"])
    assert found.ids.equal(expected.ids)
    assert found.forwards.equal(written.forwards + expected.forwards)


@pytest.mark.parametrize("mode", policy.MODES)
def test_a_watcher_is_told_of_every_pass(mode: str) -> None:
    model = model_of()
    ids = random_rows(2, 5, V)
    seen = list[Any]()
    how = policy.MODES[mode]._replace(watch=lambda *told: seen.append([x.clone() for x in told]))
    found = tg.generate(model, ids, 12, how).ids
    text, left = torch.full_like(found, -1), torch.ones_like(found, dtype=torch.bool)
    for positions, tokens, log_p, still_open in seen:
        inside = positions < 17
        for row in range(2):
            text[row, positions[row][inside[row]]] = tokens[row][inside[row]]
            left[row, positions[row][inside[row]]] = still_open[row][inside[row]]
        assert (log_p <= 0).all()
    assert text[:, 5:].equal(found[:, 5:]) or mode in ("ar", "speculative")
    assert not left[:, 5:].any() or mode == "speculative"
    assert len(seen) == sum(call[0] == "window" or mode == "ar" for call in model.calls) - (
        mode == "ar"
    ) or mode in (
        "speculative",
        "draft_refine",
    )


def test_stretched_positions_are_read_as_near_ones() -> None:
    cfg = tiny()
    places = torch.arange(16)
    near, far = (tg.rotary(n * places, cfg) for n in (1, 2))
    assert not near.equal(far)
    torch.testing.assert_close(tg.rotary(2 * places, tiny(rope_scale=2.0)), near)


def test_a_right_draft_saves_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of()
    ids = random_rows(3, 5, V)
    real = tg.Decoder.denoise
    expected = tg.generate(model, ids, 12).ids

    def denoise(
        run: Any, clean: Any, at: Any, ids: Any, hole: Tensor, first: Tensor, *rest: Any
    ) -> Any:
        logits, _ = real(run, clean, at, ids, hole, first, *rest)
        # A drafter that knows, in row 0 up to token 8 only.
        places = first[..., None] + 1 + torch.arange(hole.shape[2])
        truth = torch.nn.functional.pad(expected, (0, 8))[torch.arange(3)[:, None, None], places]
        truth[0] += (places[0] > 8).long()
        return logits, torch.nn.functional.one_hot(truth % V, V).float() * 50

    monkeypatch.setattr(tg.Decoder, "denoise", denoise)
    found = tg.generate(model, ids, 12, tg.Decoding(4, verify=True))
    assert found.ids.equal(expected)
    # Rows 1 and 2: a token, then a draft of one and a token each pass. Row 0: two such passes, then
    # one token a pass.
    assert found.forwards[:, 0].tolist() == [1 + 2 + 7, 7, 7]


def test_drafts_share_the_noise_of_what_checks_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of()
    ids = random_rows(3, 5, V)
    real = tg.Decoder.denoise
    expected = tg.generate(model, ids, 12, tg.AR._replace(**HOT)).ids
    with torch.no_grad():
        # At a place, logits of its own token.
        truth = torch.nn.functional.pad(model.clean(expected)[0], (0, 0, 1, 8))

    def denoise(
        run: Any, clean: Any, at: Any, ids: Any, hole: Tensor, first: Tensor, *rest: Any
    ) -> Any:
        places = first[..., None] + 1 + torch.arange(hole.shape[2])
        return real(run, clean, at, ids, hole, first, *rest)[0], truth[
            torch.arange(3)[:, None, None], places
        ]

    monkeypatch.setattr(tg.Decoder, "denoise", denoise)
    found = tg.generate(model, ids, 12, tg.Decoding(4, verify=True, **HOT))
    assert found.ids.equal(expected)
    assert (found.forwards < 8).all()  # as of a drafter that knows: with other noise it would guess


@pytest.mark.parametrize("threshold", [0.0, 0.14, 1.1])
def test_a_threshold_commits_what_is_sure_and_at_least_one(threshold: float) -> None:
    model, ids = model_of(), random_rows(3, 12, V)
    tg.decode(model, ids, 4, 12, tg.Decoding(8, 8, threshold=threshold))
    passes = windows_of(model)
    holes = [window.noisy.corrupted[:, 0] for window, _ in passes] + [
        torch.zeros(3, 8, dtype=torch.bool)
    ]
    for i, (_, logits) in enumerate(passes):
        sure = holes[i] & (logits[:, 0].softmax(-1).amax(-1) >= threshold)
        committed = holes[i] & ~holes[i + 1]
        assert (committed | ~sure).all()
        assert (committed.sum(1) >= holes[i].any(1).long()).all()
    assert threshold == 0.14 or len(passes) == {0.0: 1, 1.1: 8}[threshold]
    assert threshold != 0.14 or 1 < len(passes) < 8


def test_what_the_clean_stream_finds_unlikely_is_masked_again() -> None:
    model, ids = model_of(), random_rows(3, 16, V)
    tg.decode(model, ids, 4, 16, tg.Decoding(6, steps=1, redo=0.05))
    (first, logits), (second, _), *rest = windows_of(model)
    draft, again = logits[:, 0].argmax(-1), second.noisy.corrupted[:, 0]
    assert first.noisy.corrupted.all()
    assert len(rest) == 2
    nats = tg.score(model, torch.cat((ids[:, :4], draft), dim=1))[:, 3:]
    assert again.equal(nats > -math.log(0.05))
    assert 0 < again.sum() < again.numel()
    assert second.noisy.xt[:, 0][~again].equal(draft[~again])


def test_filters_keep_the_most_probable() -> None:
    logits, keys = torch.tensor([3.0, 2.0, 1.0, 0.0, -1.0]), tg.derive(torch.arange(4000))[None]
    p = logits.softmax(-1)

    def drawn(**how: Any) -> Tensor:
        tokens, _ = tg.pick(logits.expand(1, 4000, 5), tg.Decoding(temperature=1.0, **how), keys)
        return torch.bincount(tokens[0], minlength=5) / 4000

    assert (drawn()[:4] > 0).all()
    for how, left in (
        (dict(top_k=2), 2),
        (dict(top_p=0.7), 2),
        (dict(top_p=0.3), 1),
        (dict(top_k=3, top_p=0.7), 2),
    ):
        found = drawn(**how)
        assert not found[left:].any()
        torch.testing.assert_close(found[:left], p[:left] / p[:left].sum(), rtol=0, atol=0.03)


def test_an_infill_follows_its_suffix() -> None:
    model = model_of()
    prefix = random_rows(8, 5, V)
    suffix = random_rows(8, 4, V, seed=1)
    found = tg.infill(model, prefix, suffix, 6, tg.Decoding(steps=6)).ids
    assert found.shape == (8, 15)
    assert found[:, :5].equal(prefix)
    assert found[:, 11:].equal(suffix)
    (first, _), *_ = windows_of(model)
    assert first.noisy.xt.shape == (8, 1, 10)  # one window that shows the suffix
    other = tg.infill(model, prefix, (suffix + 1) % V, 6, tg.Decoding(steps=6)).ids
    assert not other[:, 5:11].equal(found[:, 5:11])
    nothing = tg.infill(model, prefix, suffix, 0)
    assert nothing.ids.equal(torch.cat((prefix, suffix), dim=1))


def test_what_fills_a_hole_is_what_was_trained() -> None:
    for mode, masked in (("mask", True), ("hybrid", True), ("uniform", False)):
        model = model_of(diffusion_corruption_mode=mode)
        tg.generate(model, random_rows(2, 5, V), 8, tg.Decoding(8, 2))
        for window, _ in windows_of(model):
            put = window.noisy.xt[window.noisy.corrupted]
            assert (put == V).all() if masked else (put < V).all()
            assert window.noisy.suspect.all() == (
                mode != "mask" or bool(window.noisy.corrupted.all())
            )


def test_the_last_prediction_is_fed_back_where_that_was_trained() -> None:
    for self_condition in ("none", "soft", "commit"):
        model = model_of(self_condition=self_condition)
        tg.generate(model, random_rows(2, 5, V), 8, tg.Decoding(8, 3))
        (first, logits), (second, _), _ = windows_of(model)
        assert first.previous is None
        if self_condition == "soft":
            assert second.previous is not None
            assert second.previous.equal(expected_embedding(model, logits))
        else:
            assert second.previous is None


def test_an_expected_embedding_is_the_mean_under_the_prediction() -> None:
    model = model_of()
    sure = torch.full((3, V), -1e9).scatter(1, torch.tensor([[5], [0], [63]]), 0.0)
    torch.testing.assert_close(
        expected_embedding(model, sure), tg.rms_norm(model.tok_emb)[[5, 0, 63]]
    )
    mean = tg.rms_norm(model.tok_emb).mean(0)
    torch.testing.assert_close(expected_embedding(model, torch.zeros(V)), mean)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_sampling_follows_the_distribution(temperature: float) -> None:
    logits, count = torch.tensor([2.0, 1.0, 0.0, -1.0, -30.0]), 40_000
    keys = tg.derive(torch.arange(count), 8).view(100, 400)
    tokens, log_p = tg.pick(logits.expand(100, 400, 5), tg.Decoding(temperature=temperature), keys)
    expected = (logits.double() / temperature).softmax(-1) * count
    found = torch.bincount(tokens.flatten(), minlength=5)
    assert found[4] == 0
    assert ((found - expected) ** 2 / expected)[
        :4
    ].sum() < 25  # chi-square, 3 degrees of freedom: p = 1e-5
    # Confidence is the model's own, untempered.
    assert log_p.equal(logits.double().log_softmax(-1)[tokens])
    neighbours = torch.bincount((tokens[:, :-1] * 5 + tokens[:, 1:]).flatten(), minlength=25).view(
        5, 5
    )
    p = expected / count
    joint = p[:, None] * p * neighbours.sum()
    assert ((neighbours - joint) ** 2 / joint)[:4, :4].sum() < 60  # 15 degrees of freedom


def test_temperature_zero_takes_the_likeliest() -> None:
    logits = torch.randn(4, 7, V)
    tokens, log_p = tg.pick(logits, tg.Decoding(), torch.zeros(4, 7, dtype=torch.int64))
    assert tokens.equal(logits.argmax(-1))
    torch.testing.assert_close(
        log_p, logits.double().log_softmax(-1).amax(-1), atol=1e-6, rtol=1e-6
    )
    cold, _ = tg.pick(logits, tg.Decoding(temperature=1e-3), tg.derive(torch.arange(28)).view(4, 7))
    assert cold.equal(tokens)


@pytest.mark.parametrize(("start", "stop"), [(0, 4), (-1, 4), (3, 9), (5, 4), (9, 9)])
@pytest.mark.parametrize("window", [0, 4])
def test_a_span_outside_the_rows_is_named(start: int, stop: int, window: int) -> None:
    with pytest.raises(tg.UserError, match=rf"span {start}\.\.{stop} must lie in 1\.\.8"):
        tg.decode(model_of(), random_rows(2, 8, V), start, stop, tg.Decoding(window))


def test_an_empty_prompt_is_named() -> None:
    with pytest.raises(tg.UserError, match="BOS will do"):
        tg.generate(model_of(), torch.zeros(1, 0, dtype=torch.int64), 4)


def test_a_model_without_a_denoiser_says_so() -> None:
    model, prompt = model_of("ar"), random_rows(1, 4, V)
    with pytest.raises(tg.UserError, match=r"no trained denoiser \(DIFFUSION_LOSS_WEIGHT=0\)"):
        tg.generate(model, prompt, 4, tg.Decoding(4))
    with pytest.raises(tg.UserError, match="no trained denoiser"):
        tg.infill(model, prompt, prompt, 4)
    assert tg.generate(model, prompt, 4).ids.shape == (1, 8)


@pytest.mark.parametrize("pairs", [0, 50])
@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize(("steps", "suffix"), [(2, 0), (5, 3), (11, 3)])
def test_kept_keys_change_nothing_where_they_depend_on_their_own_tokens_only(
    shift: bool, steps: int, suffix: int, pairs: int
) -> None:
    model = model_of(num_layers=1, look_ahead=0, diffusion_shift=shift, bigram_vocab_size=pairs)
    ids = random_rows(3, 15 + suffix, V)
    how = tg.Decoding(steps=steps)
    whole = tg.decode(model, ids, 4, 15, how)
    model.calls.clear()
    kept = tg.decode(model, ids, 4, 15, how._replace(reuse=True))
    assert kept.ids.equal(whole.ids)
    assert kept.forwards.equal(whole.forwards)
    read = [12 + suffix if w.only is None else w.only.shape[1] for w, _ in windows_of(model)]
    assert read[0] == 12 + suffix  # the first pass leaves the keys that later ones read
    # Each, the one before it, and the one after where pairs are inputs.
    changed = 11 - 11 * (steps - 2) // steps
    assert read[-1] <= min((3 if pairs else 2) * changed, 12 + suffix - (steps > 2))

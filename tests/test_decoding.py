"""Decoding modes: lossless where they claim it, slow references of the others, guard and choice.

Models are float64, as in test_decode.py, so that the shape of a pass does not change its tokens.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import train_gpt as tg
from scripts import decoding as dec
from scripts.decoding import LIMITS, MODES, Decoding, Limits, Measured, Quality, Target
from tests.conftest import random_rows, tiny
from tests.test_chain import random_head
from tests.test_decode import autoregressive, model_of

V = 64
CORRUPTION = ["mask", "uniform", "hybrid", "gaussian"]
WINDOWED = [mode for mode in MODES if mode not in dec.LOSSLESS]
HOT = dec.Sampling(temperature=1.0, seed=3)
SAMPLINGS = [
    dec.GREEDY,
    HOT,
    HOT._replace(top_k=3),
    HOT._replace(top_p=0.6),
    HOT._replace(top_k=9, top_p=0.9),
]


def mode_of(mode: str, sampling: dec.Sampling = dec.GREEDY, **settings: Any) -> Decoding:
    return MODES[mode]._replace(sampling=sampling, **settings)


def close(found: Tensor, expected: Tensor) -> None:
    """Compare logits of a float64 model: they differ by the softcap's float32 operations."""
    bound = 8 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(found, expected, rtol=bound, atol=bound * tiny().logit_softcap)


# ---- speculative decoding ----

MODELS: list[dict[str, Any]] = [
    {},
    {"bigram_vocab_size": 0, "look_ahead": 0},
    {"value_residual": True},
    {"self_condition": "soft", "time_embed_dim": 0},
    {"diffusion_shift": False},
    {"diffusion_causal": True},
    *({"diffusion_corruption_mode": mode} for mode in CORRUPTION[1:]),
]


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize(
    ("window", "lookup"), [(0, 0), (0, 1), (1, 0), (4, 0), (4, 1), (7, 2), (30, 0)]
)
def test_speculative_output_equals_autoregressive(
    window: int, lookup: int, sampling: dec.Sampling
) -> None:
    model, ids = model_of(), random_rows(40, 16, V)
    expected = autoregressive(model, ids, 5, 16, sampling)
    model.passes.clear()
    decoding = Decoding("speculative", window, lookup_ngram=lookup, sampling=sampling)
    found = dec.decode(model, ids, 5, 16, decoding)
    assert found.ids.equal(expected.ids)
    rows = expected.ids[:, 5:].unique(dim=0)
    assert len(rows) > 30  # rows differ, so they reject drafts at different places
    assert int(found.forwards.max()) == len(model.passes) - 1  # verifying and drafting share a pass


@pytest.mark.parametrize("mode", ["ar", "speculative", "block", "refine", "remask"])
def test_noise_that_is_drawn_at_once_is_that_of_each_pass(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = model_of(), random_rows(3, 25, V)
    stop = 25 if mode in dec.LOSSLESS else 19
    decoding = mode_of(mode, HOT, window=4, head=random_head(model))
    found, drawn = dec.decode(model, ids, 5, stop, decoding).ids, list[int]()
    draw = dec.draw_noise

    def counted(keys: Tensor, *rest: Any) -> Tensor | None:
        drawn.append(keys.shape[1])
        return draw(keys, *rest)

    monkeypatch.setattr(dec, "draw_noise", counted)
    assert dec.decode(model, ids, 5, stop, decoding).ids.equal(found)
    assert len(drawn) == 1
    monkeypatch.setattr(dec, "NOISE_NUMBERS", 0)
    assert dec.decode(model, ids, 5, stop, decoding).ids.equal(found)
    assert len(drawn) > 5


@pytest.mark.slow
@pytest.mark.parametrize("overrides", MODELS)
@pytest.mark.parametrize("sampling", [dec.GREEDY, HOT])
def test_speculative_is_lossless_for_every_kind_of_model(
    sampling: dec.Sampling, overrides: dict[str, Any]
) -> None:
    model, ids = model_of(**overrides), random_rows(8, 21, V)
    expected = autoregressive(model, ids, 5, 21, sampling).ids
    for window in (2, 6):
        decoding = mode_of("speculative", sampling, window=window, lookup_ngram=1)
        assert dec.decode(model, ids, 5, 21, decoding).ids.equal(expected)
        for batch in (1, 5):
            found = dec.decode(model, ids[:batch], 5, 21, decoding).ids
            assert found.equal(expected[:batch])


@pytest.mark.parametrize("draft", ["window", "head"])
@pytest.mark.parametrize("sampling", [dec.GREEDY, HOT])
@pytest.mark.parametrize(("bigrams", "lookup"), [(0, 0), (50, 0), (50, 1)])
def test_speculative_is_lossless_with_a_sequential_head(
    bigrams: int, lookup: int, sampling: dec.Sampling, draft: str
) -> None:
    model, ids = model_of(bigram_vocab_size=bigrams), random_rows(8, 21, V)
    expected = autoregressive(model, ids, 5, 21, sampling).ids
    settings = {"lookup_ngram": lookup, "draft": draft, "head": random_head(model)}
    for window, count in ((1, 8), (2, 8), (6, 5), (6, 1)):
        decoding = mode_of("speculative", sampling, window=window, **settings)
        found = dec.decode(model, ids[:count], 5, 21, decoding)
        assert found.ids.equal(expected[:count])
        assert dec.decode(model, ids[:, :1], 1, 1, decoding).ids.equal(ids[:, :1])


@pytest.mark.parametrize("sampling", [dec.GREEDY, HOT])
def test_drafts_of_a_head_that_knows_the_next_token_are_accepted(
    sampling: dec.Sampling, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = model_of(), random_rows(3, 17, V)
    head = random_head(model)
    expected = autoregressive(model, ids, 5, 17, sampling).ids
    with torch.no_grad():
        logits = model.forward_causal(expected)[0]  # each predicts the next token

    def step(before: Tensor, token: Tensor) -> Tensor:  # what follows this pair of the text
        rows = [
            next(i for i in range(16) if text[i - 1 : i + 1] == pair and i >= 4)
            if (pair := [int(b), int(t)]) in [text[i - 1 : i + 1] for i in range(4, 16)]
            else 0
            for text, b, t in zip(expected.tolist(), before, token, strict=True)
        ]
        return logits[torch.arange(3), torch.tensor(rows)]

    monkeypatch.setattr(head, "step", step)
    head.prior.requires_grad_(False).zero_()
    decoding = mode_of("speculative", sampling, window=3, lookup_ngram=0, head=head)
    found = dec.decode(model, ids, 5, 17, decoding)
    assert found.ids.equal(expected)
    assert int(found.forwards.max()) <= 12 // 4  # four tokens a pass


def test_drafts_of_a_head_get_shorter_while_they_are_not_accepted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, ids, lengths = model_of(), random_rows(1, 17, V), list[int]()
    expected = autoregressive(model, ids, 5, 17, dec.GREEDY).ids

    def draft(_: object, known: Tensor, *rest: Any) -> Tensor:
        lengths.append(rest[2])
        place = 5 + len(lengths) - 1  # none has been accepted
        text = torch.cat((expected, expected), dim=1)  # long enough for drafts beyond the span
        return (text[:, place : place + rest[2]] + 1) % V  # every token is wrong

    monkeypatch.setattr(dec, "draft_by_head", draft)
    decoding = mode_of("speculative", window=4, lookup_ngram=0, head=random_head(model))
    assert dec.decode(model, ids, 5, 17, decoding).ids.equal(expected)
    assert lengths == [4, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("sampling", [dec.GREEDY, HOT])
def test_speculative_stops_rows_where_autoregressive_does(sampling: dec.Sampling) -> None:
    model, ids = model_of(), random_rows(6, 21, V)
    whole = autoregressive(model, ids, 5, 21, sampling)
    sampling = sampling._replace(end=int(whole.ids[0, 12]))
    expected = autoregressive(model, ids, 5, 21, sampling)
    found = dec.decode(model, ids, 5, 21, mode_of("speculative", sampling))
    assert found.ids.equal(expected.ids)
    assert (found.forwards <= expected.forwards).all()
    assert int(expected.forwards[0]) < 16


def test_speculative_samples_have_the_distribution_of_the_chain_rule() -> None:
    model, num_rows = model_of(vocab_size=3), 6000
    prompt = torch.tensor([[1, 2]])
    every = torch.cartesian_prod(*[torch.arange(3)] * 3)  # (27, 3)
    texts = torch.cat((prompt.expand(27, -1), every), dim=1)
    p = torch.exp(-tg.token_nll_causal(model, texts)[:, 1:].double().sum(1))
    decoding = mode_of("speculative", dec.Sampling(temperature=1.0), lookup_ngram=1)
    found = dec.generate(model, prompt.expand(num_rows, -1), 3, decoding).ids[:, 2:]
    count = torch.bincount((found * torch.tensor([9, 3, 1])).sum(1), minlength=27)
    chi_square = ((count - num_rows * p) ** 2 / (num_rows * p)).sum()
    assert chi_square < 64  # 26 degrees of freedom: p = 5e-5


def prepared_run(model: tg.GPT, ids: Tensor, room: int = 60) -> dec.Run:
    cache = tg.fill_cache(model, ids, room)
    return dec.Run(model, MODES["speculative"], cache, dec.row_keys(ids, 0))


def drafts_after(ids: Tensor, positions: Tensor, size: int) -> dec.MaskedWindows:
    tokens = F.pad(ids.gather(1, positions)[..., None], (0, size))
    masked = torch.ones_like(tokens[..., 1:], dtype=torch.bool)
    return dec.MaskedWindows(tokens, masked, positions)


@pytest.mark.parametrize("recipe", ["direct", "retrograde"])
@pytest.mark.parametrize("mode", CORRUPTION)
@torch.no_grad()
def test_a_combined_pass_equals_separate_passes(mode: str, recipe: str) -> None:
    model, ids = model_of(recipe, diffusion_corruption_mode=mode), random_rows(3, 9, V)
    run = prepared_run(model, ids[:, :5])
    positions = torch.arange(4, 8).expand(3, -1)  # the last known token and three draft tokens
    windows = drafts_after(ids, positions, 3)
    clean, guesses = dec.combined_pass(run, ids.gather(1, positions), positions, windows)
    close(clean, model.forward_causal(ids[:, :8])[0][:, 4:])
    noisy = model.denoised()[0][0].noisy  # its random tokens and noise are those of the pass
    for w in range(4):
        own = slice(4 + 4 * w, 7 + 4 * w)  # without the first token of the input
        marked = torch.ones(3, 1, 3, dtype=torch.bool)
        noise = None if noisy.noise is None else noisy.noise[:, :, own]
        alone = tg.Corruption(noisy.xt[..., own], marked, marked, noisy.t, noise)
        places = torch.arange(4 + w, 8 + w)
        cache = model.forward_causal(ids[:, : 4 + w])[1]
        mask = (torch.arange(8 + w) <= places[:, None]) | (not model.cfg.diffusion_causal)
        before = ids[:, None, 4 + w : 5 + w]
        expected = model.forward_denoise(tg.WindowInput(before, alone, places, mask), cache)
        close(guesses[:, w], expected[:, 0])


@torch.no_grad()
def test_windows_of_a_combined_pass_do_not_read_each_other() -> None:
    model, ids = model_of(), random_rows(2, 24, V)
    run = prepared_run(model, ids[:, :9])
    positions = torch.arange(9, 12).expand(2, -1)  # the windows overlap
    clean = ids.gather(1, positions)
    together = dec.combined_pass(run, clean, positions, drafts_after(ids, positions, 5))[1]
    for w in range(3):
        windows = drafts_after(ids, positions[:, w : w + 1], 5)
        alone = dec.combined_pass(run, clean, positions, windows)[1]
        close(together[:, w], alone[:, 0])


def test_a_perfect_draft_saves_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids, real = model_of(), random_rows(3, 17, V), dec.combined_pass
    expected = autoregressive(model, ids, 5, 17).ids

    def combined_pass(*args: Any) -> tuple[Tensor, Tensor]:
        windows = args[3]
        places = windows.first[..., None] + 1 + torch.arange(windows.masked.shape[2])
        truth = F.pad(expected, (0, 8))[torch.arange(3)[:, None, None], places]
        truth[0] += (places[0] > 8).long()  # row 0: right up to token 8 only
        return real(*args)[0], F.one_hot(truth % V, V).float() * 50

    monkeypatch.setattr(dec, "combined_pass", combined_pass)
    found = dec.decode(model, ids, 5, 17, mode_of("speculative", lookup_ngram=0))
    assert found.ids.equal(expected)
    # Rows 1, 2: one token, then a draft of one token and another each pass. Row 0 has two such
    # passes, then one token per pass.
    assert found.forwards[:, 0].tolist() == [1 + 2 + 7, 7, 7]


def test_drafts_are_sampled_with_the_noise_that_verifies_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, ids, real = model_of(), random_rows(3, 17, V), dec.combined_pass
    expected = autoregressive(model, ids, 5, 17, HOT).ids
    with torch.no_grad():
        truth = F.pad(model.forward_causal(expected)[0], (0, 0, 1, 8))  # at a token, its own logits

    def combined_pass(*args: Any) -> tuple[Tensor, Tensor]:
        windows = args[3]
        places = windows.first[..., None] + 1 + torch.arange(windows.masked.shape[2])
        return real(*args)[0], truth[torch.arange(3)[:, None, None], places]

    monkeypatch.setattr(dec, "combined_pass", combined_pass)
    found = dec.decode(model, ids, 5, 17, mode_of("speculative", HOT, lookup_ngram=0))
    assert found.ids.equal(expected)
    assert (found.forwards < 8).all()  # as with a perfect draft; with other noise drafts fail


def test_look_up_drafts_what_followed_the_latest_occurrence() -> None:
    tokens = torch.tensor(
        [
            [5, 6, 7, 5, 6, 8, 9, 5, 6, 0, 0, 0],
            [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 0, 0],
            [4, 4, 4, 4, 4, 4, 4, 4, 4, 0, 0, 0],
        ]
    )
    draft, found = dec.look_up(tokens, torch.full((3, 1), 9), 4, 2)
    assert found[:, 0].tolist() == [True, False, True]
    assert draft[0].tolist() == [8, 9, 5, 6]
    assert draft[2].tolist() == [4, 4, 4, 4]  # what follows is too short and is repeated
    draft, found = dec.look_up(tokens, torch.tensor([[5], [1], [2]]), 5, 2)
    assert found[:, 0].tolist() == [True, False, False]
    assert draft[0].tolist() == [7, 5, 6, 7, 5]


def test_lookup_saves_passes_in_repetitive_text(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("ar")
    real = model.forward_causal

    def forward_causal(ids: Tensor, *args: Any) -> tuple[Tensor, tg.Cache]:
        return F.one_hot((ids + 1) % 5, V).float(), real(ids, *args)[1]  # after n comes n + 1

    monkeypatch.setattr(model, "forward_causal", forward_causal)
    prompt = torch.tensor([[0, 1, 2, 3, 4, 0, 1]])
    slow = dec.generate(model, prompt, 40)
    fast = dec.generate(model, prompt, 40, mode_of("speculative", window=0))
    assert fast.ids.equal(slow.ids)
    assert slow.forwards.item() == 40
    assert fast.forwards.item() == 4  # 4, 9, 16 and 16 draft tokens, and one more token each


def test_draft_length_follows_the_acceptance_rate() -> None:
    rate = dec.AcceptanceRate(accepted=0.3, decay=0.75, extra=0.5, least=0, most=4)
    lengths = [rate.draft_length()]
    for accepted in (0, 0, 4, 4, 4, 4):
        rate.update(torch.tensor([accepted, accepted]))
        lengths.append(rate.draft_length())
    assert lengths == [1, 0, 0, 2, 4, 4, 4]  # round(2 x average), at most 4


# ---- windows against a slow reference ----


class Slow:
    """Decodes one row (L,) by definition: no static cache, one window's pass at a time."""

    def __init__(self, model: tg.GPT, decoding: Decoding, key: Tensor) -> None:
        self.model = model
        self.decoding = decoding
        self.key = key  # (1, 1)
        self.passes = 0

    def predict(self, text: list[int], window: list[int], left: list[int], step: int) -> Tensor:
        """Logits (S, V) of a window after `text`, of which the tokens `left` are masked."""
        cfg, start, size = self.model.cfg, len(text), len(window)
        x = torch.tensor([[window]])
        masked = torch.zeros_like(x, dtype=torch.bool)
        masked[0, 0, left] = True
        t = torch.tensor([[max(len(left) / size, 1e-6)]])
        mask_share = float(cfg.diffusion_corruption_mode != "uniform")
        key = tg.split_key(self.key, start - 1, step)
        noisy = tg.apply_noise(x, masked, t, key, cfg, mask_share)
        known, positions = torch.tensor([text]), torch.arange(start - 1, start + size)
        mask = torch.ones(size + 1, start + size, dtype=torch.bool)
        if cfg.diffusion_causal:
            mask = mask.tril(start - 1)
        cache = self.model.forward_causal(known[:, :-1])[1] if start > 1 else None
        inputs = tg.WindowInput(known[:, None, -1:], noisy, positions, mask)
        self.passes += 1
        return self.model.forward_denoise(inputs, cache)[0, 0]

    def fill(self, text: list[int], window: list[int], left: list[int], num: int) -> list[int]:
        """Fill the tokens `left` of a window whose first `num` tokens are the span's."""
        window, total, step = list(window), len(left), 0
        keys = tg.split_key(self.key, torch.arange(len(text), len(text) + len(window)))
        steps = min(self.decoding.steps, total)
        while left:
            logits = self.predict(text, window, left, step)
            step += 1
            tokens, log_p = dec.sample_tokens(logits[None], self.decoding.sampling, keys)
            hidden, head = left, self.decoding.head
            num_left = total - math.ceil(total * step / steps)
            left = sorted(left, key=lambda i: log_p[0, i].item())[:num_left]
            left = [i for i in left if log_p[0, i].exp() < self.decoding.threshold]
            decided = {*hidden} - {*left}
            for i in sorted(decided):
                window[i] = int(tokens[0, i])
                if head is not None and i - 1 in decided:
                    before = [V if j in left else window[j] for j in range(i)]
                    scores = logits[i] + head(torch.tensor([[text[-1], *before]]))[0, -1]
                    key = keys[:, i : i + 1]
                    found = dec.sample_tokens(scores[None, None], self.decoding.sampling, key)
                    window[i] = int(found[0])
        return window[:num]

    def low(self, text: list[int], window: list[int]) -> list[int]:
        """Read a window causally, and find the tokens below `remask_threshold`."""
        self.passes += 1
        nll = tg.token_nll_causal(self.model, torch.tensor([text + window]))[0, len(text) - 1 :]
        p = nll.neg().exp()
        return [i for i in range(len(window)) if p[i] < self.decoding.remask_threshold]

    def decode(self, row: list[int], start: int, stop: int) -> list[int]:
        text, end = row[:start], self.decoding.sampling.end
        while len(text) < stop:
            size = min(self.decoding.window, stop - len(text))
            is_last = len(text) + size == stop
            suffix = row[stop:] if is_last else []
            window = row[len(text) : len(text) + size]
            if self.decoding.mode != "edit":
                window = self.fill(text, window + suffix, list(range(size)), size)
            if self.decoding.mode in ("edit", "remask"):
                low = self.low(text, window)
                window = self.fill(text, window + suffix, low, size)
            self.passes += not is_last  # the window enters the cache
            text = text + window
            if end in text[start:]:
                cut = text.index(end, start)
                text = text[:cut] + [end] * (stop - cut)
        return text + row[stop:]


REFERENCE_SETTINGS: dict[str, dict[str, Any]] = {
    "refine": dict(steps=3),
    "block": dict(window=5, steps=3),
    "threshold": dict(window=6, threshold=0.12),
    "remask": dict(window=5, steps=2, remask_threshold=0.05),
    "edit": dict(window=7, steps=3, remask_threshold=0.05),
}


@pytest.mark.slow
@pytest.mark.parametrize("sampling", [dec.GREEDY, HOT, HOT._replace(end=7)])
@pytest.mark.parametrize("corruption", CORRUPTION)
@pytest.mark.parametrize("mode", REFERENCE_SETTINGS)
@torch.no_grad()
def test_windowed_modes_equal_the_slow_reference(
    mode: str, corruption: str, sampling: dec.Sampling
) -> None:
    model, ids = model_of(diffusion_corruption_mode=corruption), random_rows(4, 21, V)
    decoding = Decoding(mode, sampling=sampling, **REFERENCE_SETTINGS[mode])
    found = dec.decode(model, ids, 4, 18, decoding)
    keys = dec.row_keys(ids, sampling.seed)
    for row in range(4):
        slow = Slow(model, decoding, keys[row : row + 1])
        assert found.ids[row].tolist() == slow.decode(ids[row].tolist(), 4, 18)
        assert found.forwards[row].item() == slow.passes


@pytest.mark.slow
@pytest.mark.parametrize("sampling", [dec.GREEDY, HOT])
@pytest.mark.parametrize("mode", REFERENCE_SETTINGS)
@torch.no_grad()
def test_windows_with_a_head_equal_the_slow_reference(mode: str, sampling: dec.Sampling) -> None:
    model, ids = model_of(bigram_vocab_size=50), random_rows(4, 21, V)
    head = random_head(model)
    decoding = Decoding(mode, sampling=sampling, head=head, **REFERENCE_SETTINGS[mode])
    found = dec.decode(model, ids, 4, 18, decoding)
    without = dec.decode(model, ids, 4, 18, decoding._replace(head=None))
    assert not found.ids.equal(without.ids)
    keys = dec.row_keys(ids, sampling.seed)
    for row in range(4):
        slow = Slow(model, decoding, keys[row : row + 1])
        assert found.ids[row].tolist() == slow.decode(ids[row].tolist(), 4, 18)
        assert found.forwards[row].item() == slow.passes


@pytest.mark.parametrize("overrides", [{"diffusion_shift": False}, {"diffusion_causal": True}])
@pytest.mark.parametrize("mode", REFERENCE_SETTINGS)
@torch.no_grad()
def test_models_of_other_kinds_equal_the_slow_reference(
    mode: str, overrides: dict[str, Any]
) -> None:
    model, ids = model_of(**overrides), random_rows(2, 21, V)
    decoding = Decoding(mode, **REFERENCE_SETTINGS[mode])
    found = dec.decode(model, ids, 4, 18, decoding)
    for row in range(2):
        slow = Slow(model, decoding, dec.row_keys(ids, 0)[row : row + 1])
        assert found.ids[row].tolist() == slow.decode(ids[row].tolist(), 4, 18)
        assert found.forwards[row].item() == slow.passes


@pytest.mark.parametrize("overrides", [{}, {"self_condition": "soft"}])
@pytest.mark.parametrize("corruption", CORRUPTION)
def test_refine_equals_the_decoder_of_train_gpt(corruption: str, overrides: dict[str, Any]) -> None:
    model, ids = model_of(diffusion_corruption_mode=corruption, **overrides), random_rows(3, 21, V)
    found = dec.decode(model, ids, 4, 18, mode_of("refine"))
    assert found.ids.equal(tg.decode_refine(model, ids, 4, 18, 8))
    assert found.forwards.tolist() == [[8]] * 3


# ---- properties of all modes ----


@pytest.mark.slow
@pytest.mark.parametrize("corruption", CORRUPTION)
@pytest.mark.parametrize("mode", MODES)
def test_text_around_the_span_is_kept_and_the_span_is_not_read(mode: str, corruption: str) -> None:
    model, ids = model_of(diffusion_corruption_mode=corruption), random_rows(3, 18, V)
    original, decoding = ids.clone(), mode_of(mode, HOT)
    found = dec.decode(model, ids, 4, 14, decoding).ids
    assert ids.equal(original)
    assert found[:, :4].equal(ids[:, :4])
    assert found[:, 14:].equal(ids[:, 14:])
    assert found.max() < V
    other = ids.clone()
    other[:, 4:14] = (ids[:, 4:14] + 7) % V
    assert dec.decode(model, other, 4, 14, decoding).ids.equal(found)


@pytest.mark.parametrize(
    "decoding",
    [
        mode_of("threshold", threshold=0.15),
        mode_of("refine_cached", steps=12, threshold=0.14),
        MODES["remask"],
        mode_of("draft_refine", HOT._replace(seed=0), remask_threshold=0.05),
    ],
)
def test_output_and_forwards_of_a_row_do_not_depend_on_the_batch(decoding: Decoding) -> None:
    model, ids = model_of(), random_rows(5, 20, V)
    together = dec.decode(model, ids, 4, 16, decoding)
    assert len(together.forwards.unique()) > 1
    for row in range(5):
        other = random_rows(5, 20, V, seed=1 + row)[: row + 2]
        other[row] = ids[row]
        found = dec.decode(model, other, 4, 16, decoding)
        assert found.ids[row].equal(together.ids[row])
        assert found.forwards[row].equal(together.forwards[row])


@pytest.mark.parametrize("mode", MODES)
def test_rows_and_seeds_have_different_noise(mode: str) -> None:
    model, ids = model_of(), random_rows(1, 5, V).expand(20, -1)
    assert len(dec.generate(model, ids, 8, MODES[mode]).ids.unique(dim=0)) == 1
    sampled = dec.generate(model, ids, 8, mode_of(mode, HOT)).ids
    assert len(sampled.unique(dim=0)) == 20
    other_seed = dec.generate(model, ids, 8, mode_of(mode, HOT._replace(seed=4))).ids
    assert not other_seed.equal(sampled)


@pytest.mark.parametrize("start", [1, 2, 6])
@pytest.mark.parametrize("span", [1, 5, 8])
@pytest.mark.parametrize(("window", "steps"), [(8, 1), (8, 3), (8, 99), (4, 2), (3, 3), (1, 1)])
def test_the_number_of_forwards_is_exact(start: int, span: int, window: int, steps: int) -> None:
    model, ids = model_of(), random_rows(2, start + span, V)
    decoding = Decoding("block", window, steps)
    found = dec.decode(model, ids, start, start + span, decoding)
    sizes = [min(window, span - i) for i in range(0, span, window)]
    expected = sum(min(steps, size) for size in sizes)
    expected += len(sizes) - 1  # the last window does not enter the cache
    assert len(model.passes) == expected + 1  # the prompt
    assert found.forwards.tolist() == [[expected]] * 2


@pytest.mark.parametrize("mode", MODES)
def test_an_empty_span_takes_no_pass(mode: str) -> None:
    model, ids = model_of(), random_rows(2, 6, V)
    for stop in (6, 3):
        found = dec.decode(model, ids, stop, stop, MODES[mode])
        assert found.ids.equal(ids)
        assert found.forwards.tolist() == [[0], [0]]


@pytest.mark.parametrize("mode", MODES)
def test_an_end_token_is_repeated_to_the_end_of_the_span(mode: str) -> None:
    model, ids = model_of(), random_rows(6, 21, V)
    end = int(dec.decode(model, ids, 5, 21, MODES[mode]).ids[0, 16])
    ids[1, 2] = end  # an end token of the prompt ends nothing
    whole = dec.decode(model, ids, 5, 21, MODES[mode]).ids
    found = dec.decode(model, ids, 5, 21, mode_of(mode, dec.Sampling(end=end))).ids
    for row, expected in zip(found[:, 5:].tolist(), whole[:, 5:].tolist(), strict=True):
        cut = expected.index(end) if end in expected else 16
        assert set(row[row.index(end) if end in row else 16 :]) <= {end}
        if mode != "draft_refine":  # there the draft ends, too, and its revision reads it
            assert row[: cut + 1] == expected[: cut + 1]
    assert found[:, :5].equal(ids[:, :5])


@pytest.mark.parametrize("threshold", [0.0, 0.14, 1.1])
def test_threshold_unmasks_all_confident_tokens_and_at_least_one(threshold: float) -> None:
    model, ids = model_of(), random_rows(3, 12, V)
    dec.decode(model, ids, 4, 12, mode_of("threshold", threshold=threshold))
    passes = model.denoised()
    masked = [window.noisy.corrupted[:, 0] for window, _ in passes]
    masked.append(torch.zeros(3, 8, dtype=torch.bool))
    for i, (_, logits) in enumerate(passes):
        confident = logits[:, :8].softmax(-1).amax(-1) >= threshold
        unmasked = masked[i] & ~masked[i + 1]
        assert (unmasked | ~(masked[i] & confident)).all()
        assert (unmasked.sum(1) >= masked[i].any(1).long()).all()
    least, most = {0.0: (1, 1), 0.14: (2, 7), 1.1: (8, 8)}[threshold]
    assert least <= len(passes) <= most


def test_only_the_last_window_reads_the_suffix() -> None:
    model, ids = model_of(), random_rows(64, 20, V)
    decoding = Decoding("block", window=4, steps=2, sampling=HOT)
    found = dec.decode(model, ids, 5, 13, decoding).ids
    other = torch.cat((ids[:, :13], (ids[:, 13:] + 1) % V), dim=1)
    again = dec.decode(model, other, 5, 13, decoding).ids
    assert again[:, :9].equal(found[:, :9])
    assert not again[:, 9:13].equal(found[:, 9:13])


@pytest.mark.parametrize("mode", WINDOWED)
def test_infill_reads_its_suffix(mode: str) -> None:
    model, prefix, suffix = model_of(), random_rows(8, 5, V), random_rows(8, 4, V, seed=1)
    decoding = mode_of(mode, HOT, remask_threshold=0.1)  # improbable samples are remasked
    found = dec.infill(model, prefix, suffix, 6, decoding).ids
    assert found.shape == (8, 15)
    assert found[:, :5].equal(prefix)
    assert found[:, 11:].equal(suffix)
    other = dec.infill(model, prefix, (suffix + 1) % V, 6, decoding).ids
    assert not other[:, 5:11].equal(found[:, 5:11])
    nothing = dec.infill(model, prefix, suffix, 0, decoding)
    assert nothing.ids.equal(torch.cat((prefix, suffix), dim=1))


@pytest.mark.parametrize("mode", MODES)
def test_watching_reports_every_pass_and_changes_nothing(mode: str) -> None:
    model, ids, seen = model_of(), random_rows(2, 17, V), list[list[Tensor]]()
    expected = dec.decode(model, ids, 5, 17, MODES[mode])
    model.passes.clear()
    found = dec.decode(model, ids, 5, 17, MODES[mode], lambda *report: seen.append(list(report)))
    assert found.ids.equal(expected.ids)
    assert found.forwards.equal(expected.forwards)
    text, masked = torch.full((2, 40), -1), torch.ones(2, 40, dtype=torch.bool)
    for positions, tokens, log_p, still_masked in seen:
        text, masked = (
            text.scatter(1, positions, tokens),
            masked.scatter(1, positions, still_masked),
        )
        assert (log_p <= 0).all()
    assert text[:, 5:17].equal(found.ids[:, 5:]) or mode in dec.LOSSLESS
    assert not masked[:, 5:17].any() or mode == "speculative"
    num_denoised, num_causal = len(model.denoised()), len(model.passes) - len(model.denoised())
    if mode == "ar":
        assert len(seen) == num_causal - 1  # the prompt
    elif mode not in ("speculative", "draft_refine"):
        assert len(seen) == num_denoised


# ---- revision ----


def test_remask_masks_what_is_improbable_under_the_causal_stream() -> None:
    model, ids = model_of(), random_rows(3, 16, V)
    dec.decode(model, ids, 4, 16, mode_of("remask", window=6, steps=1, remask_threshold=0.05))
    (first, logits), (second, _), *others = model.denoised()
    draft, remasked = logits[:, :6].argmax(-1), second.noisy.corrupted[:, 0]
    assert first.noisy.corrupted.all()
    assert len(others) == 2
    nll = tg.token_nll_causal(model, torch.cat((ids[:, :4], draft), dim=1))[:, 3:]
    assert remasked.equal(nll > -math.log(0.05))
    assert 0 < remasked.sum() < remasked.numel()
    assert second.noisy.xt[:, 0][~remasked].equal(draft[~remasked])


def test_edit_changes_improbable_tokens_and_nothing_else() -> None:
    model, ids = model_of(), random_rows(4, 20, V)
    decoding = mode_of("draft_refine", remask_threshold=0.01)
    nll = tg.token_nll_causal(model, ids)[:, 3:15]
    model.passes.clear()
    found = dec.edit(model, ids, 4, 16, decoding).ids
    masked = model.denoised()[0][0].noisy.corrupted[:, 0, :12]
    assert masked.equal(nll > -math.log(0.01))
    assert 0 < masked.sum() < masked.numel()
    assert found[:, 4:16][~masked].equal(ids[:, 4:16][~masked])
    assert not found[:, 4:16][masked].equal(ids[:, 4:16][masked])
    assert found[:, :4].equal(ids[:, :4])
    assert found[:, 16:].equal(ids[:, 16:])
    other = torch.cat((ids[:, :16], (ids[:, 16:] + 1) % V), dim=1)
    assert not dec.edit(model, other, 4, 16, decoding).ids[:, :16].equal(found[:, :16])
    nothing = dec.edit(model, ids, 4, 16, decoding._replace(remask_threshold=0.0))
    assert nothing.ids.equal(ids)
    assert nothing.forwards.tolist() == [[1]] * 4  # the pass that finds nothing to remask


@pytest.mark.parametrize("sampling", [dec.GREEDY, HOT])
def test_draft_refine_edits_the_autoregressive_output(sampling: dec.Sampling) -> None:
    model, ids = model_of(), random_rows(4, 20, V)
    decoding = mode_of("draft_refine", sampling)
    draft = autoregressive(model, ids, 4, 16, sampling)
    expected = dec.edit(model, draft.ids, 4, 16, decoding)
    found = dec.decode(model, ids, 4, 16, decoding)
    assert found.ids.equal(expected.ids)
    assert found.forwards.equal(draft.forwards + expected.forwards)


# ---- cached refinement ----


@pytest.mark.parametrize("bigrams", [0, 50])
@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize(("steps", "suffix"), [(2, 0), (5, 3), (11, 3)])
def test_cached_refinement_is_exact_where_keys_depend_on_their_own_tokens(
    steps: int, suffix: int, shift: bool, bigrams: int
) -> None:
    """One layer: keys and values are functions of the embedded tokens."""
    settings = dict(num_layers=1, look_ahead=0, diffusion_shift=shift, bigram_vocab_size=bigrams)
    model, ids = model_of(**settings), random_rows(3, 15 + suffix, V)
    exact = dec.decode(model, ids, 4, 15, mode_of("refine", steps=steps))
    model.passes.clear()
    cached = dec.decode(model, ids, 4, 15, mode_of("refine_cached", steps=steps))
    assert cached.ids.equal(exact.ids)
    assert cached.forwards.equal(exact.forwards)
    computed = [logits.shape[1] for _, logits in model.denoised()]
    assert computed[0] == 12 + suffix  # the first pass fills the cache
    changed = 11 - 11 * (steps - 2) // steps
    each = 3 if bigrams else 2  # a token, the one before it, and the one after it with bigrams
    assert computed[-1] <= min(each * changed, 12 + suffix - (steps > 2))


def test_cached_refinement_is_approximate_in_deeper_models() -> None:
    model, ids = model_of(), random_rows(16, 20, V)
    exact = dec.decode(model, ids, 4, 20, MODES["refine"]).ids
    cached = dec.decode(model, ids, 4, 20, MODES["refine_cached"]).ids
    assert not cached.equal(exact)


def test_indices_are_padded_by_repeating_those_of_the_row() -> None:
    indices = torch.tensor([[3, 1, 0, 2], [2, 0, 3, 1], [0, 1, 2, 3]])
    found = dec.pad_by_repeating(indices, torch.tensor([[3], [1], [2]]))
    assert found.tolist() == [[3, 1, 0], [2, 2, 2], [0, 1, 0]]


# ---- errors ----


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("start", "stop"), [(0, 4), (-1, 4), (3, 9), (5, 4)])
def test_a_span_outside_the_rows_is_an_error(start: int, stop: int, mode: str) -> None:
    with pytest.raises(tg.UserError, match=rf"span {start}\.\.{stop} must lie in 1\.\.8"):
        dec.decode(model_of(), random_rows(2, 8, V), start, stop, MODES[mode])


def test_an_empty_prompt_is_an_error() -> None:
    with pytest.raises(tg.UserError, match="BOS will do"):
        dec.generate(model_of(), torch.zeros(1, 0, dtype=torch.int64), 4)


@pytest.mark.parametrize("mode", ["edit", "speculative", *WINDOWED])
def test_windows_need_a_denoiser(mode: str) -> None:
    model, ids = model_of("ar"), random_rows(1, 8, V)
    with pytest.raises(tg.UserError, match=r"no trained denoiser \(DIFFUSION_LOSS_WEIGHT=0\)"):
        dec.decode(model, ids, 4, 8, MODES.get(mode, Decoding(mode)))
    for decoding in (Decoding("ar"), mode_of("speculative", window=0)):
        assert dec.decode(model, ids, 4, 8, decoding).ids.shape == (1, 8)


@pytest.mark.parametrize(
    ("decoding", "message"),
    [
        (Decoding("blocks"), r"mode='blocks' is unknown; name one of ar, refine, .*speculative"),
        (mode_of("block", window=0), "window=0 must be at least 1 in mode block"),
        (mode_of("speculative", draft="x"), "draft='x' must be one of: auto, window, head"),
        (mode_of("speculative", draft="head"), "draft='head' needs a sequential head; fit one"),
        (mode_of("speculative", window=-1), "window=-1 must be at least 0 in mode speculative"),
        (mode_of("refine", steps=0), "steps=0 must be at least 1"),
    ],
)
def test_settings_that_cannot_be_used_are_errors(decoding: Decoding, message: str) -> None:
    with pytest.raises(tg.UserError, match=message):
        dec.decode(model_of(), random_rows(1, 8, V), 4, 8, decoding)


# ---- quality and guard ----


def row_quality(**values: list[float]) -> Quality:
    """Good rows of 16 tokens, except for the given values."""
    given = dict(nats=[1.0], entropy=[4.0], distinct=[1.0], repeat=[0.0], tokens=[16]) | values
    return Quality(**{name: torch.tensor(given[name]) for name in Quality._fields})


@pytest.mark.parametrize(
    ("tokens", "entropy", "distinct", "repeat"),
    [
        ([3, 3, 3, 3, 3], 0.0, 0.25, 1.0),
        ([1, 2, 3, 4], 2.0, 1.0, 0.0),
        ([1, 2, 1, 2, 1, 9], math.log2(6) - math.log2(3) / 2 - 1 / 3, 3 / 5, 5 / 6),
        ([9, 1, 2, 1, 8, 8], None, 1.0, 2 / 6),  # 1 2 1 is not two full periods
        ([*range(8), *range(8)], 3.0, 8 / 15, 1.0),
        ([*range(9), *range(9)], math.log2(9), 9 / 17, 0.0),  # the period is too long
        ([5, 5, 5, 1, 5, 5], None, 3 / 5, 3 / 6),  # two runs do not add up
        ([7], 0.0, 1.0, 0.0),
        ([], 0.0, 1.0, 0.0),
    ],
)
def test_measures_equal_those_by_hand(
    tokens: list[int], entropy: float | None, distinct: float, repeat: float
) -> None:
    assert dec.distinct(tokens) == pytest.approx(distinct)
    assert dec.repeat(tokens) == pytest.approx(repeat)
    if entropy is not None:
        assert dec.entropy(tokens) == pytest.approx(entropy)


def test_quality_describes_the_span_only() -> None:
    model, ids = model_of(), random_rows(3, 14, V)
    ids[1, 5:11] = 7
    found = dec.quality(model, ids, 5, 11)
    expected = tg.token_nll_causal(model, ids)[:, 4:10].double().mean(1)
    torch.testing.assert_close(found.nats, expected, rtol=1e-6, atol=0)
    assert found.entropy[1] == 0 < found.entropy[0] <= math.log2(6)
    assert found.repeat.tolist()[1] == 1
    assert found.tokens.tolist() == [6, 6, 6]
    alone = dec.quality(model, ids[1:2], 5, 11)
    for one, three in zip(alone, found, strict=True):
        torch.testing.assert_close(one[0], three[1], rtol=1e-6, atol=0)


def test_tokens_after_the_end_do_not_count() -> None:
    model, ids = model_of(), random_rows(2, 14, V - 1)
    ids[0, 8:11] = V - 1
    ended, whole = (dec.quality(model, ids, 5, 11, end) for end in (V - 1, -1))
    assert ended.tokens.tolist() == [4, 6]
    expected = dec.quality(model, ids, 5, 9).nats[0]
    torch.testing.assert_close(ended.nats[0], expected, rtol=1e-6, atol=0)
    assert ended.repeat[0] < whole.repeat[0]


def test_a_row_of_one_token_is_refused_at_any_likelihood(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = model_of(), torch.cat((torch.full((1, 20), 3), torch.arange(20)[None]))
    zero_nats = torch.zeros(2, 19)
    monkeypatch.setattr(tg, "token_nll_causal", lambda model, ids: zero_nats)
    monkeypatch.setattr(dec, "decode", lambda *_: dec.Decoded(ids, ids))
    found = dec.quality(model, ids, 4, 20)
    for limits in (
        Limits(repeat=1, distinct=0),
        Limits(entropy=0, distinct=0),
        Limits(entropy=0, repeat=1),
    ):
        verdicts = dec.judge(found, V, limits)
        assert [verdict.tolist() for verdict in verdicts] == [[True, False]] * 2
    assert not dec.judge(found, V, Limits(entropy=0, distinct=0, repeat=1))[1].any()
    measured = dec.measure(model, ids, 4, 20, MODES["ar"])
    assert measured.nats == pytest.approx(math.log(V) / 2)  # the other row has 0 nats
    assert measured.repetitive == 0.5


def test_a_timed_call_looks_up_no_pair_of_the_call_before(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = model_of(), random_rows(1, 20, V)
    head, sizes = random_head(model).eval(), list[int]()
    decode = dec.decode

    def counted(*args: Any) -> dec.Decoded:
        sizes.append(len(head.pair_cache))
        return decode(*args)

    monkeypatch.setattr(dec, "decode", counted)
    dec.measure(model, ids, 4, 20, mode_of("speculative", dec.GREEDY, lookup_ngram=0, head=head))
    assert sizes == [0] * (1 + dec.TIMED_CALLS)
    assert head.pair_cache


def test_limits_at_their_edges() -> None:
    nats, bits = LIMITS.nats * math.log(V), LIMITS.entropy * 4
    edges = dict(nats=[nats - 1e-4, nats + 1e-4, math.nan], entropy=[bits, bits - 1e-4])
    edges |= dict(distinct=[LIMITS.distinct + 1e-6, 0.39], repeat=[LIMITS.repeat, 0.51])
    for name, values in edges.items():
        repetitive, outside = dec.judge(row_quality(**{name: values}), V)
        assert outside.tolist() == [False, True, True][: len(values)], name
        assert repetitive.equal(outside) or (name == "nats" and not repetitive.any())
    many = row_quality(entropy=[3.1], tokens=[4 * V])
    assert dec.judge(many, V)[1].tolist() == [False]  # the maximum is log2 V bits


def limits_of_half(nats: Tensor) -> Limits:
    """Limits that half of these rows exceed."""
    share = nats.median().item() / math.log(V) + 1e-6
    return Limits(nats=share, entropy=0, distinct=0, repeat=1)


GUARDED = [
    Decoding("block", 4, 2, sampling=sampling)
    for sampling in (
        dec.GREEDY,
        dec.Sampling(temperature=1.3, top_k=20, top_p=0.95, seed=5),
        dec.Sampling(temperature=1.3, top_k=20, top_p=0.95, seed=5, end=4),
    )
]


@pytest.mark.parametrize("decoding", GUARDED)
def test_rows_that_fall_back_equal_autoregressive(decoding: Decoding) -> None:
    model, ids, end = model_of(), random_rows(8, 18, V), decoding.sampling.end
    first = dec.decode(model, ids, 5, 18, decoding)
    ar = autoregressive(model, ids, 5, 18, decoding.sampling)
    nats = dec.quality(model, first.ids, 5, 18, end).nats
    found = dec.guard(dec.Task(model, ids, 5, 18, decoding), limits_of_half(nats))
    rows = found.fell_back[:, None]
    assert found.fell_back.sum() == 4
    assert found.fell_back.equal(nats > nats.median())
    assert found.decoded.ids.equal(torch.where(rows, ar.ids, first.ids))
    assert (ar.ids != first.ids).any(1).all()
    assert found.decoded.forwards.equal(first.forwards + ar.forwards * rows)
    expected = dec.quality(model, found.decoded.ids, 5, 18, end)
    for one, other in zip(found.quality, expected, strict=True):
        assert one.equal(other)


@pytest.mark.slow
def test_whether_a_row_falls_back_does_not_depend_on_the_others() -> None:
    model, ids, decoding = model_of(), random_rows(8, 18, V), GUARDED[1]
    decoded = dec.decode(model, ids, 5, 18, decoding).ids
    limits = limits_of_half(dec.quality(model, decoded, 5, 18).nats)
    expected = dec.guard(dec.Task(model, ids, 5, 18, decoding), limits)
    for i in range(8):
        mixed = random_rows(8, 18, V, seed=1 + i)
        mixed[i] = ids[i]
        found = dec.guard(dec.Task(model, mixed, 5, 18, decoding), limits)
        assert found.decoded.ids[i].equal(expected.decoded.ids[i])
        assert found.fell_back[i] == expected.fell_back[i]


@pytest.mark.parametrize("mode", dec.LOSSLESS)
def test_lossless_modes_never_fall_back(mode: str) -> None:
    model, ids = model_of(), random_rows(3, 12, V)
    found = dec.guard(dec.Task(model, ids, 4, 12, MODES[mode]), Limits(nats=0))
    assert not found.fell_back.any()
    assert found.decoded.ids.equal(autoregressive(model, ids, 4, 12).ids)


# ---- mode auto ----

TABLE = [
    Measured(MODES["ar"], 4.0, 2.0, 0.0),
    Measured(MODES["refine"], 1.0, 5.0, 0.0),
    Measured(MODES["block"], 2.0, 3.0, 0.0),
    Measured(MODES["remask"], 3.0, 3.0, 0.0),
]


@pytest.mark.parametrize("table", [TABLE, TABLE[::-1]])
def test_select_takes_the_best_row_within_the_target(table: list[Measured]) -> None:
    """Rows block and remask have the same nats; block is faster."""
    for seconds, mode in ((9, "ar"), (3.5, "block"), (1, "refine")):
        assert dec.select(table, Target(seconds=seconds)).decoding.mode == mode
    for nats, mode in ((2, "ar"), (3.5, "block"), (99, "refine")):
        assert dec.select(table, Target(nats=nats)).decoding.mode == mode


def test_a_target_that_no_mode_meets_names_the_closest() -> None:
    message = r"no mode meets seconds=0\.5; the closest is refine in 8 passes: 1 s, 5\."
    with pytest.raises(tg.UserError, match=message):
        dec.select(TABLE, Target(seconds=0.5))
    message = r"no mode meets nats=1; the closest is ar: 4 s, 2\.0000 nats per token"
    with pytest.raises(tg.UserError, match=message):
        dec.select(TABLE, Target(nats=1))


@pytest.mark.parametrize(
    ("denoiser", "suffix", "modes"),
    [
        (True, False, {decoding.mode for decoding in MODES.values()}),
        (True, True, {MODES[mode].mode for mode in WINDOWED}),
        (False, False, set(dec.LOSSLESS)),
        (False, True, set()),
    ],
)
def test_candidates_can_read_the_text(denoiser: bool, suffix: bool, modes: set[str]) -> None:
    rows = dec.candidates(denoiser, suffix, 9, HOT)
    assert {row.mode for row in rows} == modes
    assert all(dec.needs_denoiser(row) <= denoiser and row.sampling == HOT for row in rows)
    steps = [row.steps for row in rows if row.mode == "refine"]
    assert steps == ([1, 2, 4, 8] if denoiser else [])  # not more than tokens


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["direct", "ar"])
def test_choose_selects_from_its_own_table(recipe: str) -> None:
    model, ids = model_of(recipe), random_rows(2, 12, V)
    found = dec.choose(model, ids, 6, 12, Target(nats=99), HOT)
    assert found.best == dec.select(found.table, Target(nats=99))
    assert {row.decoding.sampling for row in found.table} == {HOT}
    for target in (Target(), Target(seconds=1, nats=1)):
        with pytest.raises(tg.UserError, match="give exactly one"):
            dec.choose(model, ids, 6, 12, target)
    with pytest.raises(tg.UserError, match=r"span 6\.\.6 of 2 rows is empty"):
        dec.choose(model, ids, 6, 6, Target(seconds=1))


def test_choose_needs_a_denoiser_to_read_a_suffix() -> None:
    with pytest.raises(tg.UserError, match="text after it needs a denoiser"):
        dec.choose(model_of("ar"), random_rows(2, 12, V), 6, 10, Target(nats=99))

"""The model: one set of weights, two ways through it, and what each of them may touch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import train_gpt as tg
from tests.conftest import CPU, MAIN, random_rows, randomise, tiny

T, V = 16, 64
RECIPES_WITH_DENOISER = [name for name in MAIN if tiny(name).diffusion]


def model_of(recipe: str = "direct", **overrides: Any) -> tg.GPT:
    return randomise(tg.GPT(tiny(recipe, **{"bigram_vocab_size": 50} | overrides)))


def window_of(
    cfg: tg.Config, rows: Tensor, size: int, share: float = 0.6, previous: Tensor | None = None
) -> tuple[tg.Window, Tensor]:
    """Windows that tile rows (B, T + 1), a share of their tokens corrupted, and the true tokens."""
    x0, before, positions = tg.tile(rows, size)
    keys = tg.derive(torch.arange(len(rows))[:, None], 1, torch.arange(x0.shape[1]))
    corrupted = tg.uniform(keys, size) < share
    noisy = tg.apply_noise(x0, corrupted, torch.full(x0.shape[:2], 0.6), keys, cfg, 1.0)
    return tg.Window(
        before, noisy, positions, tg.window_mask(T, size, cfg.diffusion_causal, CPU), previous
    ), x0


def test_the_baseline_has_the_challenges_number_of_parameters() -> None:
    cfg, _, _ = tg.Config.from_env({"RECIPE": "ar", "PRESET": "8xh100"})
    counts = {name: p.numel() for name, p in tg.GPT(cfg).named_parameters()}
    assert sum(counts.values()) == 17_059_912
    assert not [name for name in counts if "ahead" in name or "mask" in name or "time" in name]


def test_an_untied_model_predicts_through_its_own_matrix() -> None:
    tied, untied = (model_of(tie_embeddings=tie) for tie in (True, False))
    assert set(dict(untied.named_parameters())) - set(dict(tied.named_parameters())) == {"lm_head"}
    ids = random_rows(2, 6, 64)
    assert untied.lm_head is not None
    before = untied.clean(ids)[0]
    with torch.no_grad():
        untied.lm_head[3] += 1
    moved = (untied.clean(ids)[0] != before).any(0).any(0)
    assert moved.tolist() == [token == 3 for token in range(64)]
    # As the challenge starts it: a wide embedding, a zero output matrix.
    fresh = tg.GPT(tiny(tie_embeddings=False))
    assert 0.9 < fresh.tok_emb.std() < 1.1
    assert not fresh.clean(ids)[0].any()


@pytest.mark.parametrize("recipe", MAIN)
def test_predictions_are_distributions(recipe: str) -> None:
    model, rows = model_of(recipe), random_rows(2, T + 1, V)
    logits, kvs = model.clean(rows[:, :-1])
    assert logits.shape == (2, T, V)
    assert logits.dtype == torch.float32
    outputs = [logits]
    assert len(kvs) == model.cfg.num_layers + 1  # the last pair holds the tokens
    if model.cfg.diffusion:
        window, x0 = window_of(model.cfg, rows, 4)
        outputs.append(model.window(window, kvs))
        assert outputs[1].shape == (*x0.shape, V)  # [MASK] is never predicted
    for out in outputs:
        assert out.abs().max() < model.cfg.logit_softcap
        assert (
            out.double().log_softmax(-1).exp().sum(-1).allclose(torch.ones((), dtype=torch.float64))
        )


def plain_attention(model: tg.GPT, layer: int, h: Tensor, values: Tensor) -> Tensor:
    """Attention of one row h (T, D) over values (T, G * C), a head and a token at a time."""
    cfg, prefix = model.cfg, f"blocks.{layer}.attn."
    size, group = cfg.model_dim // cfg.num_heads, cfg.num_heads // cfg.num_kv_heads
    w = {name: model.get_parameter(f"{prefix}{name}.weight") for name in ("c_q", "c_k", "proj")}
    gain = model.get_parameter(prefix + "q_gain")

    def turned(x: Tensor, position: int) -> Tensor:
        x = x / x.square().mean().sqrt()
        half = size // 2
        angle = position * cfg.rope_base ** (-torch.arange(half) * 2 / size)
        a, b = x[:half], x[half:]
        return torch.cat((a * angle.cos() + b * angle.sin(), b * angle.cos() - a * angle.sin()))

    out = []
    for t in range(len(h)):
        heads = []
        for head in range(cfg.num_heads):
            mine, shared = (slice(n * size, (n + 1) * size) for n in (head, head // group))
            q = turned(w["c_q"][mine] @ h[t], t) * gain[head]
            scores = torch.stack(
                [q @ turned(w["c_k"][shared] @ h[i], i) / size**0.5 for i in range(t + 1)]
            )
            heads.append(scores.softmax(0) @ values[: t + 1, shared])
        out.append(w["proj"] @ torch.cat(heads))
    return torch.stack(out)


@torch.no_grad()
@pytest.mark.parametrize(("value_residual", "pairs"), [(False, 0), (True, 0), (False, 50)])
@pytest.mark.parametrize("num_layers", [1, 2, 3, 4])
def test_the_clean_stream_is_the_baseline_spelt_out(
    num_layers: int, value_residual: bool, pairs: int
) -> None:
    shape = dict(num_layers=num_layers, num_heads=4, num_kv_heads=2, bigram_vocab_size=pairs)
    model = model_of(**shape, logit_softcap=3.0, value_residual=value_residual)
    ids = random_rows(1, 7, V)
    p = dict(model.named_parameters())
    assert ("value_mix" in p) == value_residual
    assert ("bigram_emb" in p) == (pairs > 0)

    def norm(x: Tensor) -> Tensor:
        return x / x.square().mean(-1, keepdim=True).sqrt()

    x = norm(p["tok_emb"][ids[0]])
    if pairs:  # each token but the first, with the one before it
        x = x + torch.stack(
            [
                torch.zeros(16),
                *(p["bigram_emb"][tg.derive(*ids[0, i : i + 2]) % 50] for i in range(6)),
            ]
        )
    first = x
    skips = []
    down = num_layers // 2
    values = x
    for i in range(num_layers):
        if i >= down and skips:  # the second half reads what the first half left, last in first out
            x = x + p["skip_weights"][i - down] * skips.pop()
        own, embedded = p[f"blocks.{i}.resid_mix"]
        x = own * x + embedded * first
        mine = norm(x) @ p[f"blocks.{i}.attn.c_v.weight"].T
        values = mine if i == 0 else values  # the first layer's
        if value_residual and i:
            mine = p["value_mix"][i - 1, 0] * mine + p["value_mix"][i - 1, 1] * values
        x = x + p[f"blocks.{i}.attn_scale"] * plain_attention(model, i, norm(x), mine)
        hidden = (norm(x) @ p[f"blocks.{i}.fc.weight"].T).clamp_min(0) ** 2
        x = x + p[f"blocks.{i}.mlp_scale"] * (hidden @ p[f"blocks.{i}.proj.weight"].T)
        if i < down:
            skips.append(x)
    expected = 3 * torch.tanh(norm(x) @ p["tok_emb"].T / 3)
    assert expected.abs().max() > 1.5  # the cap is felt
    torch.testing.assert_close(model.clean(ids)[0][0], expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_pair_is_an_input_only_where_both_tokens_are_known() -> None:
    """In two windows that touch, after clean text that the cache holds: the token before a window
    is the cached one.
    """
    model, text = model_of(), random_rows(1, 8, V)
    ids = torch.tensor([[9, 3, V, 5, 6, 7, V, V]])  # at 3 .. 6, then at 2 .. 5
    places = torch.tensor([3, 4, 5, 6, 2, 3, 4, 5])
    found, _ = model.pairs(
        torch.zeros(1, 8, 16), ids, places, [(text[:, None, :, None],) * 2], None
    )
    known = {0: (text[0, 2], 9), 1: (9, 3), 4: (text[0, 1], 6), 5: (6, 7)}
    for i in range(8):
        before, token = (torch.as_tensor(x) for x in known.get(i, (0, 0)))
        expected = model.get_parameter("bigram_emb")[tg.derive(before, token) % 50] * (i in known)
        torch.testing.assert_close(found[0, i], expected)


@pytest.mark.parametrize("value_residual", [False, True])
@pytest.mark.parametrize("cuts", [(1,), (5,), (15,), (3, 4, 11), tuple(range(1, 16))])
def test_a_cached_pass_equals_the_full_pass(cuts: tuple[int, ...], value_residual: bool) -> None:
    model, ids = model_of(value_residual=value_residual), random_rows(3, T, V)
    full, full_kvs = model.clean(ids)
    # By an earlier draft.
    left = [k.new_full((3, k.shape[1], T + 5, k.shape[3]), 9.0) for k, _ in full_kvs]
    past = [(k.clone(), k.clone()) for k in left]
    parts = []
    for start, stop in zip((0, *cuts), (*cuts, T), strict=True):
        at = torch.arange(start, stop).expand(3, -1)
        parts.append(model.clean(ids[:, start:stop], past, at)[0])
    torch.testing.assert_close(torch.cat(parts, 1), full, rtol=1e-4, atol=1e-4)
    assert past[-1][0][:, 0, :T, 0].equal(ids)
    for (k, v), (full_k, full_v) in zip(past[:-1], full_kvs[:-1], strict=True):
        torch.testing.assert_close(k[:, :, :T], full_k, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(v[:, :, :T], full_v, rtol=1e-4, atol=1e-4)


def test_rows_of_a_batch_may_stand_at_different_places() -> None:
    model, ids = model_of(), random_rows(2, T, V)
    full, kvs = model.clean(ids)
    past = [(k.clone(), v.clone()) for k, v in kvs]
    at = torch.tensor([[4], [9]]) + torch.arange(3)
    found = model.clean(ids.gather(1, at), past, at)[0]
    torch.testing.assert_close(
        found, full.gather(1, at[..., None].expand_as(found)), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("mode", ["mask", "hybrid", "gaussian"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("size", [1, 4, 16])
def test_all_windows_at_once_equal_one_at_a_time(
    size: int, shift: bool, causal: bool, mode: str
) -> None:
    model = model_of(
        diffusion_shift=shift,
        diffusion_causal=causal,
        diffusion_corruption_mode=mode,
        self_condition="soft",
        value_residual=shift,
    )
    rows = random_rows(2, T + 1, V)
    previous = torch.randn(
        2, T // size, size, model.cfg.model_dim, generator=torch.Generator().manual_seed(5)
    )
    window, _ = window_of(model.cfg, rows, size, previous=previous)
    kvs = model.clean(rows[:, :-1])[1]
    tiled = model.window(window, kvs)
    for w in range(T // size):
        past = [(k[:, :, : w * size], v[:, :, : w * size]) for k, v in kvs] if w else None
        noisy = tg.Corruption(*(x if x is None else x[:, w : w + 1] for x in window.noisy))
        positions = torch.arange(w * size, (w + 1) * size + 1)
        mask = (torch.arange((w + 1) * size + 1) <= positions[:, None]) | (not causal)
        alone = tg.Window(
            window.before[:, w : w + 1], noisy, positions, mask, previous[:, w : w + 1]
        )
        torch.testing.assert_close(
            model.window(alone, past)[:, 0], tiled[:, w], rtol=1e-4, atol=1e-4
        )


@torch.no_grad()
@pytest.mark.parametrize("mode", ["mask", "gaussian"])
@pytest.mark.parametrize("size", [1, 4, 16])
def test_a_window_without_suspects_is_the_clean_stream(size: int, mode: str) -> None:
    model = model_of(diffusion_causal=True, self_condition="soft", diffusion_corruption_mode=mode)
    model.tok_emb.mul_(0.01)  # so small that a norm of a norm would be another number
    rows = random_rows(2, T + 1, V)
    window, x0 = window_of(
        model.cfg, rows, size, share=0.0, previous=torch.randn(2, T // size, size, 16)
    )
    logits, kvs = model.clean(rows[:, :-1])
    torch.testing.assert_close(
        model.window(window, kvs), logits.view(*x0.shape, V), rtol=1e-4, atol=1e-4
    )


def extras_of(model: tg.GPT) -> list[tuple[str, Tensor]]:
    kinds = ("time_proj", "self_cond", "ahead_gain", "ahead_proj")
    return [(name, p) for name, p in model.named_parameters() if name.endswith(kinds)]


def test_only_suspect_tokens_meet_time_and_self_conditioning() -> None:
    model, rows = model_of(diffusion_causal=True, self_condition="soft"), random_rows(2, T + 1, V)
    previous = torch.randn(2, 4, 4, 16, generator=torch.Generator().manual_seed(5))
    window, _ = window_of(model.cfg, rows, 4, previous=previous)
    kvs = model.clean(rows[:, :-1])[1]
    before, clean = model.window(window, kvs), model.clean(rows)[0]
    # With causal attention a token is moved by suspects up to itself; shifted, input o - 1 predicts
    # token o.
    upto = torch.cat(
        (torch.zeros(2, 4, 1, dtype=torch.bool), window.noisy.suspect.cumsum(-1)[..., :-1] > 0),
        dim=-1,
    )
    assert upto.any()
    assert not upto.all()
    extras = extras_of(model)
    assert {name.split(".")[-1] for name, _ in extras} == {"time_proj", "self_cond"}
    for name, p in extras:
        with torch.no_grad():
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(7)))
        after = model.window(window, kvs)
        moved = (after != before).any(-1)
        assert moved.any(), name
        assert not (moved & ~upto).any(), name
        before = after
    assert model.clean(rows)[0].equal(clean)
    later = window._replace(noisy=window.noisy._replace(t=window.noisy.t + 0.2))
    assert (model.window(later, kvs) != before).any(-1).equal(upto)
    other = window._replace(previous=previous + 1)
    assert (model.window(other, kvs) != before).any(-1).equal(upto)


def test_a_fresh_denoiser_starts_as_the_clean_stream() -> None:
    """Zero-initialised look-ahead, time and self-conditioning change nothing until they are
    trained.
    """
    model = randomise(tg.GPT(tiny(self_condition="soft")))
    rows = random_rows(2, T + 1, V)
    window, _ = window_of(model.cfg, rows, 4, previous=torch.randn(2, 4, 4, 16))
    fresh = dict(tg.GPT(model.cfg).named_parameters())
    with torch.no_grad():
        for name, p in extras_of(model):
            p.copy_(fresh[name])
    kvs = model.clean(rows[:, :-1])[1]
    before = model.window(window, kvs)
    with torch.no_grad():
        for name, p in extras_of(model):
            if name.endswith("ahead_gain"):
                p.normal_()
    after = model.window(window._replace(previous=None), kvs)
    later = window._replace(noisy=window.noisy._replace(t=window.noisy.t * 0.5))
    assert after.equal(before)
    assert model.window(later, kvs).equal(before)


def gradients(
    recipe: str = "direct", through_cache: bool = True, **overrides: Any
) -> dict[str, Tensor | None]:
    """Gradients of the windows' loss alone; the keys and values are detached if `through_cache` is
    off.
    """
    model = model_of(recipe, **overrides)
    rows = random_rows(2, T + 1, V)
    window, x0 = window_of(model.cfg, rows, 4)
    kvs = model.clean(rows[:, :-1])[1]
    past = kvs if through_cache else [(k.detach(), v.detach()) for k, v in kvs]
    tg.losses(model.window(window, past), torch.zeros(()), x0, window.noisy, model.cfg).backward()
    return {name: p.grad for name, p in model.named_parameters()}


OWN = ("time_proj", "mask_emb", "ahead_gain", "ahead_proj")  # what only windows use


def test_the_windows_loss_reaches_every_weight_through_windows_and_through_clean_keys() -> None:
    apart = gradients(through_cache=False, value_residual=True)
    whole = gradients(value_residual=True)
    for name, grad in apart.items():
        assert grad is not None, name
        assert grad.abs().sum() > 0, name
    through_keys = {
        name for name, grad in whole.items() if grad is not None and not grad.equal(apart[name])
    }  # type: ignore[arg-type]
    assert {
        "tok_emb",
        "blocks.0.attn.c_k.weight",
        "blocks.1.attn.c_v.weight",
        "blocks.0.fc.weight",
    } <= through_keys
    assert not through_keys & set(OWN)


def test_every_recipe_starts_from_the_same_shared_weights() -> None:
    first = dict(tg.GPT(tiny("ar")).named_parameters())
    for recipe in RECIPES_WITH_DENOISER:
        other = dict(tg.GPT(tiny(recipe, self_condition="soft")).named_parameters())
        assert other.keys() > first.keys()
        for name, p in first.items():
            assert p.equal(other[name]), name
    again = dict(tg.GPT(tiny("ar")).named_parameters())
    seeded = dict(tg.GPT(tiny("ar", seed=1)).named_parameters())
    assert all(p.equal(again[name]) for name, p in first.items())
    assert not first["tok_emb"].equal(seeded["tok_emb"])
    assert not first["blocks.0.fc.weight"].equal(first["blocks.1.fc.weight"])


def test_initial_weights_are_those_of_the_baseline() -> None:
    model = tg.GPT(tiny(model_dim=64, vocab_size=512))
    assert model.tok_emb.std().item() == pytest.approx(0.005, rel=0.05)
    for name, p in model.named_parameters():
        if name.endswith("proj.weight") or name.endswith(("time_proj", "ahead_proj")):
            assert not p.any(), name
        elif name.endswith("weight") and "skip" not in name:
            bound = p.shape[1] ** -0.5  # a linear layer's default
            assert 0.9 * bound < p.abs().max() <= bound, name
        elif "scale" in name or "skip" in name:
            assert (p == 1).all(), name
    assert (model.get_parameter("blocks.0.attn.q_gain") == 1.5).all()
    assert model.get_parameter("blocks.0.resid_mix").mean(1).tolist() == [1, 0]
    assert (
        tg.GPT(tiny(num_layers=3, value_residual=True)).get_parameter("value_mix").tolist()
        == [[1, 0.5]] * 2
    )


def test_a_clean_stream_alone_cannot_denoise() -> None:
    model = tg.GPT(tiny("ar"))
    window, _ = window_of(model.cfg, random_rows(1, T + 1, V), 4)
    with pytest.raises(AssertionError, match="needs a model built with diffusion on"):
        model.window(window, None)


def test_gaussian_noise_takes_an_embedding_to_pure_noise_in_steps_of_its_level(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The variance-preserving process on embeddings: sqrt(1 - t) e + sqrt(t) noise, clean at 0 and
    without a trace of the token at 1 (arXiv:2205.14217, arXiv:2211.15089).
    """
    cfg = tiny(diffusion_corruption_mode="gaussian", look_ahead=0, time_embed_dim=0)
    model, x0 = randomise(tg.GPT(cfg)), random_rows(3, 4, 64)[:, None]
    everywhere, keys = torch.ones_like(x0, dtype=torch.bool), torch.arange(3)[:, None]
    seen = list[Tensor]()

    def trunk(emb: Tensor, stream: tg.Stream, past: Any) -> tuple[Tensor, list[Any]]:
        seen.append(emb[:, 1:])  # without the clean token before
        return emb, []

    monkeypatch.setattr(model, "trunk", trunk)
    own = tg.rms_norm(model.tok_emb[x0[:, 0]])
    for level in (1e-9, 0.25, 0.5, 0.75, 1.0):
        noisy = tg.apply_noise(x0, everywhere, torch.full((3, 1), level), keys, cfg, 0.0)
        assert noisy.noise is not None
        model.read(
            tg.Window(x0[..., :1], noisy, torch.arange(5), torch.ones(5, 5, dtype=torch.bool)), None
        )
        expected = tg.rms_norm((1 - level) ** 0.5 * own + level**0.5 * noisy.noise[:, 0])
        torch.testing.assert_close(seen.pop(), expected, rtol=1e-4, atol=1e-4)
        if level < 1e-6:
            torch.testing.assert_close(expected, own, rtol=1e-3, atol=1e-3)
    other = tg.apply_noise((x0 + 1) % 64, everywhere, torch.ones(3, 1), keys, cfg, 0.0)
    for corruption in (noisy, other):
        model.read(
            tg.Window(x0[..., :1], corruption, torch.arange(5), torch.ones(5, 5, dtype=torch.bool)),
            None,
        )
    assert seen[0].equal(seen[1])

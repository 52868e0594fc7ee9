"""The model: one set of weights, a causal and a denoising pass, and what each of them reads.

Where two passes must agree, models are float64: they differ by float32 operations of the softcap.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import train_gpt as tg
from scripts import decoding
from tests.conftest import CPU, MAIN, make_run, random_rows, randomise, rounding, tiny

T, V = 16, 64
RECIPES_WITH_DENOISER = [name for name in MAIN if tiny(name).diffusion]


def model_of(recipe: str = "direct", **overrides: Any) -> tg.GPT:
    return randomise(tg.GPT(tiny(recipe, **{"bigram_vocab_size": 50} | overrides)))


def close(found: Tensor, expected: Tensor, cap: float = tiny().logit_softcap) -> None:
    """Compare logits of a float64 model, which are rounded to float32 before the softcap."""
    assert expected.dtype == torch.float32
    bound = 8 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(found, expected, rtol=bound, atol=bound * cap)


def window_of(
    cfg: tg.Config, rows: Tensor, size: int, share: float = 0.6, previous: Tensor | None = None
) -> tuple[tg.WindowInput, Tensor]:
    """Windows that tile rows (B, T + 1), a share of their tokens corrupted, and the true tokens."""
    tokens, positions = tg.split_into_windows(rows, size)
    x0, mask = tokens[..., 1:], tg.window_mask(T, size, cfg.diffusion_causal, CPU)
    keys = tg.split_key(torch.arange(len(rows))[:, None], 1, torch.arange(x0.shape[1]))
    corrupted = tg.random_uniform(keys, size) < share
    noisy = tg.apply_noise(x0, corrupted, torch.full(x0.shape[:2], 0.6), keys, cfg, 1.0)
    return tg.WindowInput(tokens[..., :1], noisy, positions, mask, previous), x0


def test_the_baseline_has_the_number_of_parameters_of_the_challenge() -> None:
    cfg, _ = tg.Config.from_env({"RECIPE": "ar", "PRESET": "8xh100"})
    counts = {name: p.numel() for name, p in tg.GPT(cfg).named_parameters()}
    assert sum(counts.values()) == 17_059_912
    assert not [
        name
        for name in counts
        if any(part in name for part in ("visible", "mask", "time", "cond", "bigram"))
    ]


def test_an_untied_model_has_its_own_output_matrix() -> None:
    tied, untied = (model_of(tie_embeddings=tie) for tie in (True, False))
    assert set(dict(untied.named_parameters())) - set(dict(tied.named_parameters())) == {"lm_head"}
    ids = random_rows(2, 6, 64)
    assert untied.lm_head is not None
    before = untied.forward_causal(ids)[0]
    with torch.no_grad():
        untied.lm_head[3] += 1
    moved = (untied.forward_causal(ids)[0] != before).any(0).any(0)
    assert moved.tolist() == [token == 3 for token in range(64)]
    # As the challenge starts it: a wide embedding, a zero output matrix.
    fresh = tg.GPT(tiny(tie_embeddings=False))
    assert 0.9 < fresh.tok_emb.std() < 1.1
    assert not fresh.forward_causal(ids)[0].any()


@pytest.mark.parametrize("recipe", MAIN)
def test_predictions_are_distributions(recipe: str) -> None:
    model, rows = model_of(recipe), random_rows(2, T + 1, V)
    logits, cache = model.forward_causal(rows[:, :-1])
    assert logits.shape == (2, T, V)
    assert cache.tokens.equal(rows[:, :-1])
    shape = (2, model.cfg.num_kv_heads, T, model.cfg.model_dim // model.cfg.num_heads)
    assert [k.shape for k in cache.keys] == [k.shape for k in cache.values]
    assert [k.shape for k in cache.keys] == [shape] * model.cfg.num_layers
    outputs = [logits]
    if model.cfg.diffusion:
        window, x0 = window_of(model.cfg, rows, 4)
        outputs.append(model.forward_denoise(window, cache))
        assert outputs[1].shape == (*x0.shape, V)  # [MASK] is never predicted
    for out in outputs:
        assert out.dtype == torch.float32
        assert out.abs().max() < model.cfg.logit_softcap
        total = out.double().log_softmax(-1).exp().sum(-1)
        torch.testing.assert_close(total, torch.ones_like(total))


def plain_attention(model: tg.GPT, layer: int, h: Tensor, values: Tensor) -> Tensor:
    """Attention of one row h (T, D) over values (T, G * C), a head and a token at a time."""
    cfg, prefix = model.cfg, f"blocks.{layer}.attn."
    size, group = cfg.model_dim // cfg.num_heads, cfg.num_heads // cfg.num_kv_heads
    w = {name: model.get_parameter(f"{prefix}{name}.weight") for name in ("c_q", "c_k", "proj")}
    gain = model.get_parameter(prefix + "q_gain")

    def rotated(x: Tensor, position: int) -> Tensor:
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
            q = rotated(w["c_q"][mine] @ h[t], t) * gain[head]
            keys = [rotated(w["c_k"][shared] @ h[i], i) for i in range(t + 1)]
            scores = torch.stack([q @ k / size**0.5 for k in keys])
            heads.append(scores.softmax(0) @ values[: t + 1, shared])
        out.append(w["proj"] @ torch.cat(heads))
    return torch.stack(out)


@torch.no_grad()
@pytest.mark.parametrize(("value_residual", "bigrams"), [(False, 0), (True, 0), (False, 50)])
@pytest.mark.parametrize("num_layers", [1, 2, 3, 4])
def test_the_causal_pass_equals_the_baseline_in_loops(
    num_layers: int, value_residual: bool, bigrams: int
) -> None:
    shape = dict(num_layers=num_layers, num_heads=4, num_kv_heads=2, bigram_vocab_size=bigrams)
    model = model_of(**shape, logit_softcap=3.0, value_residual=value_residual).double()
    ids = random_rows(1, 7, V)
    p = dict(model.named_parameters())
    assert ("value_mix" in p) == value_residual
    assert ("bigram_embedding" in p) == (bigrams > 0)

    def norm(x: Tensor) -> Tensor:
        return x / x.square().mean(-1, keepdim=True).sqrt()

    x = norm(p["tok_emb"][ids[0]])
    if bigrams:  # each token but the first, with the one before it
        hashes = [tg.split_key(ids[0, i], ids[0, i + 1]) % 50 for i in range(6)]
        x[1:] += p["bigram_embedding"][torch.stack(hashes)]
    first, values = x, x
    skips = []
    down = num_layers // 2
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
    assert expected.abs().max() > 1.5  # where the cap bends the logits
    close(model.forward_causal(ids)[0][0], expected.float(), 3.0)


@torch.no_grad()
def test_a_bigram_is_an_input_only_where_both_tokens_are_known() -> None:
    """Two windows of one pass after a cache: the token before a window is the cached one."""
    model, text = model_of(), random_rows(1, 8, V)
    ids = torch.tensor([[9, 3, V, 5, 6, 7, V, V, 4, 8]])
    places = torch.tensor([3, 4, 5, 6, 2, 3, 4, 5, 0, 1])
    cache = tg.Cache([], [], text)
    found = model.add_bigrams(torch.zeros(1, 10, 16), ids, places, cache)
    known = {0: (text[0, 2], 9), 1: (9, 3), 4: (text[0, 1], 6), 5: (6, 7), 9: (4, 8)}
    table = model.get_parameter("bigram_embedding")
    for i in range(10):
        before, token = (torch.as_tensor(x) for x in known.get(i, (0, 0)))
        expected = table[tg.split_key(before, token) % 50] * (i in known)
        assert found[0, i].equal(expected), i
    alone = model.add_bigrams(torch.zeros(1, 10, 16), ids, torch.arange(10), None)
    assert not alone[0, 0].any()  # nothing is before it
    assert alone[0, 1].equal(found[0, 1])


def static_buffers(cache: tg.Cache, places: int) -> tg.Cache:
    """Buffers of as many places, full of what an earlier draft left."""
    shape = list(cache.keys[0].shape)
    shape[2] = places
    buffers = [[torch.full(shape, 9.0).to(k) for k in part] for part in (cache.keys, cache.values)]
    tokens = torch.full((len(cache.tokens), places), 5)
    return tg.Cache(buffers[0], buffers[1], tokens)


@torch.no_grad()
@pytest.mark.parametrize("value_residual", [False, True])
@pytest.mark.parametrize("cuts", [(1,), (5,), (15,), (3, 4, 11), tuple(range(1, 16))])
def test_a_cached_pass_equals_the_full_pass(cuts: tuple[int, ...], value_residual: bool) -> None:
    model, ids = model_of(value_residual=value_residual).double(), random_rows(3, T, V)
    full, full_cache = model.forward_causal(ids)
    cache = static_buffers(full_cache, T + 5)
    parts = []
    for start, stop in zip((0, *cuts), (*cuts, T), strict=True):
        positions = torch.arange(start, stop).expand(3, -1)
        logits, same = model.forward_causal(ids[:, start:stop], cache, positions)
        assert same is cache
        parts.append(logits)
    close(torch.cat(parts, 1), full)
    assert cache.tokens[:, :T].equal(ids)
    assert (cache.tokens[:, T:] == 5).all()
    for found, expected in ((cache.keys, full_cache.keys), (cache.values, full_cache.values)):
        for layer in range(model.cfg.num_layers):
            bound = 8 * rounding(1) * expected[layer].abs().max().item()  # rotary is float32
            torch.testing.assert_close(found[layer][:, :, :T], expected[layer], rtol=0, atol=bound)
            assert (found[layer][:, :, T:] == 9).all()


@torch.no_grad()
def test_rows_of_a_batch_may_be_at_different_positions() -> None:
    model, ids = model_of().double(), random_rows(2, T, V)
    full, cache = model.forward_causal(ids)
    buffers = [[x.clone() for x in part] for part in (cache.keys, cache.values)]
    positions = torch.tensor([[4], [9]]) + torch.arange(3)
    static = tg.Cache(buffers[0], buffers[1], ids.clone())
    for row in range(2):  # what is written is not read from before
        for part in (*buffers[0], *buffers[1]):
            part[row, :, positions[row]] = 9.0
        static.tokens[row, positions[row]] = 5
    found = model.forward_causal(ids.gather(1, positions), static, positions)[0]
    close(found, decoding.gather_tokens(full, positions))
    assert static.tokens.equal(ids)


@torch.no_grad()
@pytest.mark.parametrize("mode", ["mask", "hybrid", "gaussian"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("size", [1, 4, 16])
def test_all_windows_of_a_pass_equal_one_at_a_time(
    size: int, shift: bool, causal: bool, mode: str
) -> None:
    own = dict(diffusion_shift=shift, diffusion_causal=causal, diffusion_corruption_mode=mode)
    model = model_of(**own, self_condition="soft", value_residual=shift).double()
    rows, generator = random_rows(2, T + 1, V), torch.Generator().manual_seed(5)
    previous = torch.randn(2, T // size, size, 16, generator=generator, dtype=torch.float64)
    window, _ = window_of(model.cfg, rows, size, previous=previous)
    cache = model.forward_causal(rows[:, :-1])[1]
    together = model.forward_denoise(window, cache)
    for w in range(T // size):
        end = w * size
        keys, values = ([x[:, :, :end] for x in part] for part in (cache.keys, cache.values))
        before = tg.Cache(keys, values, cache.tokens[:, :end]) if w else None
        noisy = tg.Corruption(*(x if x is None else x[:, w : w + 1] for x in window.noisy))
        positions = torch.arange(end, end + size + 1)
        mask = (torch.arange(end + size + 1) <= positions[:, None]) | (not causal)
        clean, last = window.before[:, w : w + 1], previous[:, w : w + 1]
        alone = tg.WindowInput(clean, noisy, positions, mask, last)
        close(model.forward_denoise(alone, before)[:, 0], together[:, w])


@torch.no_grad()
@pytest.mark.parametrize("value_residual", [False, True])
def test_windows_in_static_buffers_equal_windows_after_a_cache(value_residual: bool) -> None:
    """The two ways of a denoising pass to its keys: own after the cache's, or written to places."""
    size, start = 4, 8
    model, rows = model_of(value_residual=value_residual).double(), random_rows(2, T, V)
    xt, corrupted = torch.full((2, 1, size), V), torch.ones(2, 1, size, dtype=torch.bool)
    noisy = tg.Corruption(xt, corrupted, corrupted, torch.ones(2, 1))
    positions = torch.arange(start - 1, start + size)
    before, mask = rows[:, None, start - 1 : start], torch.ones(size + 1, start + size).bool()
    cache = model.forward_causal(rows[:, : start - 1])[1]
    expected = model.forward_denoise(tg.WindowInput(before, noisy, positions, mask), cache)
    static = static_buffers(cache, T)
    for part, filled in ((static.keys, cache.keys), (static.values, cache.values)):
        for layer in range(model.cfg.num_layers):
            part[layer][:, :, : start - 1] = filled[layer]
    static.tokens[:, : start - 1] = rows[:, : start - 1]
    places = positions.expand(2, -1)
    read = (torch.arange(T) < start + size).expand(2, 1, size + 1, -1)
    window = tg.WindowInput(before, noisy, places, read, cache_positions=places)
    close(model.forward_denoise(window, static), expected)
    assert static.tokens[:, start - 1].equal(rows[:, start - 1])
    assert (static.tokens[:, start : start + size] == V).all()
    assert (static.tokens[:, start + size :] == 5).all()


@torch.no_grad()
@pytest.mark.parametrize("mode", ["mask", "gaussian"])
@pytest.mark.parametrize("size", [1, 4, 16])
def test_a_window_without_corruption_equals_the_causal_pass(size: int, mode: str) -> None:
    own = dict(diffusion_causal=True, self_condition="soft", diffusion_corruption_mode=mode)
    model = model_of(**own).double()
    model.tok_emb.mul_(0.01)  # so small that a norm of a norm would be another number
    rows = random_rows(2, T + 1, V)
    previous = torch.randn(2, T // size, size, 16, dtype=torch.float64)
    window, x0 = window_of(model.cfg, rows, size, share=0.0, previous=previous)
    logits, cache = model.forward_causal(rows[:, :-1])
    close(model.forward_denoise(window, cache), logits.view(*x0.shape, V))


@torch.no_grad()
@pytest.mark.parametrize("heads", [(4, 1), (4, 2), (4, 4)])
def test_a_group_of_heads_equals_heads_with_the_same_keys(heads: tuple[int, int]) -> None:
    cfg = dict(num_heads=heads[0], num_kv_heads=heads[1])
    grouped, full = model_of(**cfg).double(), model_of(num_heads=4, num_kv_heads=4).double()
    weights = grouped.state_dict()
    for name in [name for name in weights if name.endswith(("c_k.weight", "c_v.weight"))]:
        w = weights[name].view(heads[1], 1, -1, 16)
        weights[name] = w.expand(-1, heads[0] // heads[1], -1, -1).reshape(-1, 16)
    full.load_state_dict(weights)
    rows = random_rows(2, T + 1, V)
    outputs = []
    for model in (grouped, full):
        logits, cache = model.forward_causal(rows[:, :-1])
        window, _ = window_of(model.cfg, rows, 4)
        outputs.append((logits, model.forward_denoise(window, cache).flatten(1, 2)))
    for found, expected in zip(*outputs, strict=True):
        close(found, expected)


@pytest.mark.parametrize("value_residual", [False, True])
def test_the_residual_stream_has_the_type_of_autocast(value_residual: bool) -> None:
    """On CUDA it is bf16, as the challenge's baseline has it; the parameters stay fp32."""
    model, rows = model_of(value_residual=value_residual), random_rows(2, T + 1, V)
    window, _ = window_of(model.cfg, rows, 4)
    for enabled, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        seen = list[torch.dtype]()
        hooks = [
            block.register_forward_hook(
                lambda _, given, out, seen=seen: seen.extend(
                    (given[0].dtype, given[1].dtype, out[0].dtype, *(x.dtype for x in out[1]))
                )
            )
            for block in model.blocks
        ]
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            logits, cache = model.forward_causal(rows[:, :-1])
            noisy = model.forward_denoise(window, cache)
        assert (logits.dtype, noisy.dtype) == (torch.float32, torch.float32)
        assert seen == [dtype] * (2 * 5 * model.cfg.num_layers)
        for hook in hooks:
            hook.remove()


def test_next_token_loss_is_the_mean_cross_entropy() -> None:
    model, rows = model_of(), random_rows(2, T + 1, V)
    objective = tg.Objective(model.cfg, make_run(model.cfg), model)
    loss, (clean_logits, clean_cache) = objective.clean_loss(rows, 2)  # type: ignore[misc]
    alone, nothing = objective.clean_loss(rows, 0)
    assert (alone.item(), nothing) == (loss.item(), None)
    logits, cache = model.forward_causal(rows[:, :-1])
    assert clean_logits.equal(logits)
    assert not clean_logits.requires_grad
    assert loss.requires_grad
    assert clean_cache.tokens.equal(cache.tokens)
    nats = -logits.double().log_softmax(-1).gather(-1, rows[:, 1:, None])
    # A log-softmax of logits up to the cap, and the mean.
    bound = rounding(V, 2 * T) * model.cfg.logit_softcap
    assert loss.item() == pytest.approx(nats.mean().item(), abs=bound)
    (some_logits, some) = objective.clean_loss(rows, 1)[1]  # type: ignore[misc]
    assert some_logits.equal(logits[:1])
    assert some.tokens.equal(rows[:1, :-1])
    for part, whole in ((some.keys, cache.keys), (some.values, cache.values)):
        assert all(x.equal(y[:1]) for x, y in zip(part, whole, strict=True))


def extras_of(model: tg.GPT) -> list[tuple[str, Tensor]]:
    kinds = ("time_proj", "self_cond", "next_visible_gain", "next_visible_proj")
    return [(name, p) for name, p in model.named_parameters() if name.endswith(kinds)]


def test_time_and_self_conditioning_act_on_possibly_corrupted_tokens_only() -> None:
    model, rows = model_of(diffusion_causal=True, self_condition="soft"), random_rows(2, T + 1, V)
    previous = torch.randn(2, 4, 4, 16, generator=torch.Generator().manual_seed(5))
    window, _ = window_of(model.cfg, rows, 4, previous=previous)
    cache = model.forward_causal(rows[:, :-1])[1]
    before, clean = model.forward_denoise(window, cache), model.forward_causal(rows)[0]
    # Attention is causal: such a token changes what is after it. Input o - 1 predicts token o.
    earlier = torch.nn.functional.pad(window.noisy.possibly_corrupted[..., :-1], (1, 0))
    reached = earlier.cumsum(-1) > 0
    assert reached.any()
    assert not reached.all()
    extras = extras_of(model)
    assert {name.split(".")[-1] for name, _ in extras} == {"time_proj", "self_cond"}
    for name, p in extras:
        with torch.no_grad():
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(7)))
        after = model.forward_denoise(window, cache)
        moved = (after != before).any(-1)
        assert moved.any(), name
        assert not (moved & ~reached).any(), name
        before = after
    assert model.forward_causal(rows)[0].equal(clean)
    later = window._replace(noisy=window.noisy._replace(t=window.noisy.t + 0.2))
    assert (model.forward_denoise(later, cache) != before).any(-1).equal(reached)
    other = window._replace(previous=previous + 1)
    assert (model.forward_denoise(other, cache) != before).any(-1).equal(reached)


def test_inputs_of_a_fresh_denoiser_change_nothing() -> None:
    """Next visible token, time and self-conditioning have weights 0 until they are trained."""
    model = randomise(tg.GPT(tiny(self_condition="soft")))
    rows = random_rows(2, T + 1, V)
    window, _ = window_of(model.cfg, rows, 4, previous=torch.randn(2, 4, 4, 16))
    fresh = dict(tg.GPT(model.cfg).named_parameters())
    with torch.no_grad():
        for name, p in extras_of(model):
            p.copy_(fresh[name])
    cache = model.forward_causal(rows[:, :-1])[1]
    before = model.forward_denoise(window, cache)
    with torch.no_grad():
        for name, p in extras_of(model):
            if name.endswith("next_visible_gain"):
                p.normal_()
    after = model.forward_denoise(window._replace(previous=None), cache)
    later = window._replace(noisy=window.noisy._replace(t=window.noisy.t * 0.5))
    assert after.equal(before)
    assert model.forward_denoise(later, cache).equal(before)


def gradients(
    recipe: str = "direct", through_cache: bool = True, **overrides: Any
) -> dict[str, Tensor | None]:
    """Gradients of the denoising loss alone; without those through the cache if that is off."""
    model = model_of(recipe, **overrides)
    rows = random_rows(2, T + 1, V)
    window, x0 = window_of(model.cfg, rows, 4)
    cache = model.forward_causal(rows[:, :-1])[1]
    if not through_cache:
        keys, values = ([x.detach() for x in part] for part in (cache.keys, cache.values))
        cache = tg.Cache(keys, values, cache.tokens)
    logits = model.forward_denoise(window, cache)
    tg.denoising_loss(logits, torch.zeros(()), x0, window.noisy, model.cfg).backward()
    return {name: p.grad for name, p in model.named_parameters()}


OWN = ("time_proj", "mask_emb", "next_visible_gain", "next_visible_proj")  # what only windows use


def test_the_denoising_loss_trains_every_weight_through_windows_and_through_the_cache() -> None:
    apart = gradients(through_cache=False, value_residual=True)
    whole = gradients(value_residual=True)
    assert apart.keys() == whole.keys()
    through_cache = set()
    for name, grad in apart.items():
        other = whole[name]
        assert grad is not None, name
        assert other is not None, name
        assert grad.abs().sum() > 0, name
        if not grad.equal(other):
            through_cache.add(name)
    attention = {"blocks.0.attn.c_k.weight", "blocks.1.attn.c_v.weight"}
    assert attention | {"tok_emb", "blocks.0.fc.weight"} <= through_cache
    assert not through_cache & set(OWN)


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
        if name.endswith("proj.weight") or name.endswith(("time_proj", "next_visible_proj")):
            assert not p.any(), name
        elif name.endswith("weight") and "skip" not in name:
            bound = p.shape[1] ** -0.5  # a linear layer's default
            assert 0.9 * bound < p.abs().max() <= bound, name
        elif "scale" in name or "skip" in name:
            assert (p == 1).all(), name
    assert (model.get_parameter("blocks.0.attn.q_gain") == 1.5).all()
    assert model.get_parameter("blocks.0.resid_mix").mean(1).tolist() == [1, 0]
    mixed = tg.GPT(tiny(num_layers=3, value_residual=True))
    assert mixed.get_parameter("value_mix").tolist() == [[1, 0.5]] * 2


def test_a_model_without_a_denoiser_cannot_denoise() -> None:
    model = tg.GPT(tiny("ar"))
    window, _ = window_of(model.cfg, random_rows(1, T + 1, V), 4)
    with pytest.raises(AssertionError, match="needs a model built with diffusion on"):
        model.forward_denoise(window, None)


@torch.no_grad()
def test_gaussian_noise_mixes_an_embedding_with_noise_by_its_level() -> None:
    """The variance-preserving process on embeddings: sqrt(1 - t) e + sqrt(t) noise.

    Clean at 0, without a trace of the token at 1 (arXiv:2205.14217, arXiv:2211.15089).
    """
    cfg = tiny(diffusion_corruption_mode="gaussian", look_ahead=0, bigram_vocab_size=50)
    model, x0 = randomise(tg.GPT(cfg)).double(), random_rows(3, 4, 64)[:, None]
    everywhere, keys = torch.ones_like(x0, dtype=torch.bool), torch.arange(3)[:, None]

    def embedded(x0: Tensor, level: float) -> tuple[Tensor, Tensor]:
        """Embeddings of the window, without the clean token before it, and their noise."""
        t, mask = torch.full((3, 1), level), torch.ones(5, 5, dtype=torch.bool)
        noisy = tg.apply_noise(x0, everywhere, t, keys, cfg, 0.0)
        assert noisy.noise is not None
        window = tg.WindowInput(torch.zeros(3, 1, 1).long(), noisy, torch.arange(5), mask)
        return model.embed_windows(window, None)[0][:, 1:], noisy.noise[:, 0]

    clean = tg.rms_norm(model.tok_emb[x0[:, 0]])
    for level in (1e-9, 0.25, 0.5, 0.75, 1.0):
        found, noise = embedded(x0, level)
        expected = tg.rms_norm((1 - level) ** 0.5 * clean + level**0.5 * noise)
        # Roots and noise are float32; the norm of what they mix is near 1.
        bound = 8 * rounding(1) * noise.abs().max().item()
        torch.testing.assert_close(found, expected, rtol=0, atol=bound)
        if level < 1e-6:
            bound = 2 * level**0.5 * noise.abs().max().item()
            torch.testing.assert_close(found, clean, rtol=0, atol=bound)
    assert embedded(x0, 1.0)[0].equal(embedded((x0 + 1) % 64, 1.0)[0])
    assert not embedded(x0, 0.9)[0].equal(embedded((x0 + 1) % 64, 0.9)[0])

"""The sequential head: its exact likelihood, its fit, its file, and the tokens it chooses."""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import train_gpt as tg
from scripts import chain, common
from scripts.chain import Head
from tests.bench import artifacts
from tests.conftest import CPU, Called, facts, outcome, random_rows, randomise, tiny

V = 4
SMALL: dict[str, Any] = dict(vocab_size=V, train_seq_len=6, bigram_vocab_size=7, look_ahead=2)
SMALL |= dict(diffusion_windows="3", nelbo_windows="", parallel_eval_examples=0)
SMALL |= dict(train_batch_tokens=24, micro_batches=2)
# The number of the pass that decides each token of a window of three.
ORDERS = [[0, 0, 0], [0, 0, 1], [0, 1, 1], [0, 1, 0], [1, 0, 1], [1, 0, 0], [0, 1, 2], [2, 1, 0]]


def random_head(model: tg.GPT) -> Head:
    """A head of random weights, so that it changes every choice, in double precision."""
    head = Head(model, 2, seed=1).double()
    for p in head.parameters():
        torch.nn.init.normal_(p, generator=torch.Generator().manual_seed(p.numel()))
    return head


def small(**overrides: Any) -> tuple[tg.GPT, Head]:
    model = randomise(tg.GPT(tiny(**SMALL | overrides))).double()
    return model, random_head(model)


@torch.no_grad()
def nll(model: tg.GPT, head: Head | None, rows: Tensor, order: Sequence[int]) -> Tensor:
    """Nats of the windows' tokens, (B, W, S)."""
    mask = chain.window_groups(model.cfg, len(order), CPU)
    found = chain.parallel_nll(model, head, rows, torch.tensor(order), mask).double()
    return found[0 if head is None else 1]


# ---- likelihood ----


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("with_head", [True, False])
def test_probabilities_of_all_windows_sum_to_one(order: list[int], with_head: bool) -> None:
    model, head = small()
    every = torch.tensor(list(itertools.product(range(V), repeat=3)))
    start = torch.tensor([[1, 3, 0, 2]]).expand(len(every), -1)
    rows = torch.cat((start, every), dim=1)  # the second window of each row
    p = nll(model, head if with_head else None, rows, order)[:, 1].sum(-1).neg().exp()
    assert p.sum().item() == pytest.approx(1, abs=1e-6)  # nats are kept in fp32
    assert p.max() > 2 / len(every)  # not the uniform distribution


def test_text_after_a_span_is_given_and_read() -> None:
    (model, head), rows = small(), random_rows(2, 7, V)
    found = nll(model, head, rows, [0, 0, -1])
    assert bool((found[..., 2] == 0).all())
    other = rows.clone()
    other[:, 6] = (other[:, 6] + 1) % V  # the last window's text after the span
    assert not torch.allclose(nll(model, head, other, [0, 0, -1])[:, 1], found[:, 1])


@torch.no_grad()
def slow_nll(model: tg.GPT, head: Head, rows: Tensor, order: Sequence[int]) -> Tensor:
    """The same score by definition, a token at a time, for the second window of each row."""
    size, T, out = len(order), model.cfg.train_seq_len, torch.zeros(len(rows), len(order))
    cache = model.forward_causal(rows[:, :-1])[1]
    mask = tg.window_mask(T, size, causal=False, device=CPU)
    tokens, positions = tg.split_into_windows(rows, size)
    for row, number in itertools.product(range(len(rows)), range(max(order) + 1)):
        hidden = torch.tensor([n >= number for n in order]).expand_as(tokens[..., 1:])
        xt = tokens[..., 1:].masked_fill(hidden, V)
        noisy = tg.Corruption(xt, hidden, hidden, hidden.float().mean(-1))
        window = tg.WindowInput(tokens[..., :1], noisy, positions, mask)
        logits = model.forward_denoise(window, cache)[row, 1]
        for j in [j for j in range(size) if order[j] == number]:
            scores = logits[j]
            if j and order[j - 1] == number:
                unknown = F.pad(torch.tensor(order) > number, (1, 0))
                left = tokens[row : row + 1, 1].masked_fill(unknown, V)[:, : j + 1]
                scores = scores + head(left)[0, -1]
            out[row, j] = -scores.log_softmax(-1)[tokens[row, 1, j + 1]]
    return out


@pytest.mark.parametrize("order", ORDERS)
def test_the_head_counts_where_the_same_pass_decided_the_token_to_the_left(
    order: list[int],
) -> None:
    (model, head), rows = small(), random_rows(3, 7, V)
    slow = slow_nll(model, head, rows, order)
    torch.testing.assert_close(nll(model, head, rows, order)[:, 1], slow.double())


def test_one_token_a_pass_needs_no_head() -> None:
    (model, head), rows = small(), random_rows(4, 7, V)
    torch.testing.assert_close(
        nll(model, head, rows, [0, 1, 2]), nll(model, None, rows, [0, 1, 2]), rtol=1e-5, atol=1e-6
    )
    two = nll(model, head, rows, [0, 0, 1]), nll(model, None, rows, [0, 0, 1])
    assert not torch.allclose(*two, rtol=0.1)


def test_windows_of_one_token_give_the_exact_bound() -> None:
    (model, head), rows = small(), random_rows(4, 7, V)
    mask = chain.window_groups(model.cfg, 1, CPU)
    keys = torch.arange(4)[:, None].expand(-1, 6)
    bound = tg.window_bounds(model, rows, keys, 1, 1, mask)[0]
    torch.testing.assert_close(nll(model, head, rows, [0])[..., 0], bound)


@pytest.mark.parametrize("order", [[0, 0, 0], [0, 1, 0]])
def test_a_uniform_predictor_scores_the_logarithm_of_the_vocabulary(order: list[int]) -> None:
    model = tg.GPT(tiny(**SMALL))
    torch.nn.init.zeros_(model.tok_emb)
    found = nll(model, Head(model, 2), random_rows(4, 7, V), order)
    torch.testing.assert_close(found, torch.full_like(found, math.log(V)), rtol=1e-6, atol=0)


# ---- choice ----


def test_tokens_of_one_pass_are_chosen_left_to_right() -> None:
    _, head = small()
    logits = torch.randn(3, 6, V, dtype=torch.double)
    decided = torch.tensor([[1, 1, 0, 1, 1, 1], [0, 1, 0, 1, 0, 1], [1, 1, 1, 1, 1, 1]]).bool()
    tokens = random_rows(3, 7, V + 1)  # V: still masked
    tokens[:, 0] = 1
    found = chain.choose_along_chain(head, logits, tokens, decided, lambda x, _: x.argmax(-1))
    for row in range(3):
        out = tokens[row].tolist()
        for j in range(6):
            scores = logits[row, j]
            if j and decided[row, j] and decided[row, j - 1]:
                scores = scores + head(torch.tensor([out[: j + 1]]))[0, -1]
            if decided[row, j]:
                out[j + 1] = int(scores.argmax())
        assert found[row].tolist() == out


@pytest.mark.parametrize("bigrams", [0, 7])
def test_a_step_equals_the_pass_over_all_tokens(bigrams: int) -> None:
    (_, head), ids = small(bigram_vocab_size=bigrams), random_rows(5, 4, V)
    with torch.no_grad():
        whole = head(ids)
        for i in range(1, 4):
            torch.testing.assert_close(head.step(ids[:, i - 1], ids[:, i]), whole[:, i])


def test_cached_steps_are_those_of_their_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    (_, head), ids = small(bigram_vocab_size=7), random_rows(1, 40, V + 1)
    monkeypatch.setattr(
        chain, "PAIR_CACHE_BYTES", 5 * head.bias.nbytes
    )  # so that they are dropped, too
    ids[:, 1::2] %= V  # the token to the left is known, the one before it may not be
    head.eval()
    for _ in range(2):
        for i in range(1, 40, 2):
            found, whole = head.step(ids[:, i - 1], ids[:, i]), head(ids[:, i - 1 : i + 1])
            torch.testing.assert_close(found, whole[:, -1].detach())
            assert 0 < len(head.pair_cache) <= 5
    cached = head.step(ids[:, 0], ids[:, 1])
    assert head.step(ids[:, 0], ids[:, 1]) is cached
    head.train()
    torch.nn.init.ones_(head.bias)
    assert not head.step(ids[:, 0], ids[:, 1]).equal(cached)  # weights that change are read


def test_only_the_head_gets_a_gradient() -> None:
    (model, head), rows = small(), random_rows(2, 7, V)
    mask = chain.window_groups(model.cfg, 3, CPU)
    chain.parallel_nll(model, head, rows, torch.zeros(3).long(), mask)[1].mean().backward()
    assert all(p.grad is None for p in model.parameters())
    trained = {name for name, p in head.named_parameters() if p.grad is not None and p.grad.any()}
    assert trained == {"fc.weight", "proj.weight", "bias"}
    head.zero_grad()
    chain.alone_nll(head, rows).mean().backward()
    assert all(p.grad is None for p in model.parameters())
    assert [name for name, p in head.named_parameters() if p.grad is not None] == ["prior"]


# ---- fit and file ----

FIT = ["--steps", "120", "--batch-tokens", "128", "--lr", "0.01", "--width", "2"]


@pytest.fixture
def artifact(tmp_path: Path, data: dict[str, Any]) -> Path:
    cfg = tiny(**data, bigram_vocab_size=50)
    sha256 = tg.ByteCounter(cfg).sha256
    weights = dict(randomise(tg.GPT(cfg), std=0.1).named_parameters())
    artifacts.save(tmp_path / "a.ptz", weights, cfg, sha256)
    return tmp_path / "a.ptz"


def fit(artifact: Path, capsys: pytest.CaptureFixture[str], *options: str) -> Called:
    out = ["--out", str(artifact.with_name("head.ptz"))]
    return outcome(chain.main, [str(artifact), *FIT, *out, *options], capsys)


def test_a_folder_without_an_artifact_is_told_how_to_name_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    status, _, err = outcome(chain.main, [], capsys)
    assert status == 2
    assert "; name one, or train one: python train_gpt.py" in err  # it has no --artifact


@pytest.mark.slow
def test_a_fitted_head_makes_tokens_of_one_pass_more_likely(
    artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = artifact.read_bytes()
    found = facts(fit(artifact, capsys))
    assert found["with_head_nats"] < 0.98 * found["without_head_nats"]
    assert found["last_loss"] < found["first_loss"]
    assert artifact.read_bytes() == before
    model = tg.load_artifact(artifact, CPU)[0]
    head = chain.load_head(artifact.with_name("head.ptz"), model, artifact)
    assert found["head_bytes"] == artifact.with_name("head.ptz").stat().st_size
    rows = tg.TokenLoader(model.cfg, "train").rows(0, 40, model.cfg.train_seq_len)
    fitted = chain.alone_nll(head, rows).mean().item()
    head.prior.requires_grad_(False).zero_()
    assert fitted < 0.98 * chain.alone_nll(head, rows).mean().item()  # drafts begin with it
    val = tg.TokenLoader(model.cfg, "val")
    rows = val.rows(0, (val.total - 1) // model.cfg.train_seq_len, model.cfg.train_seq_len)
    score = nll(model, head, rows, [0] * 8).mean().item()
    assert score == pytest.approx(found["with_head_nats"], rel=1e-4)


def test_a_fit_is_fixed_by_its_seed(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = list[bytes]()
    for seed in (1, 1, 2):
        facts(fit(artifact, capsys, "--steps", "3", "--seed", str(seed)))
        files.append(artifact.with_name("head.ptz").read_bytes())
    assert files[0] == files[1] != files[2]


def test_a_batch_of_less_than_a_row_is_refused(
    artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, err = fit(artifact, capsys, "--batch-tokens", "8")
    assert status == 2
    assert "--batch-tokens=8 is less than a row of " in err


def test_a_head_of_another_artifact_is_refused(
    artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts(fit(artifact, capsys, "--steps", "1"))
    model, other = tg.load_artifact(artifact, CPU)[0], artifact.with_name("b.ptz")
    artifacts.save(other, dict(randomise(model).named_parameters()), model.cfg)
    with pytest.raises(tg.UserError, match=r"belongs to another artifact: .* fit one: python"):
        chain.load_head(artifact.with_name("head.ptz"), model, other)


@pytest.mark.parametrize("damage", ["gone", "cut", "flipped", "foreign", "shape", "nan", "width"])
def test_a_damaged_head_is_refused(
    damage: str, artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts(fit(artifact, capsys, "--steps", "1"))
    path, model = artifact.with_name("head.ptz"), tg.load_artifact(artifact, CPU)[0]
    data, head = path.read_bytes(), chain.load_head(path, model, artifact)
    about = {"artifact_sha256": common.sha256_of(artifact), "width": 2}
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(data[:-9])
    elif damage == "flipped":
        path.write_bytes(data[:99] + bytes([data[99] ^ 1]) + data[100:])
    elif damage == "foreign":
        path.write_bytes(artifact.read_bytes())
    else:
        wide = Head(model, 3) if damage == "shape" else head
        width: Any = "2" if damage == "width" else 2
        chain.save_head(path, wide, about | {"width": width})
        if damage == "nan":
            tensors = {k: p.detach().half() for k, p in head.named_parameters()}
            tensors["bias"] = tensors["bias"] + math.nan
            packed = tg.pack_tensors({"format": chain.FORMAT, **about}, tensors)
            path.write_bytes(zlib.compress(packed))
    with pytest.raises(tg.UserError, match=r"head .*head\.ptz is missing, damaged or not ours"):
        chain.load_head(path, model, artifact)


def test_a_head_of_an_older_format_is_to_be_fitted_again(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, path = tg.load_artifact(artifact, CPU)[0], artifact.with_name("head.ptz")
    with monkeypatch.context() as patch:
        patch.setattr(chain, "FORMAT", "text-diffusion-head-1")
        about = {"artifact_sha256": common.sha256_of(artifact), "width": 2}
        chain.save_head(path, Head(model, 2), about)
    with pytest.raises(tg.UserError, match="of another version of this program; fit one: python"):
        chain.load_head(path, model, artifact)


# ---- bad input ----


def test_a_head_beside_the_artifact_is_found(
    artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tg.load_artifact(artifact, CPU)[0]
    assert chain.find_head(None, model, artifact) is None
    found = facts(outcome(chain.main, [str(artifact), "--steps", "1"], capsys))
    beside = artifact.with_suffix(".head")
    assert found["head"] == str(beside)
    assert chain.find_head(None, model, artifact) is not None
    beside.write_bytes(b"damaged")
    assert chain.find_head(None, model, artifact) is None
    assert "warning: left out: head" in capsys.readouterr().err
    with pytest.raises(tg.UserError, match="missing, damaged or not ours"):
        chain.find_head(beside, model, artifact)


def test_a_model_without_a_denoiser_has_no_head(
    tmp_path: Path, data: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = tiny("ar", **data)
    path = tmp_path / "a.ptz"
    artifacts.save(path, dict(tg.GPT(cfg).named_parameters()), cfg)
    status, _, err = fit(path, capsys)
    assert status == 2
    assert "has no denoiser (DIFFUSION_LOSS_WEIGHT=0)" in err


@pytest.mark.parametrize("mode", ["uniform", "hybrid", "gaussian"])
def test_a_head_is_refused_where_a_visible_token_may_be_wrong(
    mode: str, tmp_path: Path, data: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = tiny(**data, diffusion_corruption_mode=mode)
    path = tmp_path / "a.ptz"
    artifacts.save(path, dict(tg.GPT(cfg).named_parameters()), cfg)
    status, _, err = fit(path, capsys)
    assert status == 2
    assert f"has DIFFUSION_CORRUPTION_MODE={mode}; " in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--window", "3"], "--window=3 must divide the 16 tokens of a row"),
        (["--window", "1"], "argument --window"),
        (["--steps", "0"], "argument --steps"),
        (["--out", "."], "--out=. must be a file in a folder that exists"),
        (["--lr", "1e-9", "--width", "65"], "argument --width"),
    ],
)
def test_options_that_cannot_be_used_are_named(
    options: list[str], message: str, artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, err = fit(artifact, capsys, *options)
    assert status == 2
    assert message in err
    assert "Traceback" not in err


def test_the_head_must_not_replace_the_artifact(
    artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, err = fit(artifact, capsys, "--out", str(artifact))
    assert status == 2
    assert "is the artifact; name another file" in err

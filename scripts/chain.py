"""Fit a sequential head to an artifact, so that tokens which one pass decides fit each other.

    python scripts/chain.py final_model.int6.ptz        writes final_model.int6.head beside it
    python scripts/sample.py --artifact final_model.int6.ptz --prompt 'def f(' --mode block
    python scripts/bench/passes.py --artifact final_model.int6.ptz --head final_model.int6.head

A denoising pass predicts every masked token of a window on its own, so tokens that it decides
together do not fit each other. The head decides them from left to right: it adds to the logits of a
token what the two tokens before it tell, at the cost of a small MLP a token and no further pass.
The joint probability of what a pass decides is then a product of conditionals: exact, normalised,
and sampled by ancestral sampling. Without a window it drafts tokens for mode speculative. The model
is frozen, so none of its other scores change.

Text comes from DATA_PATH and TOKENIZER_PATH, or from where the artifact was trained. Progress goes
to standard error; the last line of standard output is one JSON object.

Sources: Hydra heads (arXiv:2402.05109), NART-CRF (arXiv:1910.11555), Discrete Copula Diffusion
(arXiv:2410.01949), EDLM (arXiv:2410.21357), adaptive parallel decoding (arXiv:2506.00413).
"""

from __future__ import annotations

import sys
from os.path import abspath, dirname

sys.path.insert(0, dirname(dirname(abspath(__file__))))  # the repository
import scripts.process  # noqa: F401 -- first: Ctrl-C ends the imports below in one line, too

# isort: split
import argparse
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import train_gpt as tg
from scripts.bench.text import open_validation
from scripts.common import (
    Parser,
    autocast,
    check_base,
    check_outputs,
    fail,
    load_artifact,
    newest_artifact,
    pick_device,
    run_command,
    sha256_of,
    text_config,
    warn,
)

FORMAT = "text-diffusion-head-2"
SUFFIX = ".head"
FIT = "fit one: python scripts/chain.py {}"
MOST_WIDTH = 64  # of the MLP, in multiples of the model's width
PAIR_CACHE_BYTES = 1 << 26
ROWS_AT_ONCE = 8
PRIOR_LR = 0.03  # first learning rate of the base logits for drafts, one number per token
CHECKED_TOKENS = 1 << 16  # validation tokens of the scores before and after

# Shapes: B rows, T + 1 tokens of a row, W windows of S tokens per row, V vocabulary, D width.


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; exits with 2 on a wrong one."""
    parser = Parser(__doc__)
    add = parser.add_argument
    newest = "default: the newest final_model.*.ptz of the current folder"
    add("artifact", type=Path, nargs="?", help=newest)
    beside = "default: FILE.head beside the artifact, where sample.py and serve.py look"
    add("--out", type=Path, metavar="FILE", help=beside)
    parser.whole("--steps", 300, "optimizer steps", high=10**5)
    parser.whole("--batch-tokens", 2048, "tokens per step", high=10**6)
    parser.whole("--window", 8, "tokens of the windows it is fitted on", low=2)
    parser.whole("--width", 8, "width of its MLP / D", high=MOST_WIDTH)
    lr = "first learning rate (Adam), which falls to 0; of the base logits 0.03"
    parser.real("--lr", 0.001, lr, 1e-9, 1)
    parser.whole("--seed", 1337, "fixes initial weights and which text is read", low=0)
    parser.device()
    return parser.parse_args(argv)


# ==============================================================================
# 1  HEAD -- what the tokens to the left add to the logits, and its file
# ==============================================================================


class Head(nn.Module):
    """An MLP on the token to the left and the pair it ends; the output matrix is the model's. It
    corrects the logits of a window, and with base logits of its own (`prior`) drafts without one.
    """

    def __init__(self, model: tg.GPT, width: int, seed: int = 0) -> None:
        super().__init__()
        dim = model.cfg.model_dim
        self.fc = nn.Linear(dim, width * dim, bias=False)
        self.proj = nn.Linear(width * dim, dim, bias=False)
        self.bias = nn.Parameter(torch.zeros(model.cfg.vocab_size))
        self.prior = nn.Parameter(torch.zeros(model.cfg.vocab_size))
        self.model = (model,)  # in a tuple, so that its weights are none of this module
        self.pair_cache: dict[tuple[int, int], Tensor] = {}  # of step(), (1, V) by pair
        generator = torch.Generator().manual_seed(seed)
        nn.init.uniform_(self.fc.weight, -(dim**-0.5), dim**-0.5, generator=generator)
        nn.init.zeros_(self.proj.weight)  # the head adds nothing at first

    def forward(self, ids: Tensor) -> Tensor:
        """Return what is added to the logits after each of consecutive tokens.

        Args:
            ids: (B, n) int64; V is a token that is not known yet, as the one before the token to
                the left may be.

        Returns:
            (B, n, V). Only the head gets a gradient.
        """
        return self.logits(self.left(ids))

    @torch.no_grad()
    def left(self, ids: Tensor) -> Tensor:
        """Embed tokens (B, n), each with the pair it ends, as the model does: (B, n, D)."""
        model = self.model[0]
        emb = tg.rms_norm(F.embedding(ids.clamp_max(model.cfg.vocab_size - 1), model.tok_emb))
        return model.add_bigrams(emb, ids, torch.arange(ids.shape[1], device=ids.device), None)

    def logits(self, left: Tensor) -> Tensor:
        """Embedded tokens, pairs added, (..., D) to what is added to the logits, (..., V)."""
        model = self.model[0]
        table = model.tok_emb if model.lm_head is None else model.lm_head
        hidden = F.relu(self.fc(tg.rms_norm(left))).square()
        return F.linear(self.proj(hidden), table.detach(), self.bias)

    @torch.no_grad()
    def step(self, before: Tensor, token: Tensor) -> Tensor:
        """Same as `forward` for one token (B,) after another (B,): (B, V). In mode eval the
        result for one row on a CPU is cached by the pair of tokens: pairs come again, and a step
        takes longer than the lookup (docs/decoding.md).
        """
        if self.training or len(token) != 1 or token.is_cuda:  # int() would wait for a device
            return self.logits(self.left(torch.stack((before, token), dim=1))[:, -1])
        pair = int(before), int(token)
        if pair not in self.pair_cache:
            if len(self.pair_cache) >= PAIR_CACHE_BYTES // self.bias.nbytes:
                self.pair_cache.clear()
            self.pair_cache[pair] = self.after_pair(*pair)
        return self.pair_cache[pair]

    def after_pair(self, before: int, token: int) -> Tensor:
        """Same as `forward` for one pair, (1, V), in a third of the operations: those of a single
        token take longer to call than to compute.
        """
        model = self.model[0]
        pairs, table = model.bigram_embedding, model.tok_emb
        left = table[token] * mean_square(table[token]) ** -0.5
        if pairs is not None and before < model.cfg.vocab_size:
            left = left + pairs[int(tg.split_key(torch.tensor(before), token) % len(pairs))]
        # Only what follows rms_norm is scaled: relu(a x) ** 2 = a ** 2 relu(x) ** 2 where a > 0.
        hidden = self.proj.weight.mv(F.relu(self.fc.weight.mv(left)).square())
        table = table if model.lm_head is None else model.lm_head
        return torch.addmv(self.bias, table, hidden, alpha=1 / mean_square(left))[None]


def mean_square(x: Tensor) -> float:
    """Return what rms_norm divides a vector by, squared."""
    return float(x.dot(x)) / len(x) + torch.finfo(x.dtype).eps


def alone_nll(head: Head, rows: Tensor) -> Tensor:
    """Nats of all but the first two tokens of rows (B, n) by the head alone, without a window:
    (B, n - 2). Only the prior gets a gradient: the rest of the head is fitted beside a window.
    """
    with torch.no_grad():
        added = head(rows[:, :-1])[:, 1:]
    return tg.token_nll(head.prior + added, rows[:, 2:])


def save_head(path: Path, head: Head, about: Mapping[str, Any]) -> None:
    """Write a head as fp16, and what is said about it.

    Raises:
        UserError: it is not finite in fp16, or the file cannot be written.
    """
    tensors = {name: p.detach().cpu().half() for name, p in head.named_parameters()}
    if name := tg.first_not_finite(tensors):
        fail(f"{name} is not finite in fp16, so no head was written; lower --lr")
    data = zlib.compress(tg.pack_tensors({"format": FORMAT, **about}, tensors), 9)
    tg.atomic_write(path, data, "head")


def load_head(path: Path, model: tg.GPT, artifact: Path) -> Head:
    """Read the head of a model that was loaded from `artifact`.

    Raises:
        UserError: the file is missing or damaged, or of another artifact.
    """
    try:
        about, tensors = tg.unpack_tensors(
            tg.decompress(b"" if path.is_fifo() else path.read_bytes())
        )
        if str(about["format"]).startswith(FORMAT[:-1]) and about["format"] != FORMAT:
            fail(f"head {path} is of another version of this program; {FIT.format(artifact)}")
        if about["format"] != FORMAT:
            raise ValueError(f"its format is not {FORMAT!r}")
        check_base(f"head {path}", about, artifact, FIT.format(artifact))
        if not 1 <= about["width"] <= MOST_WIDTH:
            raise ValueError(f"its width is {about['width']!r}")
        head = Head(model, about["width"])
        expected = {name: p.half() for name, p in head.named_parameters()}
        if unlike := tg.differing_shapes(expected, tensors) or tg.first_not_finite(tensors):
            raise ValueError(f"tensors do not fit this model, or are not finite: {unlike}")
    except tg.UserError:
        raise
    except Exception as error:  # zlib, json and torch fail in many ways on foreign bytes
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        rule = f"is missing, damaged or not ours ({why}); copy it again"
        fail(f"head {path} {rule}, or {FIT.format(artifact)}")
    head.load_state_dict({name: w.float() for name, w in tensors.items()})
    return head.to(model.tok_emb.device).eval()


def find_head(given: Path | None, model: tg.GPT, artifact: Path) -> Head | None:
    """Read the head that is given, or else the one beside the artifact, if there is one.

    Raises:
        UserError: the one that is given is missing or damaged, or of another artifact; one that is
            only found is left out with a warning.
    """
    beside = artifact.with_suffix(SUFFIX)
    if given is not None or not beside.is_file():
        return None if given is None else load_head(given, model, artifact)
    try:
        return load_head(beside, model, artifact)
    except tg.UserError as error:
        warn(f"left out: {error}")
        return None


# ==============================================================================
# 2  ONE PASS -- its exact likelihood, and the choice of its tokens
# ==============================================================================
def window_groups(cfg: tg.Config, size: int, device: torch.device) -> tuple[Tensor, ...]:
    """Which keys windows of `size` tokens read, in groups, as WindowInput takes it."""
    mask = tg.window_mask(cfg.train_seq_len, size, cfg.diffusion_causal, device)
    return tg.split_mask(mask, size)


def parallel_nll(
    model: tg.GPT, head: Head | None, rows: Tensor, order: Tensor, mask: tuple[Tensor, ...]
) -> Tensor:
    """Score decoding by a schedule that is fixed in advance: exact, without samples. A pass decides
    its tokens left to right, each from the windows as they were at its start and, if the same pass
    decided the token to its left, from what the head adds to that.

    Args:
        model: with a denoiser.
        head: None: only the first result is of use.
        rows: (B, T + 1) int64; windows of S tokens cover all but the first.
        order: (S,) int64 number of the pass that decides a token, from 0 on; -1: it is given.
        mask: of windows of S tokens, by `window_groups`.

    Returns:
        Nats of each token, (2, B, W, S) float32; 0 where it is given. First those of tokens that
        are decided independently of each other, then with the head, which alone gets a gradient.
    """
    tokens, positions = tg.split_into_windows(rows, len(order))
    before, x0, previous = tokens[..., :1], tokens[..., 1:], None
    nll = torch.zeros(2, *x0.shape, device=x0.device)
    with torch.no_grad():
        cache = model.forward_causal(rows[:, :-1])[1]
    for i in range(int(order.max()) + 1):
        masked, now = (order >= i).expand_as(x0), order == i
        t, keys = masked.float().mean(-1), torch.full_like(x0[..., 0], i)
        noisy = tg.apply_noise(x0, masked, t, keys, model.cfg)
        with torch.no_grad():
            window = tg.WindowInput(before, noisy, positions, mask, previous)
            logits = model.forward_denoise(window, cache)
            if model.cfg.self_condition == "soft":  # as decoders do from the second pass on
                previous = tg.expected_embedding(model, logits)
        found = [tg.token_nll(logits, x0)] * 2
        together = now & F.pad(now[:-1], (1, 0))  # this token and the one to its left
        if head is not None and bool(together.any()):
            known = torch.cat((before, x0.masked_fill(order > i, model.cfg.vocab_size)), dim=-1)
            added = head(known[..., :-1].flatten(0, 1)).view_as(logits)
            found[1] = tg.token_nll(logits + together[:, None] * added, x0)
        nll = torch.where(now, torch.stack(found), nll)
    return nll


Choose = Callable[[Tensor, int], Tensor]  # logits (B, V) of a token, its index: tokens (B,)


def choose_along_chain(
    head: Head, logits: Tensor, tokens: Tensor, decided: Tensor, choose: Choose
) -> Tensor:
    """Choose the tokens that a pass decides, left to right.

    Args:
        head: adds to the logits where the same pass decides the token to the left, too.
        logits: (B, S, V) of the pass.
        tokens: (B, 1 + S) windows, each after the clean token before it; V where still masked.
        decided: (B, S) bool.
        choose: from the logits of one token.

    Returns:
        Windows (B, 1 + S) with these tokens filled in.
    """
    tokens, together = tokens.clone(), F.pad(decided[:, :-1], (1, 0))
    columns, joined = decided.any(0).tolist(), together.any(0).tolist()  # one wait for a device
    for i in (i for i, any_row in enumerate(columns) if any_row):
        scores = logits[:, i]
        if joined[i]:
            added = head.step(tokens[:, i - 1], tokens[:, i])
            scores = torch.where(together[:, i, None], scores + added, scores)
        tokens[:, i + 1] = torch.where(decided[:, i], choose(scores, i), tokens[:, i + 1])
    return tokens


# ==============================================================================
# 3  FIT -- the model is frozen; windows that one pass decides whole, and the head without a window
# ==============================================================================


def why_no_head(cfg: tg.Config) -> str:
    """Return why a model cannot have a head; nothing if it can."""
    if not cfg.diffusion:
        return "no denoiser (DIFFUSION_LOSS_WEIGHT=0), so no pass to decode by"
    if (mode := cfg.diffusion_corruption_mode) != "mask":
        rule = "there any visible token may be a wrong one, so none is known; train with mask"
        return f"DIFFUSION_CORRUPTION_MODE={mode}; {rule}"
    return ""


def check_model(args: argparse.Namespace, cfg: tg.Config) -> None:
    """Raise UserError if the model cannot have a head, or windows do not fit."""
    if reason := why_no_head(cfg):
        fail(f"{args.artifact} has {reason}")
    T, name = cfg.train_seq_len, f"--window={args.window}"
    if T % args.window:
        fail(f"{name} must divide the {T} tokens of a row (TRAIN_SEQ_LEN); choose another")
    if args.batch_tokens < T:
        rule = f"is less than a row of {T} (TRAIN_SEQ_LEN); raise it"
        fail(f"--batch-tokens={args.batch_tokens} {rule}")
    if args.out.exists() and args.out.samefile(args.artifact):
        fail(f"--out={args.out} is the artifact; name another file")


@torch.no_grad()
def scores(model: tg.GPT, head: Head, rows: Tensor, size: int) -> dict[str, float]:
    """Mean nats per token of the clean stream, of windows that one pass decides without and with
    the head, and of the head alone.
    """
    order = torch.zeros(size, dtype=torch.long, device=rows.device)
    mask, sums = window_groups(model.cfg, size, rows.device), [0.0, 0.0, 0.0, 0.0]
    for part in torch.split(rows, ROWS_AT_ONCE):
        with autocast(rows.device):
            causal = tg.token_nll_causal(model, part)
            both, alone = parallel_nll(model, head, part, order, mask), alone_nll(head, part)
        for i, nats in enumerate((causal, *both, alone)):
            sums[i] += nats.double().mean().item() * len(part) / len(rows)
    names = ("causal_nats", "without_head_nats", "with_head_nats", "alone_nats")
    return dict(zip(names, sums, strict=True))


def fit(
    head: Head, loader: tg.TokenLoader, args: argparse.Namespace, device: torch.device
) -> list[float]:
    """Train the head by Adam, its learning rate falling linearly to 0; the loss of each step."""
    model, losses = head.model[0], list[float]()
    T, order = model.cfg.train_seq_len, torch.zeros(args.window, dtype=torch.long, device=device)
    mask = window_groups(model.cfg, args.window, device)
    count = args.batch_tokens // T
    others = [p for p in head.parameters() if p is not head.prior]
    groups = [{"params": others, "first": args.lr}, {"params": [head.prior], "first": PRIOR_LR}]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
    start = int(tg.random_uniform(torch.tensor(args.seed), 1).item() * loader.total)
    for step in tqdm(range(args.steps), "fit", file=sys.stderr):
        rows = loader.rows(start + step * count * T, count, T, device)
        with autocast(device):
            loss = parallel_nll(model, head, rows, order, mask)[1].mean()
            total = loss + alone_nll(head, rows).mean()
        losses.append(loss.item())
        if not losses[-1] < float("inf"):
            fail(f"the loss is not finite at step {step}; lower --lr={args.lr}")
        for group in optimizer.param_groups:
            group["lr"] = group["first"] * (1 - step / args.steps)
        optimizer.zero_grad()
        total.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return losses


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Fit a head, write it, and score it as read from the file."""
    device = pick_device(args.device)
    args.artifact = args.artifact or newest_artifact(remedy="name one")
    artifact = load_artifact(args.artifact, device)
    model, cfg = artifact.model, text_config(artifact.model.cfg)
    args.out = args.out or args.artifact.with_suffix(SUFFIX)
    check_outputs(args)
    check_model(args, cfg)
    model.requires_grad_(False)
    val, train = open_validation(artifact, cfg), tg.TokenLoader(cfg, "train")
    head, T = Head(model, args.width, args.seed).to(device), cfg.train_seq_len
    began = time.perf_counter()
    losses = fit(head, train, args, device)
    seconds = time.perf_counter() - began
    about = {"artifact_sha256": sha256_of(args.artifact), "width": args.width}
    save_head(args.out, head, {**about, **artifact.identity})
    rows = val.rows(0, min(CHECKED_TOKENS, val.total - 1) // T, T, device)
    found = scores(model, load_head(args.out, model, args.artifact), rows, args.window)
    for name, nats in found.items():
        tqdm.write(f"{name:20} {nats:.4f}  {nats / found['causal_nats']:.4f} x", file=sys.stderr)
    options = {name: getattr(args, name) for name in ("steps", "batch_tokens", "window", "width")}
    result = {"artifact": str(args.artifact), "head": str(args.out), **options, "lr": args.lr}
    result |= {"head_bytes": args.out.stat().st_size, "seconds": seconds, "seed": args.seed}
    return (
        result | found | {"first_loss": losses[0], "last_loss": losses[-1], "tokens": rows.numel()}
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    args = parse_args(argv)
    return run_command(lambda: run(args), resume="the head is written at the end; rerun")


if __name__ == "__main__":
    sys.exit(main())

"""An artifact as a model of lm-evaluation-harness, scored exactly, left to right.

Every log-likelihood is the chain rule's over the causal stream. The diffusion bound is an estimate
of an upper bound of the negative log-likelihood: it is given by `bound`, never as a log-likelihood.

Context. A document begins with BOS, as in training, and BOS itself is not scored. A token is
predicted from at most TRAIN_SEQ_LEN tokens. A longer document is read in windows of TRAIN_SEQ_LEN
predicted tokens, each after one token of context; only the last window, if it is shorter, reads
more context. So bits_per_byte of a document whose tokens are a multiple of TRAIN_SEQ_LEN is val_bpb
of a validation split that holds this document alone. On other documents they differ in three ways:
val_bpb scores the BOS of the next document (nats, but no bytes), its rows begin at multiples of
TRAIN_SEQ_LEN of the whole stream, so that their context crosses documents, and it leaves out the
tokens after the last whole row.

Bytes. The harness divides by len(text.encode()); val_bpb by the bytes that tokens stand for
(`ByteCounter`). They differ where the tokenizer does not give the text back: it folds white space
or Unicode forms, or has no token for a character (an unknown token counts 0 bytes, though its nats
are scored). val_bpb_source_bytes of a run's log is the score by the former count.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from tqdm import tqdm

import train_gpt as tg
from scripts.common import autocast, fail, load_artifact, open_tokenizer, pick_device
from scripts.decoding import MODES, Sampling, check_decoding, check_span, decode, needs_denoiser

Request = tuple[tuple[str, str], list[int], list[int]]  # texts, tokens of context and continuation
DEFAULT_NEW_TOKENS = 256  # of generate_until, where a task does not say


class Bound(NamedTuple):
    """Sums over documents of an estimated upper bound of the negative log-likelihood."""

    nats: float
    variance: float  # of nats, by the Monte Carlo samples
    num_bytes: int  # of the texts

    def report(self) -> dict[str, float]:
        """Return the bound and its standard error in bits per byte."""
        per_byte = [tg.bits_per_byte(x, self.num_bytes) for x in (self.nats, self.variance**0.5)]
        return {"nelbo_bits_per_byte": per_byte[0], "standard_error": per_byte[1]}


@register_model("text_diffusion")
class TextDiffusionLM(TemplateLM):
    """A model of lm_eval: loglikelihood, loglikelihood_rolling and generate_until.

    Args:
        artifact: path of final_model.*.ptz.
        tokenizer: path of its SentencePiece model; empty: the one that the artifact names.
        device: auto, cpu or cuda.
        batch_size: rows of a pass.
        mode: row of scripts/decoding.MODES that generate_until decodes by.
    Raises:
        UserError: artifact or tokenizer is missing or damaged, or they do not belong together; the
            mode is unknown, or needs a denoiser that the model does not have.
    """

    def __init__(
        self,
        artifact: str | Path,
        tokenizer: str | Path = "",
        device: str = "auto",
        batch_size: int = 8,
        mode: str = "ar",
        **_: Any,  # what lm_eval passes to every model, such as max_batch_size
    ) -> None:
        super().__init__()
        if mode not in MODES:
            fail(f"--mode={mode} is unknown; name one of {', '.join(MODES)}")
        self._device = pick_device(device)
        loaded = load_artifact(Path(artifact), self._device)
        self.model, self.batch_size, self.decoding = loaded.model, batch_size, MODES[mode]
        path = tokenizer or self.model.cfg.tokenizer_path
        remedy = "name that one: --tokenizer MODEL"
        self.processor = open_tokenizer(loaded, path, "tokenizer ", remedy).tokenizer
        check_decoding(self.decoding)
        check_span(self.model, torch.zeros(1, 1), 1, 1, needs_denoiser(self.decoding))
        self.rolled = defaultdict[str, list[str]](list)  # documents of each rolling task

    @property
    def eot_token_id(self) -> int:
        """Return BOS, which separates documents; so it is the prefix token of lm_eval, too."""
        return int(self.processor.bos_id())

    @property
    def max_length(self) -> int:
        """Return the most tokens that a token is predicted from."""
        return int(self.model.cfg.train_seq_len)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Encode a text, after BOS unless `add_special_tokens` is false."""
        ids: list[int] = self.processor.encode(string)
        return ids if add_special_tokens is False else [self.eot_token_id, *ids]

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Score continuations: nats (negative), and whether greedy decoding would give them.

        A context is cut on the left so that all tokens but the last are at most `max_length`.

        Raises:
            UserError: a continuation alone is longer.
        """
        found = [(0.0, True)] * len(requests)
        order = sorted(range(len(requests)), key=lambda i: -sum(map(len, requests[i][1:])))
        starts = range(0, len(order), self.batch_size)
        for start in tqdm(starts, "loglikelihood", disable=disable_tqdm or None):
            batch = order[start : start + self.batch_size]
            rows = [self.row(*requests[i][1:]) for i in batch]
            width = max(map(len, rows))
            # Causal: what is behind a row's last token changes no prediction of it.
            ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
            ids = ids.to(self._device)
            with autocast(self._device):
                logits = self.model.forward_causal(ids[:, :-1])[0]
            nats, greedy = tg.token_nll(logits, ids[:, 1:]), logits.argmax(-1) == ids[:, 1:]
            for i, row, n, same in zip(batch, rows, nats, greedy, strict=True):
                scored = slice(len(row) - 1 - len(requests[i][2]), len(row) - 1)
                found[i] = -n[scored].double().sum().item(), bool(same[scored].all())
        return found

    def row(self, context: list[int], continuation: list[int]) -> list[int]:
        """Join context and continuation and cut the former; UserError: no room for the latter."""
        if len(continuation) > self.max_length:
            rule = f"exceeds the {self.max_length} this model was trained to read (TRAIN_SEQ_LEN)"
            fail(f"a continuation of {len(continuation)} tokens {rule}; leave its task out")
        return (context + continuation)[-(self.max_length + 1) :]

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Score whole documents; an empty one scores 0. UserError: all are empty."""
        windows, owners = list[Request](), list[int]()
        for i, request in enumerate(requests):
            (text,) = request.args
            self.rolled[str(request.task_name)].append(text)
            ids = self.tok_encode(text, add_special_tokens=False)
            for pair in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1):
                windows.append((("", ""), *make_disjoint_window(pair)))
                owners.append(i)
        if not windows:
            fail("the documents of the rolling task hold no text; name others")
        totals = [0.0] * len(requests)
        scores = self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)
        for i, (nats, _) in zip(owners, scores, strict=True):
            totals[i] += nats
        return totals

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Continue texts up to a stop sequence, a new document (BOS) or max_gen_toks tokens.

        Where prompt and max_gen_toks do not fit `max_length`, half of it at least is generated,
        and the prompt is cut on the left. Each request has its own seed.
        """
        found = list[str]()
        for seed, request in enumerate(tqdm(requests, "generate", disable=disable_tqdm or None)):
            text, options = request.args
            found.append(self.generate(text, options, seed))
        return found

    def generate(self, text: str, options: dict[str, Any], seed: int) -> str:
        """Continue one text; `options` are those of a task's generation_kwargs."""
        given = normalize_gen_kwargs(options, DEFAULT_NEW_TOKENS)
        ids = self.tok_encode(text)
        room = max(self.max_length - len(ids), self.max_length // 2)
        num = max(min(given["max_gen_toks"], room), 1)
        ids = ids[-(self.max_length - num) :]
        temperature = given.get("temperature", float(bool(given.get("do_sample"))))
        sampling = Sampling(temperature=temperature, seed=seed, end=self.eot_token_id)
        limits = {k: given[k] for k in ("top_p", "top_k") if given.get(k)}
        decoding = self.decoding._replace(sampling=sampling._replace(**limits))
        rows = torch.tensor([ids + [0] * num], device=self._device)
        with autocast(self._device):
            out = decode(self.model, rows, len(ids), len(ids) + num, decoding).ids[0].tolist()
        span = out[len(ids) :]
        if self.eot_token_id in span:
            span = span[: span.index(self.eot_token_id)]
        before, whole = (str(self.processor.decode(part)) for part in (ids, ids + span))
        new = whole[len(before) :] if whole.startswith(before) else str(self.processor.decode(span))
        ends = [new.find(stop) for stop in given["until"] if stop]
        return new[: min((end for end in ends if end >= 0), default=len(new))]

    def check_bound(self, size: int) -> None:
        """Raise UserError if there is no denoiser, or `size` does not divide TRAIN_SEQ_LEN."""
        name, limit = f"--bound-window={size}", self.max_length
        if self.model.mask_emb is None:
            why = "this model was trained without one (DIFFUSION_LOSS_WEIGHT=0)"
            fail(f"{name} needs a denoiser, and {why}; leave it out")
        if limit % size:
            fail(f"{name} must divide {limit} (TRAIN_SEQ_LEN of this model); name another size")

    @torch.no_grad()
    def bound(self, texts: Sequence[str], size: int, samples: int) -> Bound:
        """Bound the diffusion likelihood of documents over windows of `size` tokens.

        Rows are those of `loglikelihood_rolling`, but each after one token of context. Tokens after
        a row's last whole window are windows of one token.

        Args:
            texts: documents.
            size: tokens of a window; it divides TRAIN_SEQ_LEN.
            samples: Monte Carlo samples K, 2 or more.
        Raises:
            UserError: no denoiser, or a size that does not divide TRAIN_SEQ_LEN.
        """
        self.check_bound(size)
        nats, variance = 0.0, 0.0
        for number, row in enumerate(self.rows_of(texts)):
            whole = (row.shape[1] - 1) // size * size
            parts = [(row[:, : whole + 1], size, samples, 0)] * (whole > 0)
            parts += [(row, 1, 1, whole)] * (whole < row.shape[1] - 1)
            for part, each, count, first in parts:
                found = self.window_nats(part, number, each, count)[:, first:].sum(-1)  # (K,)
                nats += found.mean().item()
                variance += found.var().item() / count if count > 1 else 0.0
        return Bound(nats, variance, sum(len(text.encode()) for text in texts))

    def rows_of(self, texts: Sequence[str]) -> Iterator[Tensor]:
        """Yield rows (1, n + 1) of documents, n at most TRAIN_SEQ_LEN; they overlap by a token."""
        for text in texts:
            ids, T = self.tok_encode(text), self.max_length
            for start in range(0, len(ids) - 1, T):
                yield torch.tensor([ids[start : start + T + 1]], device=self._device)

    def window_nats(self, row: Tensor, number: int, size: int, samples: int) -> Tensor:
        """Sample the bounds of windows of a row (1, n + 1): (K, n / size) float64 nats."""
        cfg, num = self.model.cfg, row.shape[1] - 1
        index = torch.arange(num // size, device=self._device)
        keys = tg.split_key(torch.tensor([[number]], device=self._device), cfg.eval_seed, index)
        mask = tg.window_mask(num, size, cfg.diffusion_causal, self._device)
        with autocast(self._device):
            return tg.window_bounds(self.model, row, keys, size, samples, mask)[:, 0]

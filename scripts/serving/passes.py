"""Take passes of a model over rows that are at different places.

Each row has a slot of static buffers, whose places are positions of its text: place p holds the
keys and values of the token at position p, and the last place is scratch for what nobody reads. A
window that is denoised is stored at its own positions; the clean stream overwrites it before it
reads there. All passes run on one thread, under the caller's autocast.

Buffers of T + 1 places take 19 MB per slot at the default size (9 layers, 4 heads of 64 channels,
T = 1,024, float32; half in bf16), so 64 slots take 1.2 GB: pages of keys (arXiv:2309.06180) are not
worth their bookkeeping at this length.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import train_gpt as tg
from scripts.chain import Head, choose_along_chain
from scripts.decoding import Sampling, draft_by_head, draw_noise, sample_tokens

# Shapes: R rows of a pass, N tokens of each, S tokens of a window without the clean one before it,
# V vocabulary, D width, P places.

ALIGNED = 32  # places are cut to a multiple of it
NO_TOKEN = -1
SMALLEST = 8  # tokens: least width of a pass whose width is fixed


class Top(NamedTuple):
    """The most probable tokens at one position."""

    tokens: list[int]
    log_p: list[float]  # nats


class Choices(NamedTuple):
    """What a pass chooses at each of n positions."""

    tokens: list[int]
    log_p: list[float]  # nats, without temperature
    top: list[Top]  # empty unless the row wants them
    draft: Sequence[int] = ()  # tokens of the sequential head, which the pass has read, too


class Unmasked(NamedTuple):
    """Tokens of a window after a denoising pass."""

    tokens: list[int]  # S; masked ones are predictions
    log_p: list[float]  # S, nats
    masked: list[bool]  # S, still masked
    previous: Tensor | None  # (S, D) expected embeddings, for the next pass


class Step(NamedTuple):
    """Read a few clean tokens and choose a token after each."""

    slot: int
    tokens: list[int]
    first: int  # position of the first
    width: int  # tokens that the pass is padded to, so that rows of one mode share passes
    key: int  # random key of the row
    sampling: Sampling
    top: int = 0  # how many alternatives to report at each position
    before: int = NO_TOKEN  # the token before the first
    draft: int = 0  # tokens for the sequential head to draft, if there is one


class Read(NamedTuple):
    """Read clean tokens; score each of `targets` after the token before it."""

    slot: int
    tokens: list[int]
    first: int
    targets: list[int]  # n tokens after the first n tokens read; may be empty
    top: int = 0


class Denoise(NamedTuple):
    """Take one pass over a window, then unmask its most confident tokens."""

    slot: int
    first: int  # position of the clean token before the window
    tokens: list[int]  # 1 + S: that token, then the window's own
    masked: list[bool]  # S
    remaining: int  # how many tokens stay masked
    threshold: float  # probability above which a token is unmasked in any case
    step: int  # number of earlier passes over this window
    key: int
    sampling: Sampling
    previous: Tensor | None = None  # (S, D)


Pass = Step | Read | Denoise
Result = Choices | Unmasked


def fixed_width(count: int) -> int:
    """Round a number of tokens up to a power of two."""
    return max(SMALLEST, 1 << (count - 1).bit_length())


def runs(slots: Sequence[int]) -> Iterator[list[int]]:
    """Split sorted slots where they are far apart: idle slots between cost as much as others."""
    run = list[int]()
    for slot in slots:
        if run and slot - run[-1] > 2:
            yield run
            run = []
        run.append(slot)
    if run:
        yield run


class Passes:
    """A model with its buffers.

    Args:
        model: in evaluation mode.
        num_slots: rows at once.
        deterministic: every pass has all slots, all places and a fixed width, so that a row gets
            the same bits whatever its neighbours are. Otherwise results are equal but for rounding.
        head: of scripts/chain.py: tokens that a pass unmasks are chosen left to right, and mode
            speculative has drafts where the text has none.
    """

    def __init__(
        self,
        model: tg.GPT,
        num_slots: int,
        deterministic: bool = False,
        head: Head | None = None,
    ) -> None:
        self.model, self.num_slots, self.deterministic = model, num_slots, deterministic
        self.head = head
        self.device = next(model.parameters()).device
        self.length = model.cfg.train_seq_len
        one = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        cache = model.forward_causal(one)[1]  # tells the types of keys and values
        sizes = (num_slots, -1, self.length + 1, -1)
        self.keys = [torch.zeros_like(k.expand(*sizes)).contiguous() for k in cache.keys]
        self.values = [torch.zeros_like(v.expand(*sizes)).contiguous() for v in cache.values]
        self.tokens = one.new_zeros(num_slots, self.length + 1)
        self.used = [1] * num_slots  # places of each slot that hold something to keep

    def copy_prefix(self, source: int, target: int, count: int) -> None:
        """Copy the first `count` places of a slot to another one."""
        for x in (*self.keys, *self.values):
            x[target, :, :count] = x[source, :, :count]
        self.tokens[target, :count] = self.tokens[source, :count]

    def take(self, wanted: Sequence[Pass]) -> list[Result]:
        """Take all passes that rows want, as many rows at once as can be; results in order."""
        results: dict[int, Result] = {}
        loops: dict[type, Callable[[int, list[Pass]], list[Result]]] = {
            Step: self._step,
            Read: self._read,
            Denoise: self._denoise,
        }
        for kind, width, group in self._groups(wanted):
            passes = [wanted[i] for i in group]
            found = loops[kind](width, passes)
            results |= dict(zip(group, found, strict=True))
        return [results[i] for i in range(len(wanted))]

    def _groups(self, wanted: Sequence[Pass]) -> Iterator[tuple[type, int, list[int]]]:
        """Yield the kind, the width and the indices of passes that can be one."""

        def width_of(each: Pass) -> tuple[str, int]:
            size = each.width if isinstance(each, Step) else fixed_width(len(each.tokens))
            return type(each).__name__, size

        order = sorted(range(len(wanted)), key=lambda i: (width_of(wanted[i]), wanted[i].slot))
        for (_, width), group in itertools.groupby(order, lambda i: width_of(wanted[i])):
            indices = list(group)
            kind = type(wanted[indices[0]])
            if kind is not Step and not self.deterministic:
                width = max(len(wanted[i].tokens) for i in indices)
            by_slot = {wanted[i].slot: i for i in indices}
            parts = [list(by_slot)] if self.deterministic else runs(list(by_slot))
            for part in parts:
                yield kind, width, [by_slot[slot] for slot in part]

    def _place(self, slots: Sequence[int]) -> tuple[range, int]:
        """Choose the slots of a pass, and its number of places; the last one is scratch."""
        if self.deterministic:
            return range(self.num_slots), self.length + 1
        rows = range(min(slots), max(slots) + 1)
        used = max(self.used[slot] for slot in rows) + 1
        return rows, min(-(-used // ALIGNED) * ALIGNED, self.length + 1)

    def _view(self, rows: range, places: int) -> tg.Cache:
        part = slice(rows.start, rows.stop)
        return tg.Cache(
            [k[part, :, :places] for k in self.keys],
            [v[part, :, :places] for v in self.values],
            self.tokens[part, :places],
        )

    def _fill(self, shape: Sequence[int], value: int, lists: Mapping[int, Sequence[int]]) -> Tensor:
        """Make a (R, N) int64 tensor of rows of unequal lengths."""
        rows = [[value] * shape[1] for _ in range(shape[0])]
        for i, row in lists.items():
            rows[i][: len(row)] = row
        return torch.tensor(rows, device=self.device)

    def _causal(self, width: int, group: Sequence[Step | Read]) -> Tensor:
        """Read tokens causally: logits (rows of `group`, width, V)."""
        rows, places = self._place([each.slot for each in group])
        at = {each.slot - rows.start: each for each in group}
        shape = (len(rows), width)
        tokens = self._fill(shape, 0, {i: each.tokens for i, each in at.items()})
        ranges = {i: range(each.first, each.first + len(each.tokens)) for i, each in at.items()}
        positions = self._fill(shape, places - 1, ranges)
        logits = self.model.forward_causal(tokens, self._view(rows, places), positions)[0]
        return logits[torch.tensor(list(at), device=self.device)]

    def _step(self, width: int, group: list[Pass]) -> list[Result]:
        steps = self._draft([each for each in group if isinstance(each, Step)])
        logits = self._causal(width, steps)
        column = torch.arange(width, device=self.device)
        first = torch.tensor([[each.first + 1] for each in steps], device=self.device)
        tokens, log_p = self._sample(steps, logits, first + column)
        results = list[Result]()
        lists = zip(steps, tokens.tolist(), log_p.tolist(), logits, strict=True)
        for step, t, p, row in lists:
            n = len(step.tokens)
            draft = step.tokens[1:] if step.draft else ()
            results.append(Choices(t[:n], p[:n], self._top(row[:n], step.top), draft))
        return results

    def _draft(self, steps: Sequence[Step]) -> list[Step]:
        """Let the sequential head draft for rows that want it, those of equal settings at once."""
        if self.head is None:
            return [step._replace(draft=0) for step in steps]
        found, settings = list(steps), dict[tuple[object, ...], list[int]]()
        for i, step in enumerate(steps):
            if step.draft:
                same = step.sampling._replace(seed=0, end=-1), step.draft
                settings.setdefault(same, []).append(i)
        for members in settings.values():
            rows = [steps[i] for i in members]
            known = torch.tensor([[s.before, s.tokens[0]] for s in rows], device=self.device)
            known = torch.where(known == NO_TOKEN, self.model.cfg.vocab_size, known)
            about = torch.tensor([[s.key, s.first + 1] for s in rows], device=self.device)
            sampling, count = rows[0].sampling, rows[0].draft
            places = about[:, 1:] + torch.arange(count, device=self.device)
            keys = tg.split_key(about[:, :1], places)
            noise = draw_noise(keys, self.model.cfg.vocab_size, sampling)
            drafts = draft_by_head(self.head, known, noise, sampling, count)
            for i, draft in zip(members, drafts.tolist(), strict=True):
                found[i] = steps[i]._replace(tokens=[*steps[i].tokens, *draft])
        return found

    def _read(self, width: int, group: list[Pass]) -> list[Result]:
        reads = [each for each in group if isinstance(each, Read)]
        logits = self._causal(width, reads)
        results = list[Result]()
        for read, row in zip(reads, logits, strict=True):
            count = len(read.targets)
            targets = torch.tensor(read.targets, dtype=torch.long, device=self.device)
            chosen = row[:count].gather(-1, targets[:, None])[:, 0] - row[:count].logsumexp(-1)
            top = self._top(row[:count], read.top)
            results.append(Choices(read.targets, chosen.double().tolist(), top))
        return results

    @staticmethod
    def _top(logits: Tensor, count: int) -> list[Top]:
        """List the `count` most probable tokens by logits (n, V)."""
        if not count:
            return []
        # As sample_tokens computes it, so that a greedy choice has the very float of the largest.
        best = logits.topk(min(count, logits.shape[-1]), dim=-1)
        log_p = (best.values - logits.logsumexp(-1, keepdim=True)).double()
        return [Top(*pair) for pair in zip(best.indices.tolist(), log_p.tolist(), strict=True)]

    def _sample(
        self, group: Sequence[Step | Denoise], logits: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Choose tokens (R, n) from logits (R, n, V), each row by its own key and settings."""
        keys = torch.tensor([[each.key] for each in group], device=self.device)
        keys = tg.split_key(keys, positions)
        tokens, log_p = torch.zeros_like(keys), torch.zeros(keys.shape, dtype=torch.double)
        log_p = log_p.to(self.device)
        settings: dict[tuple[object, ...], list[int]] = {}
        for i, each in enumerate(group):
            part = i if self.deterministic else 0  # a row's numbers must not depend on others
            settings.setdefault((part, each.sampling._replace(seed=0, end=-1)), []).append(i)
        for members in settings.values():
            index = torch.tensor(members, device=self.device)
            sampling = group[members[0]].sampling
            tokens[index], log_p[index] = sample_tokens(logits[index], sampling, keys[index])
        return tokens, log_p

    def _denoise(self, width: int, group: list[Pass]) -> list[Result]:
        """Denoise windows of different sizes and places, and unmask confident tokens."""
        windows = [each for each in group if isinstance(each, Denoise)]
        rows, places = self._place([each.slot for each in windows])
        at = {each.slot - rows.start: each for each in windows}
        inputs = self._window_input(rows, places, width, at)
        logits = self.model.forward_denoise(inputs, self._view(rows, places))
        index = torch.tensor(list(at), device=self.device)
        logits = logits[index]  # (rows of `group`, 1, S, V)
        tokens, log_p = self._sample(windows, logits[:, 0], inputs.positions[index, 1:])
        hidden = masked = inputs.noisy.corrupted[index, 0]
        tokens = torch.where(masked, tokens, self._own_tokens(windows, tokens.shape[1]))
        remaining = torch.tensor([[each.remaining] for each in windows], device=self.device)
        threshold = torch.tensor([[each.threshold] for each in windows], device=self.device)
        masked = tg.unmask_confident(masked, log_p, remaining) & (log_p.exp() < threshold)
        if self.head is not None:
            positions = inputs.positions[index, 1:]
            given = tokens, log_p, hidden, masked
            tokens, log_p = self._join(self.head, windows, logits[:, 0], positions, *given)
        soft = self.model.cfg.self_condition == "soft"
        previous = tg.expected_embedding(self.model, logits)[:, 0] if soft else None
        lists = zip(windows, tokens.tolist(), log_p.tolist(), masked.tolist(), strict=True)
        results = list[Result]()
        for i, (each, t, p, still) in enumerate(lists):
            size = len(each.masked)
            own = None if previous is None else previous[i, :size]
            results.append(Unmasked(t[:size], p[:size], still[:size], own))
        return results

    def _join(
        self,
        head: Head,
        windows: Sequence[Denoise],
        logits: Tensor,
        positions: Tensor,
        tokens: Tensor,
        log_p: Tensor,
        hidden: Tensor,
        masked: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Choose the tokens that a pass unmasks left to right, with the head.

        Logits are (R, S, V), all others (R, S): tokens and log-probabilities as chosen without the
        head, what was masked at the start of the pass, what still is. Returns the new first two.
        """
        before = torch.tensor([[each.tokens[0]] for each in windows], device=self.device)
        known = tokens.masked_fill(hidden, self.model.cfg.vocab_size)
        known, decided = torch.cat((before, known), dim=1), hidden & ~masked
        at_once = 1 if self.deterministic else len(windows)  # as in _sample
        parts, log_p = list[Tensor](), log_p.clone()
        for start in range(0, len(windows), at_once):
            part = slice(start, start + at_once)

            def choose(scores: Tensor, i: int, part: slice = part) -> Tensor:
                place = positions[part, i : i + 1]
                found, p = self._sample(windows[part], scores[:, None], place)
                now = decided[part, i : i + 1]
                log_p[part, i : i + 1] = torch.where(now, p, log_p[part, i : i + 1])
                return found[:, 0]

            found = choose_along_chain(head, logits[part], known[part], decided[part], choose)
            parts.append(found[:, 1:])
        return torch.where(decided, torch.cat(parts), tokens), log_p

    def _own_tokens(self, windows: Sequence[Denoise], size: int) -> Tensor:
        lists = {i: each.tokens[1:] for i, each in enumerate(windows)}
        return self._fill((len(windows), size), 0, lists)

    def _window_input(
        self, rows: range, places: int, width: int, at: dict[int, Denoise]
    ) -> tg.WindowInput:
        """Lay out one window of each row, padded to `width` = 1 + S tokens.

        Nothing reads padding, and it is at no consecutive positions, so that it is no token's next
        visible one. `t` is the masked share of the row's own window, as in training.
        """
        shape, size = (len(rows), width), width - 1
        tokens = self._fill(shape, 0, {i: each.tokens for i, each in at.items()})
        lists = {i: list(map(int, each.masked)) for i, each in at.items()}
        masked = self._fill((len(rows), size), 0, lists).bool()
        first = self._fill((len(rows), 1), 0, {i: [each.first] for i, each in at.items()})
        num = self._fill((len(rows), 1), 0, {i: [len(each.masked)] for i, each in at.items()})
        steps = self._fill((len(rows), 1), 0, {i: [each.step] for i, each in at.items()})
        row_keys = self._fill((len(rows), 1), 0, {i: [each.key] for i, each in at.items()})
        column = torch.arange(width, device=self.device)
        own, idle = column <= num, num == 0
        positions = torch.where(own, first + column, 0)
        t = (masked.sum(1, keepdim=True) / num.clamp(min=1)).clamp_min(1e-6)
        keys = tg.split_key(row_keys, first, steps)
        noisy = tg.apply_noise(tokens[:, None, 1:], masked[:, None], t, keys, self.model.cfg)
        place = torch.arange(places, device=self.device)
        last = first + (column.expand(shape) if self.model.cfg.diffusion_causal else num)
        return tg.WindowInput(
            before=tokens[:, None, :1],
            noisy=noisy,
            positions=positions,
            mask=(place <= last[..., None]).expand(*shape, places)[:, None],
            previous=self._previous(shape, at),
            cache_positions=torch.where(own & ~idle, positions, places - 1),
        )

    def _previous(self, shape: Sequence[int], at: dict[int, Denoise]) -> Tensor | None:
        """Join the expected embeddings of the last pass, (R, 1, S, D); zeros change nothing."""
        found = {i: each.previous for i, each in at.items() if each.previous is not None}
        if not found:
            return None
        joined = next(iter(found.values())).new_zeros(
            shape[0], 1, shape[1] - 1, self.model.cfg.model_dim
        )
        for i, each in found.items():
            joined[i, 0, : len(each)] = each
        return joined


@torch.inference_mode()
def check_deterministic(model: tg.GPT, num_slots: int, head: Head | None = None) -> bool:
    """Does a row get the same bits in the first and in the last slot, whatever the others hold?

    It does where the kernels of a matrix product treat all of its rows alike.
    """
    passes = Passes(model, num_slots, deterministic=True, head=head)
    sampling, last = Sampling(), num_slots - 1
    found = list[list[tuple[list[int], list[float]]]]()
    for slot in (0, last):
        tokens = [i * 7 % model.cfg.vocab_size for i in range(min(16, passes.length - 1))]
        wanted: list[Pass] = [Step(slot, tokens[:1], 0, 1, 0, sampling)]
        if model.mask_emb is not None:
            masked = [True] * (len(tokens) - 1)
            wanted.append(Denoise(slot, 0, tokens, masked, 0, 2.0, 0, 0, sampling))
        results = [passes.take([each])[0] for each in wanted]
        found.append([(each.tokens, each.log_p) for each in results])
    return found[0] == found[1]

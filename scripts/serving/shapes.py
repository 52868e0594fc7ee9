"""Shapes of responses: OpenAI's completions and chat, FIM of Mistral and Mercury, llama.cpp."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any

from scripts.sample_page import Cell as PageCell
from scripts.sample_page import join
from scripts.serving.bodies import Llama
from scripts.serving.jobs import Choice, Job, Update, about
from scripts.serving.passes import Top
from scripts.serving.rows import Cell
from scripts.serving.text import CommittedText, Vocabulary

Json = dict[str, Any]
STOP_TYPES = {"eos": "eos", "limit": "limit", "word": "word", "deadline": "limit"}


def present(vocabulary: Vocabulary, cells: Sequence[Cell], passes: int) -> tuple[str, Json]:
    """Spell a span as it is after a pass, masked tokens as they are predicted.

    Returns the text, and of each unit (a token, or the byte tokens of one character) its number of
    code points, whether it is still masked, and its probability.
    """
    units = join(vocabulary.tokenizer, [PageCell(*cell, 0) for cell in cells])
    texts = [
        "\ufffd" if u.masked and u.text.startswith("<0x") and len(u.text) == 6 else u.text
        for u in units
    ]
    facts = {
        "pass": passes,
        "open": [int(unit.masked) for unit in units],
        "p": [round(unit.p, 4) for unit in units],
        "lengths": list(map(len, texts)),
    }
    return "".join(texts), facts


def usage(job: Job) -> Json:
    """Count tokens; those of a prompt count once, whatever n is."""
    prompt = sum(map(len, job.wish.prompts)) - sum(job.wish.hidden) + len(job.wish.suffix)
    prompt += len(job.wish.draft)
    completion = sum(len(choice.row.span) for choice in job.choices)
    reused = sum(choice.rows[0].reused for choice in job.choices)
    counts = {"prompt_tokens": prompt, "completion_tokens": completion}
    details = {"cached_tokens": min(reused, prompt)}
    return {**counts, "total_tokens": prompt + completion, "prompt_tokens_details": details}


def logprobs(job: Job, choice: Choice) -> Json:
    """List the log-probabilities of the causal stream, with those of the prompt if echoed.

    The first token of a prompt has none: null. An end token that was chosen is listed, too.
    """
    row, vocabulary = choice.row, job.model.vocabulary
    tokens, log_p, tops = list(row.span), list[float | None](row.log_p), list(row.tops)
    if row.end is not None:
        tokens.append(row.end[0])
        log_p.append(row.end[1])
        tops += row.end[2]
    alternatives: list[Top | None] = list(tops)
    if job.wish.echo:
        prompt = row.prompt[choice.hidden :]
        tokens = prompt + tokens
        log_p = [None, *row.prompt_log_p[choice.hidden :]][: len(prompt)] + log_p
        first: list[Top | None] = [None, *row.prompt_tops[choice.hidden :]]
        alternatives = first[: len(prompt)] + alternatives
    text = CommittedText(vocabulary, (), opens=job.wish.echo)
    text.push(tokens)
    labels = [vocabulary.label(token) for token in tokens]
    listed: list[Json | None] = [
        None if top is None else named(vocabulary, top, label, p)
        for top, label, p in zip(alternatives, labels, log_p, strict=False)
    ]
    return {
        "tokens": labels,
        "token_logprobs": log_p,
        "top_logprobs": listed if job.wish.top else None,
        "text_offset": text.offsets,
    }


def named(vocabulary: Vocabulary, top: Top, label: str, log_p: float | None) -> Json:
    """Name the most probable tokens; the chosen one is among them, whatever its rank."""
    found: Json = {
        vocabulary.label(token): p for token, p in zip(top.tokens, top.log_p, strict=True)
    }
    return found if log_p is None else {label: log_p, **found, **{label: log_p}}


def timings(choice: Choice) -> Json:
    """Measure a row in milliseconds, as llama.cpp does; `queue_ms` is the wait for a slot."""
    row, times = choice.row, choice.row.times
    prompt_n, predicted_n = len(row.prompt) - row.reused, len(row.span)
    start = times.get("started", times["done"])
    prompt_ms = 1000 * (start - times.get("admitted", start))
    predicted_ms = 1000 * (times["done"] - start)
    facts: Json = {"queue_ms": 1000 * (times.get("admitted", start) - times["queued"])}
    for name, n, ms in (("prompt", prompt_n, prompt_ms), ("predicted", predicted_n, predicted_ms)):
        facts |= {f"{name}_n": n, f"{name}_ms": ms}
        facts[f"{name}_per_token_ms"] = ms / max(n, 1)
        facts[f"{name}_per_second"] = 1000 * n / max(ms, 1e-3)
    return facts


class Shape:
    """OpenAI's text completion; others differ in parts.

    Args:
        job: the request.
    """

    prefix, kind, chunk_kind, ends = "cmpl-", "text_completion", "text_completion", True

    def __init__(self, job: Job) -> None:
        self.job = job
        self.id = self.prefix + secrets.token_hex(12)
        self.created = int(time.time())

    def head(self, kind: str) -> Json:
        name = self.job.model.name
        return {"id": self.id, "object": kind, "created": self.created, "model": name}

    def text(self, choice: Choice) -> str:
        """Return the whole text of a choice, with its prompt if echoed."""
        return self.echoed(choice) + choice.row.text.text

    def echoed(self, choice: Choice) -> str:
        if not self.job.wish.echo:
            return ""
        return self.job.model.vocabulary.decode(choice.row.prompt[choice.hidden :], opens=True)

    def content(self, text: str, choice: Choice) -> Json:
        return {"text": text}

    def delta(self, text: str) -> Json:
        return {"text": text}

    def logprobs(self, choice: Choice) -> Json | None:
        return None if self.job.wish.top is None else logprobs(self.job, choice)

    def whole(self) -> Json:
        """Make the body of a response."""
        choices = [
            {
                "index": choice.index,
                **self.content(self.text(choice), choice),
                "logprobs": self.logprobs(choice),
                "finish_reason": choice.finish_reason,
                "decoding": about(choice),
                "timings": timings(choice),
            }
            for choice in self.job.choices
        ]
        return {**self.head(self.kind), "choices": choices, "usage": usage(self.job)}

    def chunk(self, choice: Choice, part: Json, finish: str | None = None) -> Json:
        inner = {"index": choice.index, **part, "logprobs": None, "finish_reason": finish}
        return {**self.head(self.chunk_kind), "choices": [inner]}

    def opening(self) -> list[Json]:
        """Make the chunks before any text."""
        if not self.job.wish.echo:
            return []
        return [self.chunk(c, self.delta(self.echoed(c))) for c in self.job.choices]

    def update(self, update: Update) -> Json:
        """Make the chunk of committed text, of a pass, or of the end of a choice."""
        choice = update.choice
        if update.done:
            text = self.text(choice) if self.job.wish.body.diffusing else ""
            part = self.chunk(choice, self.delta(text), choice.finish_reason)
            inner = part["choices"][0]
            inner |= {"decoding": about(choice), "timings": timings(choice)}
            inner["logprobs"] = self.logprobs(choice)
            return part
        if not update.cells:
            return self.chunk(choice, self.delta(update.text))
        text, facts = present(self.job.model.vocabulary, update.cells, update.passes)
        return {**self.chunk(choice, self.delta(text)), "diffusion": facts}

    def closing(self) -> list[Json]:
        """Make the chunks after all choices."""
        options = getattr(self.job.wish.body, "stream_options", None)
        if options is None or not options.include_usage:
            return []
        return [{**self.head(self.chunk_kind), "choices": [], "usage": usage(self.job)}]


class Edited(Shape):
    """A revised text."""

    prefix, kind = "edit-", "edit.completion"


class FimShape(Shape):
    """Fill-in-the-middle: Mercury's `text` and Mistral's `message` or `delta` side by side."""

    prefix = "fim-"

    def content(self, text: str, choice: Choice) -> Json:
        return {"text": text, "message": {"role": "assistant", "content": text}}

    def delta(self, text: str) -> Json:
        return {"text": text, "delta": {"content": text}}


class ChatShape(Shape):
    """OpenAI's chat completion."""

    prefix, kind, chunk_kind = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def content(self, text: str, choice: Choice) -> Json:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def delta(self, text: str) -> Json:
        return {"delta": {"content": text}}

    def opening(self) -> list[Json]:
        first = {"delta": {"role": "assistant", "content": ""}}
        return [self.chunk(choice, first) for choice in self.job.choices]


class LlamaShape(Shape):
    """llama.cpp's completion: one choice, no wrapper, and a stream without a last mark."""

    ends = False

    def whole(self) -> Json:
        body, choice = self.job.wish.body, self.job.choices[0]
        row, times = choice.row, timings(choice)
        found: Json = {
            "content": row.text.text,
            "tokens": row.span,
            "stop": True,
            "model": self.job.model.name,
            "tokens_predicted": len(row.span),
            "tokens_evaluated": len(row.prompt) + len(row.suffix),
            "tokens_cached": row.reused,
            "truncated": self.job.wish.truncated,
            "stop_type": STOP_TYPES.get(row.finish, "none"),
            "stopping_word": row.text.stopped.word if row.text.stopped else "",
            "has_new_line": "\n" in row.text.text,
            "timings": times,
            "decoding": about(choice),
            "generation_settings": {"n_ctx": self.job.model.length, "n_predict": row.num},
        }
        if self.job.wish.top:
            found["completion_probabilities"] = self.probabilities(choice)
        assert isinstance(body, Llama)
        return found if body.response_fields is None else pick(found, body.response_fields)

    def probabilities(self, choice: Choice) -> list[Json]:
        row, label = choice.row, self.job.model.vocabulary.label
        pairs = zip(row.span, row.log_p, row.tops, strict=False)
        return [
            {
                "id": token,
                "token": label(token),
                "logprob": log_p,
                "top_logprobs": [
                    {"id": i, "token": label(i), "logprob": p}
                    for i, p in zip(top.tokens, top.log_p, strict=True)
                ],
            }
            for token, log_p, top in pairs
        ]

    def opening(self) -> list[Json]:
        return []

    def update(self, update: Update) -> Json:
        if update.done:
            whole = self.whole()
            if not self.job.wish.body.diffusing and "content" in whole:
                whole["content"] = ""  # it has been sent
            return whole
        if not update.cells:
            return {"content": update.text, "stop": False}
        text, facts = present(self.job.model.vocabulary, update.cells, update.passes)
        return {"content": text, "stop": False, "diffusion": facts}

    def closing(self) -> list[Json]:
        return []


def pick(found: Json, names: Sequence[str]) -> Json:
    """Keep named fields; `a/b` is field b of a, under its full name. Unknown ones are left out."""
    kept: Json = {}
    for name in names:
        value: Any = found
        for part in name.split("/"):
            value = value.get(part) if isinstance(value, dict) else None
        if value is not None:
            kept[name] = value
    return kept

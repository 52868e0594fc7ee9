"""scripts/serving: rows get the tokens that scripts/decoding.py gives them, whatever others do."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import train_gpt as tg
from scripts import chain, common, decoding
from scripts.decoding import MODES, Decoding, Sampling
from scripts.serving.api import Service
from scripts.serving.engine import Draining, QueueFull
from scripts.serving.rows import Event, Row
from tests.conftest import BOS, CPU, VOCAB, random_rows
from tests.serving.conftest import LENGTH, decode, export, make, make_row

NewRow = Callable[..., Row]
SAMPLED = Sampling(temperature=0.8, top_k=50, top_p=0.95, seed=7)


def prompt_of(count: int, seed: int = 0) -> list[int]:
    return [BOS, *random_rows(1, count - 1, VOCAB, seed)[0].tolist()]


def reference(service: Service, row: Row, setting: Decoding) -> list[int]:
    """What `decode` gives rows of a batch, of which this is the one with the same key."""
    tokens = [*row.prompt, *[0] * row.num, *row.suffix]
    ids = torch.tensor([tokens] * (row.index + 1))
    out = decoding.decode(service.engine.model, ids, row.start, row.start + row.num, setting)
    found: list[int] = out.ids[row.index, row.start : row.start + row.num].tolist()
    end = setting.sampling.end
    return found[: found.index(end)] if end in found else found


def different_rows(service: Service, setting: Decoding, has_suffix: bool) -> list[Row]:
    """Rows that differ in start, length, suffix and key; every second has no suffix."""
    rows = list[Row]()
    for i, (start, num) in enumerate([(1, 24), (17, 9), (40, 17), (33, 1)]):
        suffix = prompt_of(5 + i)[1:] if has_suffix and i % 2 else []
        prompt = prompt_of(start, i)
        rows.append(make_row(service, prompt, num, setting, suffix=suffix, index=i % 3))
    return rows


@pytest.mark.slow
@pytest.mark.parametrize("sampling", [decoding.GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("mode", ["ar", "speculative", "refine", "block", "threshold"])
def test_rows_of_one_batch_get_what_decode_gives_each(
    service: Service, mode: str, sampling: Sampling
) -> None:
    setting = MODES[mode]._replace(sampling=sampling)
    if mode == "speculative":
        setting = setting._replace(window=0)  # a row drafts by lookup only
    rows = decode(service, different_rows(service, setting, mode not in ("ar", "speculative")))
    for row in rows:
        assert row.span == reference(service, row, setting)


MODELS: dict[str, dict[str, Any]] = {
    "causal windows": {"recipe": "retrograde"},
    "uniform noise": {"diffusion_corruption_mode": "uniform", "time_embed_dim": 4},
    "gaussian noise": {"diffusion_corruption_mode": "gaussian"},
    "self-conditioning": {"self_condition": "soft", "mercury_self_condition_prob": 0.5},
    "bigrams": {"bigram_vocab_size": 64, "value_residual": True},
    "no shift": {"recipe": "mdlm_30_70"},
}


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_rows_of_any_model_get_what_decode_gives_each(
    data: dict[str, Any], tmp_path: Path, model: str
) -> None:
    """Padding, idle slots and neighbours reach no input of any model."""
    service = make(export(data, tmp_path / "tiny.ptz", **MODELS[model]), "--slots", "6")
    for mode in ("ar", "refine", "block"):
        setting = MODES[mode]._replace(steps=3)
        for row in decode(service, different_rows(service, setting, mode != "ar")):
            assert row.span == reference(service, row, setting)


@pytest.fixture
def head(artifact: Path, tmp_path: Path) -> Path:
    """A head of random weights for the artifact."""
    model, path = tg.load_artifact(artifact, CPU)[0], tmp_path / "head.ptz"
    found = chain.Head(model, 2)
    for p in found.parameters():
        torch.nn.init.normal_(p)
    about = {"artifact_sha256": common.sha256_of(artifact), "width": 2}
    chain.save_head(path, found, about)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("sampling", [decoding.GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("deterministic", [False, True])
def test_rows_get_what_decode_gives_each_with_a_head(
    artifact: Path, head: Path, sampling: Sampling, deterministic: bool
) -> None:
    options = ["--deterministic"] if deterministic else []
    service = make(artifact, "--slots", "4", "--head", str(head), *options)
    loaded = chain.load_head(head, service.engine.model, artifact)
    for mode in ("refine", "block", "threshold"):
        setting = MODES[mode]._replace(sampling=sampling, steps=2)
        rows = decode(service, different_rows(service, setting, has_suffix=True))
        found = [row.span for row in rows]
        assert found == [reference(service, r, setting._replace(head=loaded)) for r in rows]
        assert found != [reference(service, r, setting) for r in rows]


@pytest.mark.slow
@pytest.mark.parametrize("sampling", [decoding.GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_drafts_of_a_head_change_passes_and_no_token(
    artifact: Path, head: Path, sampling: Sampling, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = make(artifact, "--slots", "4", "--head", str(head))
    plain = MODES["speculative"]._replace(sampling=sampling, lookup_ngram=50)  # which finds nothing
    rows = decode(service, different_rows(service, plain, has_suffix=False))
    expected = [reference(service, row, MODES["ar"]._replace(sampling=sampling)) for row in rows]
    assert [row.span for row in rows] == expected

    keys, draw = list[int](), decoding.draw_noise

    def draw_noise(of: Any, *rest: Any) -> Any:
        keys[:] = of[:, 0].tolist()  # of the first token to draft
        return draw(of, *rest)

    def draft(head: Any, known: Any, noise: Any, chosen: Sampling, count: int) -> Any:
        """What a head that knew the text would draft."""
        assert (chosen, noise is None) == (sampling, sampling == decoding.GREEDY)
        texts = [[VOCAB, *row.prompt, *span] for row, span in zip(rows, expected, strict=True)]
        own = [
            next(
                text[place + 1 :]
                for text, row in zip(texts, rows, strict=True)
                for place in range(1, len(text))
                if int(tg.split_key(torch.tensor(row.key), place)) == key
                and text[place - 1 : place + 1] == pair
            )
            for key, pair in zip(keys, known.tolist(), strict=True)
        ]
        return torch.tensor([(text + [0] * count)[:count] for text in own])

    monkeypatch.setattr("scripts.serving.passes.draw_noise", draw_noise)
    monkeypatch.setattr("scripts.serving.passes.draft_by_head", draft)
    known = decode(service, different_rows(service, plain, has_suffix=False))
    assert [row.span for row in known] == expected
    for row in known:
        assert row.passes <= -(-len(row.span) // 5) + 1  # five tokens a pass
    without = decode(service, different_rows(service, MODES["ar"], has_suffix=False))
    assert all(row.passes >= len(row.span) for row in without)


def test_a_head_of_another_artifact_is_refused(head: Path, causal_artifact: Path) -> None:
    with pytest.raises(tg.UserError, match="belongs to another artifact"):
        make(causal_artifact, "--head", str(head))


def test_edit_gives_what_edit_of_decoding_gives(service: Service) -> None:
    setting = MODES["draft_refine"]._replace(mode="edit", remask_threshold=0.005)
    draft = prompt_of(30, 5)[1:]
    row = make_row(service, [BOS], len(draft), setting, draft=draft)
    decode(service, [row])
    ids = torch.tensor([[BOS, *draft]])
    found = decoding.edit(service.engine.model, ids, 1, 1 + len(draft), setting).ids[0, 1:].tolist()
    assert row.span == found
    assert 0 < row.remasked < len(draft)
    changed = sum(old != new for old, new in zip(draft, row.span, strict=True))
    assert 0 < changed <= row.remasked


def test_more_rows_than_slots_are_all_decoded(service: Service) -> None:
    setting = MODES["ar"]
    rows = [make_row(service, prompt_of(5 + i, i), 6, setting) for i in range(11)]
    decode(service, rows)
    for row in rows:
        assert row.span == reference(service, row, setting)
    assert all(slot.row is None for slot in service.engine.slots)


@pytest.mark.parametrize("score", [False, True])
def test_keys_of_an_equal_prefix_are_reused(service: Service, score: bool) -> None:
    prompt = prompt_of(80, 31)
    first, *more = (make_row(service, prompt[:n], 5, MODES["ar"]) for n in (70, 80, 60))
    decode(service, [first])
    decode(service, more)
    again = make_row(service, prompt[:70], 5, MODES["ar"], top=1, score_prompt=score)
    decode(service, [again])
    assert [row.reused for row in more] == [69, 59]
    assert again.reused == (0 if score else 69)
    assert again.span == first.span == reference(service, first, MODES["ar"])


def test_reused_keys_are_those_of_this_prompt(service: Service) -> None:
    """The slot of an earlier row is used again by another one in between."""
    one, other = prompt_of(50, 41), prompt_of(50, 42)
    mixed = one[:40] + other[40:]
    for prompt in (one, other, mixed, one):
        row = decode(service, [make_row(service, prompt, 6, MODES["block"])])[0]
        assert row.span == reference(service, row, MODES["block"])


def mixed_rows(service: Service, count: int) -> list[Row]:
    """Rows of all modes, lengths and settings."""
    draw, rows = random.Random(3), list[Row]()
    shared = prompt_of(40, 77)
    for i in range(count):
        mode = draw.choice(["ar", "speculative", "refine", "block", "threshold", "edit"])
        prompt = (
            shared[: draw.randint(20, 40)]
            if draw.random() < 0.4
            else prompt_of(draw.randint(1, 40), i)
        )
        sampling = draw.choice([decoding.GREEDY, SAMPLED._replace(seed=i)])
        setting = MODES["refine" if mode == "edit" else mode]._replace(mode=mode, sampling=sampling)
        num, options = draw.randint(1, 24), dict[str, Any]()
        if mode == "edit":
            options["draft"] = prompt_of(num + 1, 1000 + i)[1:]
            setting = setting._replace(remask_threshold=0.004)
        elif mode not in ("ar", "speculative"):
            options["suffix"] = prompt_of(draw.randint(1, 20), 500 + i)[1:]
            options["guard"] = draw.random() < 0.5
        rows.append(make_row(service, prompt, num, setting, top=2, **options))
    return rows


@pytest.mark.slow
def test_deterministic_rows_have_the_bits_of_their_solo_runs(artifact: Path) -> None:
    service = make(artifact, "--slots", "6", "--deterministic")
    together = decode(service, mixed_rows(service, 50))
    alone = make(artifact, "--slots", "6", "--deterministic")
    for row, solo in zip(together, mixed_rows(alone, 50), strict=True):
        for slot in alone.engine.slots:
            slot.tokens = slot.tokens[:0]
        decode(alone, [solo])
        assert row.span == solo.span
        assert row.log_p == solo.log_p  # floats, to the bit
        assert row.tops == solo.tops
        assert row.suffix_nats == solo.suffix_nats
    assert len({tuple(row.span) for row in together}) > 25
    assert any(row.reused for row in together)


def test_a_deadline_takes_as_many_passes_as_fit(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = MODES["refine"]._replace(steps=24)

    class Pace:
        def pass_seconds(self, width: int) -> float:
            return 0.5

    now, passes = time.monotonic(), dict[float, int]()
    # Time stands still for rows: a busy machine must not change what fits.
    monkeypatch.setattr("scripts.serving.rows.time", SimpleNamespace(monotonic=lambda: now))
    for seconds in (0.1, 4.2, 1e6):
        row = make_row(service, prompt_of(9), 24, setting, deadline=now + seconds)
        service.engine.submit([row])
        row.pace = Pace()
        with torch.inference_mode():
            while not service.engine.idle:
                service.engine.tick()
        passes[seconds] = row.passes
        assert len(row.span) == 24
    assert passes[0.1] == 1  # there is always one
    # 8 passes of half a second fit 4.2 s, one of which is left for the end. None takes any time
    # here, so there is time for one more with each.
    assert 7 <= passes[4.2] < 24
    assert passes[1e6] == 24


def test_a_deadline_ends_a_continuation(service: Service) -> None:
    row = make_row(service, prompt_of(9), 40, MODES["ar"], deadline=time.monotonic())
    decode(service, [row])
    assert (row.finish, len(row.span)) == ("deadline", 1)


def bad_judge(monkeypatch: pytest.MonkeyPatch, verdicts: list[bool]) -> None:
    """Judge spans in turn by a list."""
    monkeypatch.setattr("scripts.serving.rows.is_poor", lambda row: verdicts.pop(0))


def test_a_poor_continuation_is_redone_by_ar(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = list[Event]()
    bad_judge(monkeypatch, [True, False])
    poor = make_row(service, prompt_of(9), 16, MODES["block"], guard=True, notify=told.append)
    good = make_row(service, prompt_of(9, 2), 16, MODES["block"], guard=True)
    decode(service, [poor])
    decode(service, [good])
    assert (poor.fell_back, good.fell_back) == ("ar", "")
    assert poor.span == reference(service, poor, MODES["ar"])
    assert good.span == reference(service, good, MODES["block"])
    # What was poor has not been sent.
    assert "".join(event.text for event in told) == poor.text.text
    assert poor.passes > 16


def test_a_poor_infill_is_redone_with_more_passes(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting, suffix = MODES["refine"]._replace(steps=2), prompt_of(9, 3)[1:]
    bad_judge(monkeypatch, [True, True, False])
    row = make_row(service, prompt_of(9), 16, setting, guard=True, suffix=suffix)
    decode(service, [row])
    assert (row.fell_back, row.poor, row.passes) == ("passes", True, 2 + 16)
    assert row.span == reference(service, row, setting._replace(steps=16))


def test_repeated_tokens_are_judged_poor(service: Service) -> None:
    from scripts.serving.rows import is_poor

    row = make_row(service, prompt_of(9), 16, MODES["block"])
    row.span, row.log_p = [7] * 16, [-0.01] * 16
    assert is_poor(row)
    row.span = list(range(10, 26))
    assert not is_poor(row)


def test_a_full_queue_and_a_draining_server_refuse_all_rows(artifact: Path) -> None:
    engine = make(artifact, "--slots", "2", "--queue", "3").engine
    service = make(artifact, "--slots", "2", "--queue", "3")
    rows = [make_row(service, [BOS], 4, MODES["ar"]) for _ in range(6)]
    with pytest.raises(QueueFull) as caught:
        engine.submit(rows)
    assert (len(engine.waiting), caught.value.retry_after) == (0, 1)
    engine.submit(rows[:5])  # two free slots, and three that wait
    with pytest.raises(QueueFull):
        engine.submit(rows[5:])
    engine.draining = True
    with pytest.raises(Draining):
        engine.submit([])


def test_a_cancelled_row_frees_its_slot_at_the_next_tick(service: Service) -> None:
    told = list[Event]()
    rows = [
        make_row(service, prompt_of(9, i), 60, MODES["ar"], notify=told.append) for i in range(6)
    ]
    engine = service.engine
    engine.submit(rows)
    with torch.inference_mode():
        for _ in range(4):
            engine.tick()
        assert (len(engine.active()), len(engine.waiting)) == (4, 2)
        engine.cancel(rows)
        engine.tick()
    assert engine.idle
    assert [event.kind for event in told if event.kind == "done"] == []


def test_a_row_that_takes_too_long_is_given_up(service: Service) -> None:
    row = make_row(service, prompt_of(9), 60, MODES["ar"])
    service.engine.submit([row])
    with torch.inference_mode():
        service.engine.tick()
        row.expires = time.monotonic()
        time.sleep(0.001)
        service.engine.tick()
    assert service.engine.idle
    assert "took longer than" in str(row.error)


def test_a_failing_pass_fails_its_rows_and_no_others(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, told = service.engine, list[Event]()
    take = engine.passes.take

    def fail(wanted: Any) -> Any:
        if any(getattr(each, "masked", None) for each in wanted):
            raise RuntimeError("out of memory")
        return take(wanted)

    rows = [
        make_row(service, prompt_of(9), 4, MODES[mode], notify=told.append)
        for mode in ("refine", "ar")
    ]
    with monkeypatch.context() as patch:
        patch.setattr(engine.passes, "take", fail)
        engine.submit(rows)
        with torch.inference_mode():
            while not engine.idle:
                engine.tick()
    assert str(rows[0].error) == "out of memory"
    assert [event.kind for event in told].count("done") == 2
    after = decode(service, [make_row(service, prompt_of(9), 4, MODES["ar"])])[0]
    assert after.span == reference(service, after, MODES["ar"])


def test_rows_longer_than_the_context_are_the_callers_error(service: Service) -> None:
    """The last token of a continuation is not read, so it may lie one place further."""
    row = make_row(service, prompt_of(LENGTH), 1, MODES["ar"])
    decode(service, [row])
    assert len(row.span) == 1

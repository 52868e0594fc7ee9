"""scripts/serving/jobs.py: what a request keeps for its client, and how long it may take."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
import torch

from scripts.serving import bodies
from scripts.serving.api import Service
from scripts.serving.jobs import Job, Update, Wish
from scripts.serving.rows import Row
from tests.conftest import BOS, VOCAB, random_rows
from tests.serving.conftest import Running, running

PROMPT = [BOS, *random_rows(1, 8, VOCAB, 3)[0].tolist()]
SUFFIX = random_rows(1, 5, VOCAB, 4)[0].tolist()


def job_of(service: Service, num: int, began: float | None = None, **fields: Any) -> Job:
    """Make a request; it needs a running event loop."""
    wish = Wish(bodies.Completion(prompt="", **fields), [PROMPT], [1], [], num)
    if fields.get("mode") == "refine":
        wish = wish._replace(suffix=SUFFIX)
    return Job(wish, service.model, service.engine, service.options, began)


def decode_all(service: Service) -> None:
    """Decode what is queued, in this thread, while no client reads."""
    with torch.inference_mode():
        while not service.engine.idle:
            service.engine.tick()


async def settle() -> None:
    """Let calls that another thread requested be made."""
    await asyncio.sleep(0)
    await asyncio.sleep(0)


async def gather(job: Job) -> list[Update]:
    return [update async for update in job.updates()]


def test_only_the_newest_frame_waits_for_a_client_that_reads_slowly(service: Service) -> None:
    async def watch() -> None:
        fields = dict(mode="refine", steps=20, hole=20, guard=False, diffusing=True)
        job = job_of(service, 20, **fields)
        job.submit()
        decode_all(service)
        await settle()
        assert job.events.qsize() <= 3  # a frame, the text, and the end
        found = await gather(job)
        frames = [update for update in found if update.cells]
        assert [update.passes for update in frames] == [20]
        assert [cell.token for cell in frames[0].cells] == job.choices[0].row.span
        assert found[-1].done

    asyncio.run(watch())


def test_a_client_that_keeps_up_gets_every_frame(service: Service) -> None:
    async def watch() -> list[int]:
        fields = dict(mode="refine", steps=5, hole=16, guard=False, diffusing=True)
        job, passes = job_of(service, 16, **fields), list[int]()
        job.submit()
        reading = asyncio.ensure_future(gather(job))
        with torch.inference_mode():
            while not service.engine.idle:
                service.engine.tick()
                await settle()
        for update in await reading:
            passes += [update.passes] * bool(update.cells)
        return passes

    assert asyncio.run(watch()) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("diffusing", [False, True])
def test_no_text_is_lost_for_a_client_that_reads_slowly(service: Service, diffusing: bool) -> None:
    async def watch() -> None:
        job = job_of(service, 30, mode="ar", diffusing=diffusing)
        job.submit()
        decode_all(service)
        await settle()
        found = await gather(job)
        row = job.choices[0].row
        assert "".join(update.text for update in found) == row.text.text
        assert sum(bool(update.text) for update in found) > 5
        assert sum(bool(update.cells) for update in found) == int(diffusing)

    asyncio.run(watch())


async def poor_job(service: Service, monkeypatch: pytest.MonkeyPatch, began: float) -> Job:
    """Decode a request up to the choice of its length; all first tries are poor."""
    monkeypatch.setattr("scripts.serving.rows.is_poor", lambda row: not row.fell_back)
    job = job_of(service, 16, began, mode="refine", steps=2)
    job.submit()
    decode_all(service)
    await settle()
    return job


def second_try(job: Job) -> Row:
    (row,) = [row for row in job.of_row if row not in job.choices[0].rows]
    return row


def test_a_second_try_has_the_limit_and_the_deadline_of_its_request(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def watch() -> None:
        began = time.monotonic() - 50
        job = await poor_job(service, monkeypatch, began)
        reading = asyncio.ensure_future(gather(job))
        await settle()
        again = second_try(job)
        assert again.fell_back == "passes"
        limit = service.engine.limits.max_seconds
        assert {row.expires for row in job.of_row} == {began + limit}
        assert len({row.deadline for row in job.of_row}) == 1
        decode_all(service)
        await reading
        assert job.choices[0].row is again

    asyncio.run(watch())


def test_a_second_try_that_takes_too_long_leaves_the_first(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def watch() -> None:
        job = await poor_job(service, monkeypatch, time.monotonic())
        reading = asyncio.ensure_future(gather(job))
        await settle()
        again = second_try(job)
        again.expires = time.monotonic() - 1
        decode_all(service)
        await reading
        row = job.choices[0].row
        assert row in job.choices[0].rows
        assert (row.fell_back, row.poor) == ("", True)
        assert row.times["done"] == again.times["done"]

    asyncio.run(watch())


def test_a_row_that_takes_too_long_fails_its_request(service: Service) -> None:
    async def watch() -> None:
        limit = service.engine.limits.max_seconds
        job = job_of(service, 30, time.monotonic() - limit - 1, mode="ar")
        job.submit()
        decode_all(service)
        with pytest.raises(Exception, match="took longer than"):
            await gather(job)

    asyncio.run(watch())


def test_time_counts_from_the_arrival_of_a_request(
    artifact: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a request waits for before it is queued counts, too."""
    with running(artifact, "--slots", "1") as server:
        assert spent(server, monkeypatch, 0.3) >= 0.3


def spent(server: Running, monkeypatch: pytest.MonkeyPatch, seconds: float) -> float:
    """Send a request whose text takes a while to encode; seconds counted when it is queued."""
    engine, found = server.service.engine, list[float]()
    submit, encode = engine.submit, server.service.encode

    def slowly(*args: Any) -> list[int]:
        time.sleep(seconds)
        return encode(*args)

    def record(rows: Any) -> None:
        limit = engine.limits.max_seconds
        found.extend(time.monotonic() - (row.expires - limit) for row in rows)
        submit(rows)

    monkeypatch.setattr(server.service, "encode", slowly)
    monkeypatch.setattr(engine, "submit", record)
    assert server.post("/v1/completions", prompt="x", max_tokens=2).status_code == 200
    return min(found)

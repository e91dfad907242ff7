"""A run of any length: a first answer within a second, a bounded message, bounded memory, and no extreme lost."""

import asyncio
import json
import math
import random
import threading
import time
import tracemalloc
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from tests.guide.conftest import serving, within_a_second
from tests.guide.story import Story

from microbatch.guide import live, metrics_file, thinning
from microbatch.guide.live import WatchedRun, follow_runs, open_runs
from microbatch.guide.metrics_file import MetricsFile
from microbatch.guide.server import Guide
from microbatch.guide.thinning import Curve

MOST_POINTS = 2000
"""Points of one curve in one message."""

MOST_BYTES = 600_000
"""Of the first message, with every curve and every kind of detail."""


def write(run: Path, lines: Iterable[dict[str, Any]], *, how: str = "w") -> None:
    run.mkdir(exist_ok=True)
    with (run / "metrics.jsonl").open(how, encoding="utf-8") as file:
        file.writelines(json.dumps(each) + "\n" for each in lines)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small pieces and no waiting, so that a short file is as a long one."""
    monkeypatch.setattr(live, "EVERY", 0.01)
    monkeypatch.setattr(live, "SKETCHED", 1 << 16)
    monkeypatch.setattr(metrics_file, "PIECE", 1 << 14)


# -- what is kept -----------------------------------------------------------------------------------------------------


def extremes(values: list[float], width: int) -> list[tuple[float, float]]:
    stretches = [values[begin : begin + width] for begin in range(0, len(values), width)]
    return [(min(each), max(each)) for each in stretches]


@pytest.mark.parametrize(("steps", "width"), [(1, 1), (512, 1), (513, 2), (1500, 4), (20_000, 64)])
def test_the_extremes_of_every_stretch_are_kept_and_no_more(steps: int, width: int) -> None:
    drawn = random.Random(steps)  # noqa: S311 -- no secret
    values = [drawn.gauss(0, 1) for _ in range(steps)]
    curve = Curve()
    for index, value in enumerate(values):
        curve.add(index + 1, index + 1, value)
    kept = sorted(curve.points())
    assert len(kept) <= 2 * math.ceil(steps / width) <= 1024
    assert all(values[step - 1] == value for _, step, value in kept)
    stretches: dict[int, list[float]] = {}
    for _, step, value in kept:
        stretches.setdefault((step - 1) // width, []).append(value)
    assert [(min(each), max(each)) for each in stretches.values()] == extremes(values, width)
    # The usual way, every so many steps, loses them.
    if width > 1:
        assert [(value, value) for value in values[::width]] != extremes(values, width)


def test_every_value_that_is_measured_now_and_then_is_drawn(tmp_path: Path, small: None) -> None:
    run = tmp_path / "run"
    spikes = {777: 50.0, 4321: -50.0, 4322: 60.0}
    lines: list[dict[str, Any]] = [{"step": step, "loss": spikes.get(step, 1.0)} for step in range(1, 6001)]
    lines[41] |= {"validation": {"loss": 3.5}, "noise_scale": 8.0, "retries": 2, "microbatch_size": 4, "applied": False}
    write(run, lines)

    async def follow() -> Story:
        return await Story().until(WatchedRun(run).follow(), lambda story: story.whole)

    story = asyncio.run(follow())
    assert {line["step"]: line["loss"] for line in story.lines if abs(line.get("loss", 0)) > 10} == spikes
    (told,) = [line for line in story.lines if line["step"] == 42]
    assert told["validation"] == {"loss": 3.5}
    assert (told["noise_scale"], told["retries"], told["applied"]) == (8.0, 2, False)
    assert story.lines[-1] == {"id": 6000, **lines[-1]}


# -- how it is told ---------------------------------------------------------------------------------------------------


def long_line(step: int) -> dict[str, Any]:
    """Write everything that a line can hold."""
    timeline = {"wait": 0.1, "forward": [0.1] * 8, "backward": [0.2] * 8, "finish": 0.1, "optimizer": 0.1}
    drawn = random.Random(step)  # noqa: S311 -- no secret
    curves = {name: drawn.random() for name in ("loss", "lr", "grad_norm", "per_second", "noise_scale")}
    memory = {"parameters": 1, "gradients": 2, "activations": 3}
    others = {"retries": 1, "microbatch_size": 1 + step % 2, "timeline": timeline, "memory": memory}
    return {"step": step, **curves, "validation": {"loss": drawn.random()}, **others}


def test_a_message_is_bounded_and_a_sample_comes_first(tmp_path: Path, small: None) -> None:
    run, steps = tmp_path / "run", 6000
    write(run, map(long_line, range(1, steps + 1)))

    async def follow() -> list[list[dict[str, Any]]]:
        messages: list[list[dict[str, Any]]] = []
        story = Story()
        async for events in WatchedRun(run).follow():
            story.take(events)
            messages.append(events)
            if story.whole:
                break
        assert story.totals["retries"] == steps
        assert story.resets == 2
        return messages

    first, *progress, last = asyncio.run(follow())
    for message in (first, last):
        assert len(json.dumps(message)) <= MOST_BYTES
        for name in ("loss", "lr", "grad_norm", "per_second", "noise_scale", "validation"):
            assert 300 <= sum(name in line for line in message) <= MOST_POINTS
    # The sample shows the whole run, to its last step; then the share that was read grows.
    shown = [event["step"] for event in first if "kind" not in event]
    assert (shown[0], shown[-1]) == (1, steps)
    shares = [event["percent"] for message in [first, *progress, last] for event in message if "percent" in event]
    assert shares == sorted(set(shares))
    assert (shares[0] < 10, shares[-1]) == (True, 100)


def test_a_long_file_without_a_line_says_how_far_it_was_read(tmp_path: Path, small: None) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_bytes(b"\xff" * (1 << 20) + b"\n")

    async def follow() -> None:
        source, story = WatchedRun(run).follow(), Story()
        await story.until(source, lambda story: story.totals.get("percent", 0) > 50)
        assert not story.whole
        await story.until(source, lambda story: story.whole)
        assert (story.lines, story.totals["unreadable"]) == ([], 1)

    asyncio.run(follow())


def test_a_page_that_stays_open_is_sent_a_thinned_run_now_and_then(
    tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "MOST_FRESH", 50)
    monkeypatch.setattr(thinning, "MOST_BUCKETS", 16)
    run, most = tmp_path / "run", 0
    write(run, [])

    async def follow() -> Story:
        nonlocal most
        source, story = WatchedRun(run).follow(), Story()
        await story.until(source, lambda story: story.whole)
        for begin in range(1, 1001, 20):
            write(run, ({"step": step, "loss": float(step)} for step in range(begin, begin + 20)), how="a")
            await story.until(source, lambda story: bool(story.lines) and story.steps[-1] == begin + 19)  # noqa: B023
            most = max(most, len(story.lines))
        return story

    story = asyncio.run(follow())
    assert 10 <= story.resets <= 25
    assert most <= 2 * 16 + 50 + 20


def test_memory_does_not_grow_with_the_file(tmp_path: Path, small: None) -> None:
    peaks: list[int] = []
    for steps in (2000, 5000):
        run = tmp_path / str(steps)
        write(run, map(long_line, range(1, steps + 1)))

        async def follow(run: Path = run) -> None:
            await Story().until(WatchedRun(run).follow(), lambda story: story.whole)

        tracemalloc.start()
        asyncio.run(follow())
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.25 * peaks[0]
    assert peaks[0] < 20e6


def test_no_run_waits_for_another_ones_disk(tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """One file is not answered for until the other run's line has been told."""
    slow, fast = tmp_path / "slow", tmp_path / "fast"
    write(slow, [{"step": 1}])
    write(fast, [{"step": 1}])
    answers, read = threading.Event(), MetricsFile.read

    def wait(self: MetricsFile) -> Any:
        if self.path.parent == slow:
            assert answers.wait(30)
        return read(self)

    monkeypatch.setattr(MetricsFile, "read", wait)

    async def follow() -> list[int]:
        found: list[int] = []
        async with asyncio.timeout(60):
            async for (message,) in follow_runs(open_runs([slow, fast])):
                found.append(message["run"])
                if 1 in found:
                    answers.set()
                if 0 in found:
                    return found
        return found

    try:
        assert asyncio.run(follow()) == [1, 0]
    finally:
        answers.set()


def test_a_run_that_fails_as_nobody_foresaw_says_so_alone(
    tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken, right = tmp_path / "broken", tmp_path / "right"
    for run in (broken, right):
        write(run, [{"step": 1}])
    read = MetricsFile.read

    def fail(self: MetricsFile) -> Any:
        if self.path.parent == broken:
            raise ZeroDivisionError("a fault of ours")
        return read(self)

    monkeypatch.setattr(MetricsFile, "read", fail)

    async def follow() -> list[Story]:
        stories = [Story(), Story()]
        async with asyncio.timeout(60):
            async for (message,) in follow_runs(open_runs([broken, right])):
                stories[message["run"]].take(message["events"])
                if stories[0].standing and stories[1].whole:
                    break
        return stories

    first, second = asyncio.run(follow())
    assert first.standing["trouble"] == "the run cannot be followed: a fault of ours"
    assert second.steps == [1]


def test_a_long_run_answers_within_a_second(tmp_path: Path) -> None:
    """400,000 lines take many seconds to read; the page, the list of runs and the first picture do not wait for it.

    Seconds of this process, server included: what other jobs take of the machine is not the server's.
    """
    run = tmp_path / "long"
    run.mkdir()
    steps = 400_000
    with (run / "metrics.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(f'{{"step": {step}, "loss": 0.5, "lr": 0.1, "retries": 0}}\n' for step in range(1, steps + 1))

    def answer() -> float:
        for client in serving(Guide(open_runs([run]))):
            began = time.process_time()
            assert client.get("/run")[0] == 200
            assert client.get("/api/live")[1]["runs"][0]["name"] == "long"
            with closing(client.messages("/api/live/events")) as messages:
                _, (message,) = next(messages)
            took = time.process_time() - began
            lines = [event for event in message["events"] if "kind" not in event]
            assert lines[-1]["step"] == steps
            assert len(lines) <= MOST_POINTS
            return took
        return math.inf

    assert within_a_second(answer)

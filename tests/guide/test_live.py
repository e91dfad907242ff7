"""The live view, from files alone: runs that grow, that were cut, that are torn; and a real training, looked at."""

import asyncio
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from tests.guide.browser import launched, opened, until, violations
from tests.guide.conftest import serving
from tests.guide.story import TOTALS, Story
from typer.testing import CliRunner

from microbatch.cli.main import app
from microbatch.errors import ConfigError
from microbatch.guide import live
from microbatch.guide.live import WatchedRun, open_runs
from microbatch.guide.metrics_lines import read_line
from microbatch.guide.server import Guide

JOB = Path(__file__).parents[1] / "train" / "small_job.py"


def line(step: int, **more: Any) -> str:
    return json.dumps({"step": step, "loss": 1 / step, **more}) + "\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(live, "EVERY", 0.01)
    (tmp_path / "config.toml").write_text('job = "language"\nsteps = 9\n', encoding="utf-8")
    return tmp_path


def test_lines_come_as_they_are_written_whole_and_once(folder: Path) -> None:
    async def follow() -> None:
        metrics, run = folder / "metrics.jsonl", WatchedRun(folder)
        source, story = run.follow(), Story()
        await story.until(source, lambda story: story.whole)
        metrics.write_text(line(1) + line(2) + line(3)[:7], encoding="utf-8")
        await story.until(source, lambda story: story.steps == [1, 2])
        with metrics.open("a", encoding="utf-8") as file:
            file.write(line(3)[7:] + "not json\n" + line(4))
        await story.until(source, lambda story: story.steps == [1, 2, 3, 4])
        assert [each["id"] for each in story.lines] == [1, 2, 3, 5]
        assert story.totals == {**TOTALS, "percent": 100, "unreadable": 1, "first_unreadable": 4}
        assert story.resets == 1
        # Another viewer, or one that lost the stream, is told the same in one message.
        other = await Story().until(run.follow(), lambda story: story.whole)
        assert (other.steps, other.totals) == (story.steps, story.totals)

    asyncio.run(follow())


def test_a_run_that_was_cut_back_and_resumed_is_told_anew(folder: Path) -> None:
    async def follow() -> None:
        metrics = folder / "metrics.jsonl"
        metrics.write_text(line(1) + line(2, retries=1) + line(3), encoding="utf-8")
        source, story = WatchedRun(folder).follow(), Story()
        await story.until(source, lambda story: story.steps == [1, 2, 3])
        metrics.write_text(line(1) + line(2, lr=0.5), encoding="utf-8")
        await story.until(source, lambda story: story.resets == 2 and story.whole)
        assert (story.steps, story.lines[1]["lr"], story.totals["retries"]) == ([1, 2], 0.5, 0)

    asyncio.run(follow())


def test_the_end_of_a_run_is_told_and_that_it_goes_on(folder: Path) -> None:
    async def follow() -> None:
        summary = folder / "summary.json"
        (folder / "metrics.jsonl").write_text(line(1), encoding="utf-8")
        source, story = WatchedRun(folder).follow(), Story()
        await story.until(source, lambda story: story.steps == [1])
        assert story.standing == {}
        summary.write_text('{"finished": false, "step": 1, "stopped_by": "SIGINT"}', encoding="utf-8")
        await story.until(source, lambda story: "summary" in story.standing)
        assert story.standing["summary"] == {"step": 1, "finished": False, "stopped_by": "SIGINT"}
        summary.unlink()
        await story.until(source, lambda story: story.standing["summary"] is None)

    asyncio.run(follow())


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no run directory"):
        open_runs([tmp_path / "none"])
    with pytest.raises(ConfigError, match="no run directory: it has neither"):
        open_runs([tmp_path])
    with pytest.raises(ConfigError, match="at most"):
        open_runs([tmp_path / str(number) for number in range(7)])


def test_runs_of_one_name_are_told_apart_and_one_run_is_one(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a/run", "b/run", "b/other")]
    for path in paths:
        path.mkdir(parents=True)
        (path / "metrics.jsonl").touch()
    runs = open_runs([*paths, tmp_path / "a" / ".." / "b" / "run"])
    assert [run.name for run in runs] == ["a/run", "b/run", "other"]


@pytest.mark.parametrize(
    "config", [b"\xff\xfe = ", b"[" * 5000, b"seed = " + b"[" * 5000, b"seed = 2026-01-01\nmemory = inf\njob = [1]"]
)
def test_settings_that_cannot_be_read_leave_a_run_that_can(folder: Path, config: bytes) -> None:
    (folder / "config.toml").write_bytes(config)
    described = WatchedRun(folder).described()
    assert (described["name"], described["settings"]) == (folder.name, {})
    unreadable = b"inf" not in config
    assert (described["trouble"] or "").startswith("config.toml cannot be read: ") == unreadable


def test_a_run_that_has_nothing_to_tell_for_long_is_silent_until_it_goes_on(folder: Path) -> None:
    async def follow() -> None:
        metrics = folder / "metrics.jsonl"
        metrics.write_text(line(1), encoding="utf-8")
        os.utime(metrics, (1e9, 1e9))
        source, story = WatchedRun(folder).follow(), Story()
        await story.until(source, lambda story: "silent" in story.standing)
        assert (story.steps, story.standing["silent"]) == ([1], 1e9)
        with metrics.open("a", encoding="utf-8") as file:
            file.write(line(2))
        await story.until(source, lambda story: story.standing["silent"] is None)
        assert story.steps == [1, 2]
        (folder / "summary.json").write_text('{"finished": true, "step": 2}', encoding="utf-8")
        os.utime(metrics, (1e9, 1e9))
        await story.until(source, lambda story: "summary" in story.standing)
        assert story.standing["silent"] is None

    asyncio.run(follow())


TIMELINE = {"wait": 0.1, "forward": [0.1], "backward": [0.2], "finish": 0, "optimizer": 0.1}


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ({"loss": math.nan, "lr": math.inf}, {"loss": None}),
        ({"grad_norm": "2", "retries": True, "peak_bytes": 10**400}, {"odd": 3}),
        ({"loss": "1", "microbatch_size": -1, "noise_scale": [2]}, {"loss": None, "odd": 3}),
        ({"timeline": TIMELINE, "memory": {"gradients": 8}}, {"timeline": TIMELINE, "memory": {"gradients": 8}}),
        ({"timeline": {**TIMELINE, "forward": [0.1, 0.2]}}, {"odd": 1}),
        ({"timeline": {**TIMELINE, "backward": [None]}, "memory": {"gradients": "all"}}, {"odd": 2}),
        ({"timeline": {**TIMELINE, "wait": -1}, "memory": {str(name): 1 for name in range(99)}}, {"odd": 2}),
        ({"timeline": [1], "memory": [1], "validation": 3, "applied": 0}, {"odd": 3}),
        ({"unit": "tokens\n"}, {"unit": "tokens\\n"}),
        ({"unit": ["tokens"]}, {}),
        (
            {"validation": {"loss": 0.0, "accuracy": 1}, "applied": False},
            {"validation": {"loss": 0.0}, "applied": False},
        ),
    ],
)
def test_what_is_not_of_its_form_is_left_out_of_a_line(written: dict[str, Any], read: dict[str, Any]) -> None:
    assert read_line(json.dumps({"step": 4, **written}).encode()) == {"step": 4, **read}


STRANGE = [b"", b"{", b"3", b"[" * 9000, b"\xff", b'{"loss": 1}', b'{"step": 0}', b'{"step": "1"}']


@pytest.mark.parametrize("text", [*STRANGE, b'{"step": 1' + b"0" * 99 + b"}"], ids=range(9))
def test_what_is_no_line_is_left_out(text: bytes) -> None:
    assert read_line(text) is None


def test_a_real_run_is_seen_in_a_browser(tmp_path: Path) -> None:
    """Trained by the command line, beside another run of which a line was never finished."""
    run, other = tmp_path / "mine", tmp_path / "other"
    arguments = ["--steps", "6", "--no-compare", "--json", "--tensorboard"]
    result = CliRunner().invoke(app, ["train", f"{JOB}:small", "--run", str(run), *arguments])
    assert result.exit_code == 0, result.output
    lines = [json.loads(text) for text in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    for each in lines:
        timeline = each["timeline"]
        assert len(timeline["forward"]) == len(timeline["backward"]) == each["microbatches"]
        spent = sum(timeline["forward"]) + sum(timeline["backward"]) + timeline["finish"] + timeline["optimizer"]
        assert 0 < spent + timeline["wait"] <= each["seconds"] + 1e-4
    assert sum(lines[0]["memory"].values()) == lines[0]["peak_bytes"]
    other.mkdir()
    (other / "metrics.jsonl").write_text(line(1) + line(2, retries=2, microbatch_size=4) + '{"step"', encoding="utf-8")
    with launched() as browser:
        for client in serving(Guide(open_runs([run, other]))):
            with opened(browser, f"{client.url}run") as page:
                until(page, "document.querySelectorAll('[data-runs] p').length === 2")
                until(page, "document.querySelector('[data-runs]').textContent.includes('finished: step 6 of 6')")
                assert page.locator("[data-pane=Loss] svg").is_visible()
                assert "Step 6: 3 microbatches" in str(page.locator("[data-pane^='A step'] [data-say]").text_content())
                assert "at the peak of step 2" in str(page.locator("[data-pane=Memory] [data-say]").text_content())
                # What one looks at first is largest.
                for width in (1280, 800):
                    page.set_viewport_size({"width": width, "height": 860})
                    panes = page.locator("[data-pane]")
                    assert [panes.nth(at).get_attribute("data-pane") for at in (0, 1)] == ["Loss", "Memory"]
                    large, *others = [each.bounding_box()["width"] for each in panes.locator("svg").all()[1:]]
                    assert large > 1.3 * max(others), width
                # Two runs: each chart shows both. One row tells the chosen one.
                assert page.locator("[data-headline] dd").nth(0).text_content() == "6 of 6"
                assert page.locator("[data-headline] dd").nth(1).text_content() == "finished"
                assert str(page.locator("[data-headline] dd").nth(4).text_content()).endswith(" samples a second")
                chart = page.locator("[data-pane=Loss] [data-drawing]")
                chart.focus()
                page.keyboard.press("Home")
                assert str(chart.get_attribute("aria-valuetext")).startswith("step: 1. mine: ")
                page.get_by_role("button", name="other").click()
                until(page, "document.querySelector('[data-log]').textContent.includes('memory ran out 2 times')")
                with (other / "metrics.jsonl").open("a", encoding="utf-8") as file:
                    file.write(': 3, "loss": 0.25}\n')
                until(page, "document.querySelector('[data-runs]').textContent.includes('step 3, loss 0.25')")
                page.set_viewport_size({"width": 390, "height": 844})
                assert page.evaluate("document.documentElement.scrollWidth") <= 390
                for summary in page.locator("summary:visible").all():
                    summary.click()
                widths = [{"width": width, "height": 844} for width in (390, 1280)]
                assert violations(page, "html", widths=widths) == []

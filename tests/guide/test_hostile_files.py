"""Whatever a run's files hold is shown as such in that run alone: the others, and the server's JSON, stay right."""

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import pytest
from starlette.responses import JSONResponse
from tests.guide.browser import launched, opened, until
from tests.guide.conftest import serving
from tests.guide.story import Story, strictly

from microbatch.guide import live
from microbatch.guide.live import WatchedRun, open_runs
from microbatch.guide.metrics_file import PIECE
from microbatch.guide.server import Guide, follow_runs, stream

FINE, UNREADABLE, ODD = "fine", "unreadable", "odd"


def line(step: int, **more: Any) -> bytes:
    return json.dumps({"step": step, "loss": 0.5, **more}).encode() + b"\n"


NAMES = b", ".join(b'"%d": 1' % name for name in range(20_000))
TIMES = b'{"wait": 0, "finish": 0, "optimizer": 1e999, "forward": [1], "backward": [1]}'

# What is in the second of three lines, and how it is shown: as a line with a loss that is not finite, as a line without
# the value, or as no line.
LINES = {
    "too large a number": (b'{"step": 2, "loss": 1e999}', FINE),
    "minus too large a number": (b'{"step": 2, "loss": -1e999, "lr": -1e999}', FINE),
    "NaN": (b'{"step": 2, "loss": NaN, "lr": NaN, "grad_norm": NaN}', FINE),
    "infinity": (b'{"step": 2, "loss": -Infinity, "per_second": Infinity}', FINE),
    "infinite memory": (b'{"step": 2, "loss": 1e999, "memory": {"gradients": 1e999}}', ODD),
    "infinite times": (b'{"step": 2, "loss": NaN, "timeline": ' + TIMES + b"}", ODD),
    "an integer of 400 digits": (b'{"step": 2, "loss": 1' + b"0" * 400 + b"}", ODD),
    "an integer of 9,000 digits": (b'{"step": 2, "loss": 1' + b"0" * 9000 + b"}", UNREADABLE),
    "a step beyond counting": (b'{"step": 1' + b"0" * 40 + b"}", UNREADABLE),
    "a step that is true": (b'{"step": true}', UNREADABLE),
    "a step that is negative": (b'{"step": -2}', UNREADABLE),
    "a step that is a fraction": (b'{"step": 2.0}', UNREADABLE),
    "texts": (b'{"step": 2, "loss": "0.5<script>alert(1)</script>"}', ODD),
    "a lone surrogate": (b'{"step": 2, "loss": "\\ud800"}', ODD),
    "a lone surrogate in a name": (b'{"step": 2, "loss": NaN, "memory": {"\\udfff": 3}}', FINE),
    "bytes that are no text": (b'{"step": 2, "loss": "\xff\xfe\x80"}', UNREADABLE),
    "every byte but the end of a line": (bytes(sorted({*range(256)} - {10})), UNREADABLE),
    "zeros": (b"\0" * 5000, UNREADABLE),
    "another encoding": (json.dumps({"step": 2}).encode("utf-16"), UNREADABLE),
    "arrays 10,000 deep": (b'{"step": 2, "loss": ' + b"[" * 10_000 + b"]" * 10_000 + b"}", UNREADABLE),
    "objects 10,000 deep": (b'{"a":' * 10_000 + b"1" + b"}" * 10_000, UNREADABLE),
    "two objects": (b'{"step": 2}, {"step": 2}', UNREADABLE),
    "half a line, gone on with": (b'{"step": 2, "lo{"step": 2}', UNREADABLE),
    "a list": (b"[1, 2]", UNREADABLE),
    "nothing": (b"", UNREADABLE),
    "10 MB": (b'{"step": 2, "loss": "' + b"x" * 10_000_000 + b'"}', UNREADABLE),
    "as long as a piece": (b"x" * PIECE, UNREADABLE),
    "20,000 names": (b'{"step": 2, "loss": NaN, "memory": {' + NAMES + b"}}", ODD),
}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "EVERY", 0.01)


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Two runs beside each other, each of three steps."""
    folders = [tmp_path / "good", tmp_path / "bad"]
    for folder in folders:
        folder.mkdir()
        (folder / "config.toml").write_text('job = "language"\nsteps = 9\n', encoding="utf-8")
        (folder / "metrics.jsonl").write_bytes(line(1) + line(2) + line(3))
    return folders


def told(folders: list[Path]) -> tuple[list[dict[str, Any]], list[Story]]:
    """Return what the server says of runs, read as strictly as a browser reads it."""

    async def follow() -> tuple[list[dict[str, Any]], list[Story]]:
        opened_runs = open_runs(folders)
        described = JSONResponse([run.described() for run in opened_runs]).body
        stories = [Story() for _ in folders]
        async with asyncio.timeout(60):
            async for message in stream(follow_runs(opened_runs), asyncio.Event()):
                message.encode("ascii")
                (entry,) = strictly(message.partition("data: ")[2])
                stories[entry["run"]].take(entry["events"])
                if all(story.whole or "trouble" in story.standing for story in stories):
                    break
        return strictly(bytes(described).decode()), stories

    return asyncio.run(follow())


def is_right(described: dict[str, Any], story: Story) -> bool:
    settings = {"job": "language", "steps": 9}
    expected = {"name": "good", "settings": settings, "trouble": None}
    return (described, story.steps, story.standing) == (expected, [1, 2, 3], {}) and not story.totals["unreadable"]


@pytest.mark.parametrize("name", LINES)
def test_a_line_of_any_kind_is_shown_as_such_in_its_run_alone(runs: list[Path], name: str) -> None:
    text, how = LINES[name]
    (runs[1] / "metrics.jsonl").write_bytes(line(1) + text + b"\n" + line(3))
    described, (good, bad) = told(runs)
    assert is_right(described[0], good)
    assert bad.steps == ([1, 3] if how == UNREADABLE else [1, 2, 3])
    found = (bad.totals["unreadable"], bad.totals["first_unreadable"], bad.totals["odd"])
    assert found == {FINE: (0, 0, 0), ODD: (0, 0, 1), UNREADABLE: (1, 2, 0)}[how]
    if how != UNREADABLE:
        assert bad.lines[1].get("loss") is None
    assert bad.lines[-1]["loss"] == 0.5


def test_a_line_without_an_end_is_waited_for_and_never_kept(runs: list[Path]) -> None:
    metrics = runs[1] / "metrics.jsonl"
    with metrics.open("ab") as file:
        file.write(b'{"step": 4, "loss": ' + b"1" * 3 * PIECE)

    async def follow() -> None:
        run = WatchedRun(runs[1])
        source, story = run.follow(), Story()
        await story.until(source, lambda story: story.whole)
        assert (story.steps, story.totals["unreadable"]) == ([1, 2, 3], 0)
        with metrics.open("ab") as file:
            file.write(b"}\n" + line(5))
        await story.until(source, lambda story: story.steps == [1, 2, 3, 5])
        assert (story.totals["unreadable"], story.totals["first_unreadable"]) == (1, 4)

    asyncio.run(follow())


SUMMARIES = [
    *(
        b"",
        b"{",
        b"[]",
        b"\xff",
        b"[" * 10_000,
        b'{"step": 1e999}',
        b'{"step": 1' + b"0" * 9000 + b"}",
        b'{"step": "1"}',
    ),
    b'{"finished": true}',
]


@pytest.mark.parametrize("text", SUMMARIES, ids=range(len(SUMMARIES)))
def test_a_summary_that_is_none_is_said_to_be_none(runs: list[Path], text: bytes) -> None:
    (runs[1] / "summary.json").write_bytes(text)
    described, (good, bad) = told(runs)
    assert is_right(described[0], good)
    assert bad.standing == {"trouble": "summary.json is no summary of a run"}
    assert bad.steps == [1, 2, 3]


def test_of_a_summary_only_what_is_shown_is_sent(runs: list[Path]) -> None:
    hostile = b'{"step": 3, "finished": 1, "stopped_by": "\\ud800\\u0000<b>", "loss": 1e999, "seconds": NaN}'
    (runs[1] / "summary.json").write_bytes(hostile)
    _, (_, bad) = told(runs)
    assert bad.standing["summary"] == {"step": 3, "finished": False, "stopped_by": "\\ud800\\x00<b>"}


@pytest.mark.parametrize(
    ("config", "settings"),
    [
        (b"steps = 1" + b"0" * 400, {}),
        (b"memory = 1e999\nlearning_rate = nan\nsteps = 3", {"steps": 3}),
        (b'job = "' + b"x" * 500 + b'"', {"job": "x" * 199 + "…"}),
        (b'job = "a\\u202eb\\n"', {"job": "a\\u202eb\\n"}),
        (b"steps = 1" + b"0" * 9000, None),
        (b"steps = [" * 5000, None),
        (b'job = "' + b"x" * (1 << 20) + b'"', None),
    ],
    ids=range(7),
)
def test_settings_of_any_kind_stay_in_their_run(
    runs: list[Path], config: bytes, settings: dict[str, Any] | None
) -> None:
    (runs[1] / "config.toml").write_bytes(config)
    described, (good, bad) = told(runs)
    assert is_right(described[0], good)
    assert described[1]["settings"] == (settings or {})
    assert (described[1]["trouble"] is None) == (settings is not None)
    assert bad.steps == [1, 2, 3]


def test_a_directory_whose_name_is_no_text_is_shown(runs: list[Path]) -> None:
    strange = Path(os.fsdecode(os.fsencode(runs[1].parent) + b"/a\xffb\n"))
    try:
        runs[1].rename(strange)
    except OSError:
        pytest.skip("this file system takes texts only")
    described, (good, bad) = told([runs[0], strange])
    assert is_right(described[0], good)
    assert described[1]["name"] == "a\\udcffb\\n"
    assert bad.steps == [1, 2, 3]


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.toml", "summary.json"])
@pytest.mark.parametrize("kind", ["directory", "pipe", "circle", "gone", "forbidden"])
def test_a_file_that_is_none_stays_in_its_run(
    runs: list[Path], monkeypatch: pytest.MonkeyPatch, name: str, kind: str
) -> None:
    path = runs[1] / name
    path.unlink(missing_ok=True)
    if kind == "directory":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "circle":
        path.symlink_to(path)
    elif kind == "forbidden":
        path.write_bytes(b"")
        opens = Path.open

        def refuse(self: Path, *arguments: Any, **options: Any) -> Any:
            if self == path:
                raise PermissionError(13, "Permission denied")
            return opens(self, *arguments, **options)

        monkeypatch.setattr(Path, "open", refuse)
    described, (good, bad) = told(runs)
    assert is_right(described[0], good)
    said = bad.standing.get("trouble") or described[1]["trouble"]
    assert said == (f"{name} cannot be read: Permission denied" if kind == "forbidden" else None)
    if name != "metrics.jsonl":
        assert bad.steps == [1, 2, 3]


def test_a_browser_shows_it(runs: list[Path]) -> None:
    """Beside a good run, one with every kind of line; and the page complains about nothing."""
    everything = b"\n".join(text for text, _ in LINES.values())
    (runs[1] / "metrics.jsonl").write_bytes(line(1) + everything + b'\n{"step": 4, "loss": NaN}\n')
    (runs[1] / "config.toml").write_bytes(b"\xff")
    lost = sum(how == UNREADABLE for _, how in LINES.values())
    with launched() as browser:
        for client in serving(Guide(open_runs(runs))):
            with opened(browser, f"{client.url}run") as page:
                until(page, "document.querySelector('[data-runs]').textContent.includes('step 3 of 9, loss 0.5')")
                until(page, "document.querySelector('[data-runs]').textContent.includes('loss not finite')")
                text = str(page.locator("[data-runs]").text_content())
                assert f"{lost} lines of metrics.jsonl cannot be read (the first: line " in text
                assert "config.toml cannot be read" in text
                page.get_by_role("button", name="bad").click()
                assert page.locator("[data-pane=Loss] svg").is_visible()
                assert "NaN" not in str(page.content())

"""The line that shows what a command is doing: there at once, never wider than the screen, and nowhere but there."""

import io
import re

import pytest
from rich.console import Console
from rich.text import Text

from microbatch.cli.error_report import print_error
from microbatch.cli.waiting import ProgressLine, Waiting, output_console

FIELDS = [Text(each) for each in ("■" * 16, "loss 0.5690", "38,508 samples/s", "2.3 s left", "peak 238 KiB")]
SPARE = (4, 0, 2)


class Screen(io.StringIO):
    """A terminal."""

    def isatty(self) -> bool:
        return True


def terminal(monkeypatch: pytest.MonkeyPatch) -> Screen:
    """Make standard error a terminal of 60 columns."""
    screen = Screen()
    for name in ("NO_COLOR", "RANK", "TTY_COMPATIBLE", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setattr("sys.stderr", screen)
    return screen


@pytest.mark.parametrize("width", [20, 40, 60, 80, 120, 200])
def test_a_progress_line_fits_and_leaves_out_whole_fields(width: int) -> None:
    line = ProgressLine(Text("120/300"), 0.4, FIELDS, spare=SPARE).text(width)
    assert line.cell_len <= width
    kept = [field for field in FIELDS if field.plain in line.plain]
    assert line.plain.replace("\u2501", "").split() == ["120/300", *" ".join(each.plain for each in kept).split()]
    assert {60: 2, 80: 3, 120: 5, 200: 5}.get(width, len(kept)) == len(kept)
    if width >= 60:
        assert line.cell_len == width
        assert line.plain.count("\u2501") >= 10


def test_a_terminal_sees_at_once_what_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = terminal(monkeypatch)
    waiting = Waiting(as_json=False, color=True)
    waiting("loading PyTorch")
    with waiting:
        assert "loading PyTorch" in screen.getvalue()
        waiting("run 1 of 3", 0.25, detail="lr 1.0e-03")
        assert "run 1 of 3" in screen.getvalue()


@pytest.mark.parametrize("reason", ["json", "pipe", "rank"])
def test_programs_pipes_and_other_ranks_see_no_line(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    screen: io.StringIO = terminal(monkeypatch)
    if reason == "pipe":
        screen = io.StringIO()
        monkeypatch.setattr("sys.stderr", screen)
    if reason == "rank":
        monkeypatch.setenv("RANK", "1")
    with Waiting(as_json=reason == "json", color=True) as waiting:
        waiting("loading PyTorch", 0.5)
    assert screen.getvalue() == ""


def test_no_color_is_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = terminal(monkeypatch)
    for color in (True, False):
        print_error(Waiting(as_json=False, color=color).console, "wrong")
    monkeypatch.setenv("NO_COLOR", "1")
    print_error(Waiting(as_json=False, color=True).console, "wrong")
    colored, *plain = screen.getvalue().splitlines()
    assert "\x1b[1;31m" in colored
    assert all("31m" not in line for line in plain)


def test_an_error_breaks_between_words_and_a_command_stays_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = terminal(monkeypatch)
    command = "  microbatch train --run 'runs/a directory with a long name that is wider than the screen' --resume"
    print_error(Waiting(as_json=False, color=False).console, f"{'words ' * 30}end\n{command}")
    *words, last = screen.getvalue().splitlines()
    assert last == command
    shown = re.sub(r"\x1b\[[0-9;]*m", "", " ".join(words))
    assert set(shown.split()) == {"error:", "words", "end"}


def test_a_file_has_no_width_and_a_named_width_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout", io.StringIO())
    monkeypatch.delenv("COLUMNS", raising=False)
    assert output_console(color=True).width > 1000
    monkeypatch.setenv("COLUMNS", "60")
    assert output_console(color=True).width == 60
    assert isinstance(output_console(color=True), Console)

"""The doctor shows on a terminal how many files are left, and nothing in a pipe."""

import io
import itertools

import pytest

from microbatch.cli import files_left
from microbatch.cli.files_left import with_files_left


class Terminal(io.StringIO):
    """A stream that people read."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream", [Terminal(), io.StringIO()], ids=["terminal", "pipe"])
def test_files_and_time_left_are_shown_on_a_terminal_alone(
    stream: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files_left.time, "monotonic", itertools.count().__next__)  # each look takes a second
    assert list(with_files_left(range(5), stream)) == [0, 1, 2, 3, 4]
    shown = stream.getvalue()
    if not stream.isatty():
        assert shown == ""
        return
    assert "2 of 5 files read, 4.50 s left" in shown  # 3 s for 2 files, and 3 are left
    assert shown.endswith("\r\x1b[2K")


def test_quick_work_shows_nothing() -> None:
    stream = Terminal()
    assert list(with_files_left("abc", stream)) == ["a", "b", "c"]
    assert stream.getvalue() == ""

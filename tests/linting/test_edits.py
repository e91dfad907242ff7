"""Edits are applied as said, shown as a diff that `git apply` takes, and never two to one line."""

import json
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from microbatch.linting.edits import apply_edits, file_diff, fitting, fragment
from microbatch.linting.finding import Edit, Finding
from microbatch.linting.sources import Source, read_file, read_text

TEXT = "one\ntwo\nthree\nfour\n"


def finding(*edits: Edit, line: int = 1) -> Finding:
    return Finding(rule="MB105", path="a.py", line=line, column=1, confidence="certain", message="a fault", edits=edits)


@pytest.mark.parametrize(
    ("edits", "text"),
    [
        ([], TEXT),
        ([Edit(2, 2, "TWO\n")], "one\nTWO\nthree\nfour\n"),
        ([Edit(2, 3, "both\n")], "one\nboth\nfour\n"),
        ([Edit(2, 2, "")], "one\nthree\nfour\n"),
        ([Edit(2, 1, "before\n")], "one\nbefore\ntwo\nthree\nfour\n"),
        ([Edit(1, 0, "first\n")], "first\none\ntwo\nthree\nfour\n"),
        ([Edit(5, 4, "last\n")], "one\ntwo\nthree\nfour\nlast\n"),
        ([Edit(1, 1, "a\nb\n"), Edit(4, 4, "d\n")], "a\nb\ntwo\nthree\nd\n"),
        ([Edit(4, 4, "d\n"), Edit(1, 1, "a\nb\n")], "a\nb\ntwo\nthree\nd\n"),
        ([Edit(3, 2, "p\n"), Edit(3, 2, "q\n"), Edit(3, 3, "r\n")], "one\ntwo\np\nq\nr\nfour\n"),
    ],
)
def test_edits_are_applied(edits: list[Edit], text: str) -> None:
    assert apply_edits(TEXT, edits) == text


def test_of_two_that_change_a_line_the_first_wins() -> None:
    first, second, third = (
        finding(Edit(2, 3, "x\n")),
        finding(Edit(3, 3, "y\n"), Edit(1, 1, "z\n")),
        finding(Edit(4, 4, "w\n")),
    )
    assert fitting([first, second, third]) == [first, third]
    assert fitting([second, first, third]) == [second, third]
    inside, beside = finding(Edit(3, 2, "new\n")), finding(Edit(2, 1, "new\n"))
    assert fitting([first, inside]) == [first]
    assert fitting([inside, first]) == [inside]
    assert fitting([first, beside]) == [first, beside]
    assert fitting([finding()]) == []


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("end", ["", "end"])
@given(numbers=st.sets(st.integers(1, 12)), insertions=st.sets(st.integers(1, 13)))
def test_git_applies_the_diff(
    tmp_path_factory: pytest.TempPathFactory, newline: str, end: str, numbers: set[int], insertions: set[int]
) -> None:
    folder = tmp_path_factory.mktemp("diff")
    lines = [f"line {number}" for number in range(1, 13)]
    (folder / "a.py").write_bytes((newline.join(lines) + newline + end).encode())
    source = read_file(folder / "a.py", path="a.py")
    assert isinstance(source, Source)
    edits = [Edit(number, number, f"changed {number}\n") for number in numbers]
    edits += [Edit(number, number - 1, f"new {number}\n") for number in insertions]
    diff = file_diff(source, edits)
    assert bool(diff) is bool(edits)
    if diff:
        subprocess.run(["git", "apply", "-"], input=diff.encode(), cwd=folder, check=True, capture_output=True)  # noqa: S607
    wanted = apply_edits(source.text, edits).replace("\n", newline)
    assert (folder / "a.py").read_bytes().decode() == wanted


def test_a_finding_shows_its_own_lines() -> None:
    source = Source("a.py", TEXT)
    assert fragment(source, finding(Edit(2, 2, "TWO\n"))) == [" one", "-two", "+TWO", " three"]
    assert fragment(source, finding()) == []


def test_of_a_notebook_each_cell_has_a_diff() -> None:
    cells = [{"cell_type": "code", "source": text} for text in ("one\ntwo", "three", "four\nfive")]
    source = read_text(json.dumps({"cells": cells}), path="a.ipynb")
    assert isinstance(source, Source)
    diff = file_diff(source, [Edit(2, 2, "TWO\nmore\n"), Edit(5, 4, "new\n")])
    assert [line for line in diff.splitlines() if line[:2] not in {"@@", "\\ "}] == [
        "--- a/a.ipynb:cell 1",
        "+++ b/a.ipynb:cell 1",
        " one",
        "-two",
        "+TWO",
        "+more",
        "--- a/a.ipynb:cell 3",
        "+++ b/a.ipynb:cell 3",
        " four",
        "+new",
        " five",
    ]


def test_a_file_without_edits_has_no_diff(tmp_path: Path) -> None:
    assert file_diff(Source("a.py", TEXT), []) == ""

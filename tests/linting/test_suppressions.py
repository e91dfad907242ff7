"""Comments silence findings of their own statement, by code; a comment that silences nothing is reported."""

from collections.abc import Sequence

import pytest

from microbatch.linting.finding import Finding
from microbatch.linting.sources import Source
from microbatch.linting.suppressions import suppress

ALONE = "; it is alone on its line: write it at the end of the statement's line"


def finding(line: int, rule: str = "MB105") -> Finding:
    return Finding(rule=rule, path="a.py", line=line, column=1, confidence="certain", message="a fault")


def left(text: str, *findings: Finding) -> list[tuple[str, int]]:
    """Return the rule and line of what is left, notes about comments aside."""
    return [(each.rule, each.line) for each in suppress(Source("a.py", text), findings) if each.rule != "MB003"]


def notes(text: str, *findings: Finding) -> list[str]:
    found: Sequence[Finding] = suppress(Source("a.py", text), findings)
    return [f"{each.line}:{each.column} {each.message}" for each in found if each.rule == "MB003"]


@pytest.mark.parametrize(
    "comment",
    [
        "# microbatch: ignore[MB105] windows are whole",
        "# microbatch: ignore",
        "# microbatch: ignore  because",
        "#microbatch:ignore[MB105]",
        "# Microbatch: ignore[mb105]",
        "# microbatch: ignore[window-phase]",
        "# noqa: E501  # microbatch: ignore[MB105]",
        "# noqa # type: ignore",
    ],
)
def test_a_comment_silences_its_line(comment: str) -> None:
    text = f"x = 1\ny = 2  {comment}\nz = 3\n"
    silenced = "microbatch" in comment.lower()
    assert left(text, finding(1), finding(2), finding(3)) == [
        ("MB105", line) for line in (1, 2, 3) if line != 2 or not silenced
    ]
    assert notes(text, finding(2)) == []


def test_it_silences_the_rules_that_it_names() -> None:
    text = "x = 1  # microbatch: ignore[MB105, MB110] both\n"
    assert left(text, finding(1), finding(1, "MB110"), finding(1, "MB201")) == [("MB201", 1)]


def test_what_cannot_be_read_is_never_silenced() -> None:
    assert left("x = 1  # microbatch: ignore\n", finding(1, "MB000")) == [("MB000", 1)]


@pytest.mark.parametrize("at", [1, 2, 3])
@pytest.mark.parametrize("line", [1, 2, 3])
def test_any_line_of_a_statement_will_do(at: int, line: int) -> None:
    lines = ["x = f(", "    a,", ")", "y = 1"]
    lines[at - 1] += "  # microbatch: ignore[MB105]"
    assert left("\n".join(lines), finding(line), finding(4)) == [("MB105", 4)]


def test_in_the_head_of_a_loop_it_holds_for_the_head() -> None:
    text = "for x in f(\n    y\n):  # microbatch: ignore[MB105]\n    z(x)\n"
    assert left(text, finding(1), finding(2), finding(4)) == [("MB105", 4)]
    text = "@a\n@b  # microbatch: ignore[MB105]\ndef f(x):\n    return x\n"
    assert left(text, finding(3), finding(4)) == [("MB105", 4)]
    text = "with a as b, c(  # microbatch: ignore[MB105]\n    d\n):\n    e\n"
    assert left(text, finding(1), finding(2), finding(4)) == [("MB105", 4)]


def test_inside_a_loop_it_holds_for_its_own_statement() -> None:
    text = "for x in y:\n    z(x)  # microbatch: ignore[MB105]\n    w(x)\n"
    assert left(text, finding(1), finding(2), finding(3)) == [("MB105", 1), ("MB105", 3)]


def test_a_whole_file_is_silenced() -> None:
    text = "x = 1\ny = 2\n# microbatch: ignore-file[MB105] generated\n"
    assert left(text, finding(1), finding(2), finding(2, "MB110")) == [("MB110", 2)]
    assert left("# microbatch: ignore-file\nx = 1\n", finding(2), finding(2, "MB110")) == []


def test_text_in_strings_is_no_comment() -> None:
    text = 'x = "# microbatch: ignore[MB105]"\ny = """\n# microbatch: ignore-file\n"""\n'
    assert left(text, finding(1), finding(2)) == [("MB105", 1), ("MB105", 2)]
    assert notes(text) == []


@pytest.mark.parametrize(
    ("text", "note"),
    [
        ("x = 1  # microbatch: ignore[MB110]\n", "1:8 this comment ignores MB110, which is not found here"),
        ("x = 1  # microbatch: ignore[MB105,MB110]\n", "1:8 this comment ignores MB110, which is not found here"),
        ("x = 1\ny = 2  # microbatch: ignore\n", "2:8 this comment ignores all rules, and no rule finds anything here"),
        ("x = 1  # microbatch: ignore[MB999]\n", "1:8 this comment names MB999, which is no rule"),
        ("x = 1\n# microbatch: ignore-file[MB201]\n", "2:1 this comment ignores MB201, which is not found here"),
        (
            "# microbatch: ignore[MB105]\nx = 1\n",
            "1:1 this comment ignores MB105, which is not found here" + ALONE,
        ),
    ],
)
def test_a_comment_that_silences_nothing_is_reported(text: str, note: str) -> None:
    line = 2 if text.startswith("#") else 1
    assert notes(text, finding(line)) == [note]


def test_a_comment_on_its_own_line_inside_a_statement_holds_for_it() -> None:
    text = "x = f(\n    # microbatch: ignore[MB105] for all of it\n    a,\n)\n"
    assert left(text, finding(1)) == []
    assert notes(text, finding(1)) == []


def test_many_comments_end_soon() -> None:
    text = "def f():\n" + "    x = 1  # microbatch: ignore[MB105]\n" * 2_000
    assert left(text, *(finding(line) for line in range(2, 2_002))) == []

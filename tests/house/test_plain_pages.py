"""Pages for users in plain words: short sentences, and headings that say what a reader looks for."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.house.test_readme import FENCE
from tests.house.test_words import words

ROOT = Path(__file__).parents[2]
# Pages that are not held yet.
NOT_YET = {"doctor", "learning-rate", "sweep", "which-batch", "cost", "noise-scale"}
PLAIN = [
    "README.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    *(f"docs/{page.name}" for page in sorted((ROOT / "docs").glob("*.md")) if page.stem not in NOT_YET),
]
LONGEST = 30
ODD_HEADING = re.compile(r"(?:Is it|Who|Whom|What of|Of|Hardware one|Not)\b|.*, (?:also|too)$")


def sentences(text: str) -> Iterator[str]:
    """Yield the sentences of a page: of its paragraphs, list items and cells of tables, without code."""
    prose = re.sub(r"\]\([^)]*\)", "]", FENCE.sub("\n\n", text))
    pieces = re.split(r"\n\s*\n|\n(?=\s*[-*] |\s*\d+\. |\||#)", prose)
    for piece in pieces:
        for cell in piece.split("|") if piece.startswith("|") else [piece]:
            yield from re.split(r"(?<=[.!?:;])\s+", " ".join(cell.split()))


def headings(text: str) -> list[str]:
    return re.findall(r"^#+ +(.+)$", FENCE.sub("", text), re.MULTILINE)


@pytest.mark.parametrize("page", PLAIN)
def test_sentences_of_a_page_are_short(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert [each for each in sentences(text) if words(each) > LONGEST] == []


@pytest.mark.parametrize("page", PLAIN)
def test_headings_say_what_a_reader_looks_for(page: str) -> None:
    found = headings((ROOT / page).read_text(encoding="utf-8"))
    assert found
    assert [each for each in found if ODD_HEADING.match(each)] == []


LONG = " ".join(["word"] * 31)


@pytest.mark.parametrize("text", ["{}.", "Short. {}.\nShort.", "- a\n- {}\n", "| a | {} |", "## Title\n\n{}."])
def test_a_long_sentence_is_seen(text: str) -> None:
    assert [words(each) for each in sentences(text.format(LONG)) if words(each) > LONGEST] == [31]


@pytest.mark.parametrize("text", ["```python\n{}\n```\n", "`{}`", "[a]({})", "- word\n" * 40])
def test_code_and_lists_are_not_one_sentence(text: str) -> None:
    assert [each for each in sentences(text.format(LONG)) if words(each) > LONGEST] == []


@pytest.mark.parametrize("heading", ["Is it, on your own model?", "Hardware one does not have", "What of this counts"])
def test_an_odd_heading_is_seen(heading: str) -> None:
    assert ODD_HEADING.match(heading)

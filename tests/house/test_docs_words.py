"""Plain words in the pages: short sentences, headings that name what a reader looks for, no archaic words."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
# Pages that a program writes, whose words are held where they are written.
WRITTEN_BY_PROGRAMS = {"combinations.md", "doctor.md"}
FRONT = [DOCS.parent / name for name in ("README.md", "SECURITY.md")]
PAGES = [*FRONT, *sorted(page for page in DOCS.glob("*.md") if page.name not in WRITTEN_BY_PROGRAMS)]
SENTENCE_WORDS = 25

FENCE = re.compile(r"^(?P<fence>```+|~~~+).*?^(?P=fence)\s*$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"``.+?``|`.+?`", re.DOTALL)
LINK = re.compile(r"!?\[((?:[^\[\]]|\[[^\]]*\])*)\]\([^)]*\)")
REFERENCE = re.compile(r"^\[[^\]]+\]: .*$", re.MULTILINE)
BLOCK = re.compile(r"^\s*(?:[-*+]|\d+\.)\s+|^\s*>\s?")
# Words that do not say what the code does, and words that only old books use.
BANNED = re.compile(
    r"(?<!scikit-)\b(?:says?|said|saying|tells?|told|telling|learns?|come to|comes to|came to|one's|oneself|whom|"
    r"as ever|likewise|thereof|therein|thereby|whoever|whomever|wherein|ought|lest|nobody|somebody|whence|is had|"
    r"be had|what of|in the midst)\b|\bfor one[,.;)]",
    re.IGNORECASE,
)
# A heading with a pronoun names nothing; one that begins so is a question or the end of a sentence.
PRONOUN = re.compile(r"\b(?:it|they|them|he|those|whom|one's|ours|here|there)\b", re.IGNORECASE)
FRAGMENT = re.compile(
    r"(?:is|are|was|does|do|did|has|have|can|could|will|would|should|may|must|which|whether|who|whose|that|and|but|or|"
    r"also|not|of|over|even|once)\b|(?:often|seldom|more|less)$",
    re.IGNORECASE,
)


def blocks(page: str) -> Iterator[str]:
    """Yield each paragraph, list item and table cell of a page, as plain text; no code blocks, no headings."""
    text = REFERENCE.sub("", re.sub(r"<!--.*?-->", "", FENCE.sub("\n", page), flags=re.DOTALL))
    lines: list[str] = []
    for line in [*text.splitlines(), ""]:
        cells = line.strip().startswith("|")
        begins = not line.strip() or cells or line.startswith("#") or BLOCK.match(line)
        if begins and lines:
            yield plain(" ".join(lines))
            lines = []
        if cells:
            yield from (plain(cell) for cell in re.split(r"(?<!\\)\|", line.strip().strip("|")))
        elif line.strip() and not line.startswith("#"):
            lines.append(BLOCK.sub("", line).strip())


def plain(text: str) -> str:
    """Return text with each piece of code as one word, and each link as its words."""
    return re.sub(r"\*\*|(?<!\w)[*_]|[*_](?!\w)", "", LINK.sub(r"\1", CODE.sub("code", text)))


def sentences(page: str) -> Iterator[str]:
    for block in blocks(page):
        yield from (s for s in re.split(r"(?<=[.!?:])[)\"”]?\s+(?=[A-Z0-9(\"“]|code\b)", block) if s.strip())


def words(sentence: str) -> int:
    """Count words; dashes and signs are none."""
    return sum(any(letter.isalnum() for letter in word) for word in sentence.split())


def headings(page: str) -> list[str]:
    return [plain(line.lstrip("#").strip()) for line in FENCE.sub("", page).splitlines() if re.match(r"#+ ", line)]


def long_sentences(page: str) -> list[str]:
    return [sentence for sentence in sentences(page) if words(sentence) > SENTENCE_WORDS]


def unclear_headings(page: str) -> list[str]:
    return [each for each in headings(page) if each.endswith("?") or PRONOUN.search(each) or FRAGMENT.match(each)]


def banned(page: str) -> list[str]:
    """Return the banned words of a page, each with the words around it."""
    texts = [*blocks(page), *headings(page)]
    return [text[max(0, m.start() - 30) : m.end() + 20] for text in texts for m in BANNED.finditer(text)]


def faults(page: str, *, questions: bool = False) -> list[str]:
    """Return the faults of a page; its headings may be questions where these are what people ask."""
    unclear = [] if questions else unclear_headings(page)
    return [*long_sentences(page), *unclear, *banned(page)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_is_in_plain_words(page: Path) -> None:
    assert faults(page.read_text(encoding="utf-8"), questions=page.name == "faq.md") == []


LONG = " ".join(["word"] * 26)
SHORT = LONG.removeprefix("word ")
PLACES = [
    "{}.",
    "A short one. {}. Another one.",
    "- {}.\n- Another one.",
    "1. A short one.\n2. {}.",
    "> {}.",
    "| a | b |\n|---|---|\n| one | {} |",
    "| a | b |\n|---|---|\n| one | a short one. {} |",
    "**Bold.** {}.",
    "`code` first. {}.",
]


@pytest.mark.parametrize("place", PLACES)
def test_a_long_sentence_is_seen(place: str) -> None:
    assert [words(each) for each in long_sentences(place.format(LONG.capitalize()))] == [26]


@pytest.mark.parametrize("place", PLACES)
def test_a_sentence_of_the_allowed_length_is_left_alone(place: str) -> None:
    assert long_sentences(place.format(SHORT.capitalize())) == []


@pytest.mark.parametrize(
    "text",
    [
        f"Write `{LONG}` here.",
        f"```python\n{LONG}.\n```",
        f"Words.\n\n```text\n# {LONG}\n```\n\nWords.",
        f"[1]: https://example.org/{LONG}",
        f"<!-- {LONG} -->",
        f"[a link](https://example.org/{LONG.replace(' ', '/')})",
        f"- {SHORT}\n- {SHORT}",
        f"| {SHORT} | {SHORT} |",
        f"Two things: {SHORT}.".replace("word word", "Word word", 1),
    ],
)
def test_code_links_and_neighbours_are_not_one_sentence(text: str) -> None:
    assert faults(text) == []


@pytest.mark.parametrize(
    "heading",
    [
        "Is it, on your own model?",
        "Does it pay?",
        "What is it?",
        "Which",
        "Over whom",
        "Whether it pays",
        "What it costs",
        "Hardware one's own",
        "Also cheaper",
        "Not included",
        "Often said, and measured",
        "What others say",
    ],
)
def test_an_unclear_heading_is_seen(heading: str) -> None:
    assert faults(f"# Page\n\n## {heading}\n\nWords.")


@pytest.mark.parametrize(
    "heading",
    [
        "Check your own model",
        "What is refused",
        "When a rank fails",
        "Cost",
        "Losses with their counts",
        "Issues",
        "Order",
    ],
)
def test_a_clear_heading_is_left_alone(heading: str) -> None:
    assert faults(f"# Page\n\n## {heading}\n\nWords.") == []


@pytest.mark.parametrize(
    "sentence",
    [
        "The error says so.",
        "Each rank is told the sum.",
        "The page tells which.",
        "The model learns to write.",
        "All come to the same sum.",
        "It works as ever.",
        "Use one's own loop.",
        "Gradients are reduced likewise.",
        "Nobody knows which rows they are.",
        "By memory, for one.",
    ],
)
@pytest.mark.parametrize("place", ["{}", "- {}", "| a | {} |", "## {}", "**{}**"])
def test_a_banned_word_is_seen(place: str, sentence: str) -> None:
    assert len(banned(place.format(sentence))) == 1


@pytest.mark.parametrize(
    "sentence",
    ["The learning rate is `says`.", "On scikit-learn's digits.", "For one row, it comes first.", "Write `told`."],
)
def test_words_that_only_look_so_are_left_alone(sentence: str) -> None:
    assert banned(sentence) == []

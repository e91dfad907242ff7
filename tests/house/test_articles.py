"""Errors say "an AdamW" and "a list": the article comes from one function."""

import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "src" / "microbatch"
BY_HAND = re.compile(r"\b[Aa]n? \{(?:type\([^{}]*\)\.__name__|[\w.]*__(?:qual)?name__)\}")


def test_no_error_writes_the_article_of_a_class_by_hand() -> None:
    found = {
        file.relative_to(PACKAGE).as_posix(): words
        for file in sorted(PACKAGE.rglob("*.py"))
        if (words := BY_HAND.findall(file.read_text(encoding="utf-8")))
    }
    assert found == {}


@pytest.mark.parametrize("source", ['f"not a {type(x).__name__}"', 'f"An {type(a.b).__name__}"', 'f"a {cls.__name__}"'])
def test_one_by_hand_is_seen(source: str) -> None:
    assert BY_HAND.search(source)


@pytest.mark.parametrize("source", ['f"not {kind_of(x)}"', 'f"the {type(x).__name__}"', 'f"a {size} row"'])
def test_what_names_no_class_is_left_alone(source: str) -> None:
    assert not BY_HAND.search(source)

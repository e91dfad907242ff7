"""The doctor's pages are written from its rules, and every link among them leads somewhere."""

import re

from tests.house.doctor_pages import DOCS, FOLDER, OVERVIEW, pages

from microbatch.linting.rules.table import RULES


def test_the_pages_are_what_the_rules_say() -> None:
    written = pages()
    assert {
        path for path, text in written.items() if not path.exists() or path.read_text(encoding="utf-8") != text
    } == set(), "run python tests/house/doctor_pages.py"
    assert set(FOLDER.iterdir()) == written.keys() - {OVERVIEW}


def test_every_rule_is_in_the_overview() -> None:
    text = OVERVIEW.read_text(encoding="utf-8")
    assert re.findall(r"^\| \[(MB\d{3})\]", text, re.MULTILINE) == list(RULES)


def test_every_link_leads_to_a_heading() -> None:
    text = OVERVIEW.read_text(encoding="utf-8")
    headings = {line.lstrip("# ").lower().replace(" ", "-") for line in text.splitlines() if line.startswith("#")}
    links = [
        link for path in FOLDER.iterdir() for link in re.findall(r"\]\(([^)]+)\)", path.read_text(encoding="utf-8"))
    ]
    assert links
    assert {link for link in links if not (FOLDER / link.split("#")[0]).exists()} == set()
    assert {link.split("#")[1] for link in links if "#" in link} <= headings
    beside = re.findall(r"\]\(([^)#]+)[^)]*\)", text)
    assert {link for link in beside if not (DOCS / link).exists()} == set()

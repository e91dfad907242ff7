"""Texts name a page of the documentation by `page`, and a release gives its address on the site."""

import ast
import re
from collections.abc import Iterator
from email.message import Message
from importlib import metadata
from pathlib import Path

import pytest

from microbatch.linting import rewrite
from microbatch.pages import page

ROOT = Path(__file__).parents[2]
SOURCES = sorted(
    path for path in ROOT.glob("src/microbatch/**/*.py") if path.name != "pages.py" and "guide" not in path.parts
)
PATH = re.compile(r"\bdocs/[\w/-]+\.md\b")


def texts(source: str) -> Iterator[str]:
    """Yield the texts of source that are no docstrings, and so may be shown."""
    tree = ast.parse(source)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value


def named_by_path(source: str) -> set[str]:
    """Return the pages that a text of source names by their path."""
    return {match.group() for text in texts(source) for match in PATH.finditer(text)}


def asked_for(source: str) -> set[str]:
    """Return the names that source calls `page` with."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    names = [call.args[0] for call in calls if isinstance(call.func, ast.Name) and call.func.id == "page"]
    return {str(name.value) for name in names if isinstance(name, ast.Constant)}


def release(monkeypatch: pytest.MonkeyPatch, *links: str) -> None:
    """Replace the links in the package's metadata."""
    found = Message()
    for link in links:
        found["Project-URL"] = link
    monkeypatch.setattr(metadata, "metadata", lambda _name: found)


def test_no_text_names_a_page_by_its_path() -> None:
    assert {path.name: named for path in SOURCES if (named := named_by_path(path.read_text(encoding="utf-8")))} == {}


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ("raise E('see docs/a.md')", {"docs/a.md"}),
        ("raise E(f'{x} docs/b/c.md')", {"docs/b/c.md"}),
        ("def f():\n    '''See ``docs/a.md``.'''", set[str]()),
        ("f(page('a'))", set[str]()),
    ],
)
def test_a_path_in_a_text_is_seen(source: str, named: set[str]) -> None:
    assert named_by_path(source) == named


def test_every_page_that_is_named_exists() -> None:
    names = {name for path in SOURCES for name in asked_for(path.read_text(encoding="utf-8"))}
    names |= {name for _, name in rewrite._OWNERS.values()}
    docstrings = {match.group() for path in SOURCES for match in PATH.finditer(path.read_text(encoding="utf-8"))}
    assert names
    assert [path for path in {f"docs/{name}.md" for name in names} | docstrings if not (ROOT / path).is_file()] == []


def test_a_release_gives_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    release(monkeypatch, "Source, https://example.org/x", "Documentation, https://example.org/microbatch/")
    assert page("losses") == "https://example.org/microbatch/docs/losses.html"


@pytest.mark.parametrize("links", [(), ("Documentation, https://OWNER.github.io/microbatch/",)])
def test_a_clone_gives_the_file(monkeypatch: pytest.MonkeyPatch, links: tuple[str, ...]) -> None:
    release(monkeypatch, *links)
    assert page("losses") == "docs/losses.md"


def test_without_metadata_there_is_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Message:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "metadata", missing)
    assert page("losses") == "docs/losses.md"

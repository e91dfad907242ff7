"""The documentation as one site: every page is in the menu, every link leads somewhere, every public name is described.

`make docs` builds it and refuses warnings; this is what can be held in a second, without Sphinx.
"""

import ast
import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from posixpath import dirname, join, normpath
from typing import Any, cast

import pytest
from tests.house.test_readme import FENCE, FRAMEWORK_PAGES
from tests.house.test_readme import blocks as fenced
from typer.main import get_command

import microbatch as mb
from microbatch.cli.main import app

ROOT = Path(__file__).parents[2]
HOME = "docs/index.md"
TEXTS = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "benchmarks/README.md"]
TOCTREE = re.compile(r"^```\{toctree\}\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<!\!)\[(?:[^\[\]]|\[[^\]]*\])*\]\((?P<to>[^()\s]+)\)")
PICTURE = re.compile(r"!\[[^\]]*\]\((?P<to>[^()\s]+)\)")
HEADING = re.compile(r"^#+ +(?P<title>.+?) *$", re.MULTILINE)
Read = Callable[[str], str]


def read(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def pages() -> set[str]:
    """Return the paths of all pages of the site, without the README, which is the repository's own front page."""
    found = [*ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/results/*.md")]
    return {path.relative_to(ROOT).as_posix() for path in found} | set(TEXTS) - {"README.md"}


def entries(text: str) -> Iterator[str]:
    """Yield the entries of the toctrees of a page: names of pages, or patterns."""
    for tree in TOCTREE.finditer(text):
        for line in tree["body"].splitlines():
            if line and not line.startswith(":"):
                yield re.sub(r"^.*<(.+)>$", r"\1", line)


def in_the_menu(existing: Iterable[str], read: Read) -> set[str]:
    """Return the pages that can be reached from the home page by toctrees."""
    pages, reached, waiting = set(existing), {HOME}, [HOME]
    while waiting:
        page = waiting.pop()
        for entry in entries(read(page)):
            pattern = normpath(join(dirname(page), entry)) + ".md"
            found = {each for each in pages if fnmatchcase(each, pattern) and dirname(each) == dirname(pattern)}
            waiting += sorted(found - reached)
            reached |= found
    return reached


def anchors(text: str) -> set[str]:
    """Return the anchors that GitHub and the site give to the headings of a page."""
    plain = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    titles = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", match["title"]) for match in HEADING.finditer(plain)]
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def dead_links(page: str, text: str) -> list[str]:
    """Return the relative links and pictures of a page that lead to no file; the site has no page for a folder."""
    prose = FENCE.sub("", text)
    dead: list[str] = []
    for match in (*LINK.finditer(prose), *PICTURE.finditer(prose)):
        path, _, anchor = match["to"].partition("#")
        if ":" in path:  # an address, or of a scheme
            continue
        target = normpath(join(dirname(page), path)) if path else page
        is_page = target.endswith(".md") and (ROOT / target).is_file()
        exists = Path.exists if page == "README.md" else Path.is_file  # the README is read where folders have pages
        if not exists(ROOT / target) or (anchor and is_page and anchor not in anchors(read(target))):
            dead.append(match["to"])
    return dead


def described() -> set[str]:
    """Return the names that the pages of the reference describe."""
    found: set[str] = set()
    for path in sorted(ROOT.glob("docs/reference/*.md")):
        module = ""
        for directive, name in re.findall(r"^\.\. (\w+):: ([\w.]+)$", path.read_text(encoding="utf-8"), re.MULTILINE):
            if directive in {"currentmodule", "automodule"}:
                module = f"{name}."
            if directive.startswith("auto"):
                found.add(name if name.startswith("microbatch") else module + name)
    return found


def public_classes(file: Path) -> set[str]:
    """Return the public classes and functions that a file defines."""
    body = ast.parse(file.read_text(encoding="utf-8")).body
    return {each.name for each in body if isinstance(each, ast.ClassDef | ast.FunctionDef) and each.name[0] != "_"}


def test_every_page_is_in_the_menu() -> None:
    assert pages() - in_the_menu(pages(), read) == set()


def test_a_page_outside_the_menu_is_seen() -> None:
    texts = {
        HOME: "```{toctree}\n:caption: One\n:glob:\n\nTitle <one>\nmore/*\n```\n\nthree\n",
        "docs/one.md": "",
        "docs/more/two.md": "",
        "docs/more/deep/four.md": "",
        "docs/three.md": "",
    }
    assert set(texts) - in_the_menu(texts, texts.__getitem__) == {"docs/three.md", "docs/more/deep/four.md"}


@pytest.mark.parametrize("page", sorted(pages() | {"README.md"}))
def test_every_relative_link_leads_somewhere(page: str) -> None:
    assert dead_links(page, read(page)) == []


@pytest.mark.parametrize(
    ("link", "is_dead"),
    [
        ("[a](plan.md)", False),
        ("[a](plans.md)", True),
        ("[`a[0]`](../docs/plan.md#nothing-here)", True),
        ("[a](losses.md#models-that-compute-their-loss)", False),
        ("[a](https://example.org/nothing)", False),
        ("![a](guide.png)", False),
        ("![a](guides.png)", True),
        ("[a](../benchmarks/results/)", True),
        ("```python\nx = y[0](missing)\n```\n", False),
    ],
)
def test_a_dead_link_is_seen(link: str, *, is_dead: bool) -> None:
    assert bool(dead_links("docs/words.md", link)) is is_dead


def test_every_public_name_is_in_the_reference() -> None:
    names = {f"microbatch.{name}" for name in mb.__all__ if name != "losses"}
    names |= {f"microbatch.losses.{name}" for name in mb.losses.__all__}
    names |= {"microbatch.errors", "microbatch.errors.OutOfMemoryError"}
    names -= {"microbatch.MicrobatchError"}  # among the errors
    for page in FRAMEWORK_PAGES:
        file = ROOT / "src/microbatch/integrations" / f"{page.removesuffix('.md').replace('-', '_')}.py"
        if file.is_file():
            names |= {f"microbatch.integrations.{file.stem}.{name}" for name in public_classes(file)}
    assert names - described() == set()


def shown(name: str, value: object) -> bool:
    """Return whether a public name has an example: in its docstring, or in the blocks of a page, all of which run."""
    if ">>>" in (inspect.getdoc(value) or ""):
        return True
    texts = [code for page in pages() for language, code, _ in fenced(read(page)) if language == "python"]
    return any(re.search(rf"\bmb\.{re.escape(name)}\b", code) for code in texts)


def test_every_public_name_has_an_example() -> None:
    names = {name: getattr(mb, name) for name in mb.__all__ if name != "losses"}
    names |= {f"losses.{name}": getattr(mb.losses, name) for name in mb.losses.__all__}
    signatures = [str(inspect.signature(each)) for each in names.values() if inspect.isfunction(each)]
    returned = {word for each in signatures for word in re.findall(r"\w+", each.rpartition("->")[-1])}
    returned |= {"Step", "Hyperparameters"}  # of Accumulator.step, and the fields of a Scaling
    bare = {name for name, value in names.items() if name not in returned and not shown(name, value)}
    assert bare - {"MicrobatchError", "MicrobatchWarning"} == set()


def test_a_name_without_an_example_is_seen() -> None:
    assert not shown("no_such_name", object.__init__)


def test_the_reference_describes_nothing_else() -> None:
    modules = {name for name in described() if not name.startswith(("microbatch.errors", "microbatch.integrations"))}
    assert modules <= {f"microbatch.{name}" for name in mb.__all__} | {
        f"microbatch.losses.{name}" for name in mb.losses.__all__
    }


def test_every_command_is_in_the_reference() -> None:
    commands = re.findall(r"^```\{command-help\} (\w+)$", read("docs/reference/command-line.md"), re.MULTILINE)
    assert sorted(commands) == sorted(cast("Any", get_command(app)).commands)

"""What is published says the same everywhere: versions, lower bounds, links, and what the wheel leaves out."""

import ast
import re
import runpy
import sys
import tomllib
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import pytest

import microbatch as mb

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
LEFT_OUT = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["exclude"]


def read(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


@pytest.fixture
def absolute(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], str]:
    """The function that makes links absolute, from a file that only the build, with hatchling, runs."""
    for name in ("hatchling", "hatchling.metadata", "hatchling.metadata.plugin", "hatchling.metadata.plugin.interface"):
        module = cast("Any", ModuleType(name))
        module.MetadataHookInterface = object
        monkeypatch.setitem(sys.modules, name, module)
    return runpy.run_path(str(ROOT / "hatch_build.py"))["absolute"]


def relative_links(text: str) -> list[str]:
    return re.findall(r"\]\((?!https?://|#)([^()\s]+)\)", text)


def test_the_readme_on_the_index_has_no_relative_link(absolute: Callable[[str, str], str]) -> None:
    assert relative_links(read("README.md"))
    assert relative_links(absolute(read("README.md"), "https://example.org/it")) == []


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("[a](docs/a.md#b)", "[a](X/blob/main/docs/a.md#b)"),
        ("![a](docs/a.png)", "![a](X/raw/main/docs/a.png)"),
        ("[a](https://example.org), [b](#b)", "[a](https://example.org), [b](#b)"),
        ("[`a`](b) and [c](d)", "[`a`](X/blob/main/b) and [c](X/blob/main/d)"),
    ],
)
def test_a_link_becomes_absolute(before: str, after: str, absolute: Callable[[str, str], str]) -> None:
    assert absolute(before, "X") == after


def imported(file: Path) -> Iterator[str]:
    """Yield the modules that a file imports, and the names that it imports from them."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (each.name for each in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{each.name}" for each in node.names)


def test_nothing_that_is_published_needs_what_the_wheel_leaves_out() -> None:
    assert [path for path in LEFT_OUT if not (ROOT / path).is_file()] == []
    gone = {path.removeprefix("src/").removesuffix(".py").replace("/", ".") for path in LEFT_OUT}
    needed = {
        (file.name, name)
        for file in (ROOT / "src").rglob("*.py")
        if file.relative_to(ROOT).as_posix() not in LEFT_OUT
        for name in imported(file)
        if any(name == each or name.startswith(f"{each}.") for each in gone)
    }
    assert needed == set()


def test_the_version_is_the_same_everywhere() -> None:
    found = {
        "pyproject.toml": PROJECT["project"]["version"],
        "CITATION.cff": re.findall(r"^version: (.+)$", read("CITATION.cff"), re.MULTILINE)[0],
        "conda/recipe.yaml": re.findall(r'^  version: "(.+)"$', read("conda/recipe.yaml"), re.MULTILINE)[0],
    }
    assert set(found.values()) == {mb.__version__}, found


def test_the_conda_recipe_needs_what_the_wheel_needs() -> None:
    recipe = read("conda/recipe.yaml").partition("  run:\n")[2].partition("\n\n")[0]
    needs = {line.strip("- ").replace(" ", "").replace("pytorch", "torch") for line in recipe.splitlines()}
    assert needs == {*PROJECT["project"]["dependencies"], f"python{PROJECT['project']['requires-python']}"}


def test_the_tests_run_on_every_python_that_is_named_and_on_the_oldest_torch() -> None:
    named = {match[1] for each in PROJECT["project"]["classifiers"] if (match := re.search(r":: (3\.\d+)$", each))}
    workflow = read(".github/workflows/tests.yml")
    versions = re.findall(r"python: \[(.+)\]", workflow)
    assert set(re.findall(r"3\.\d+", versions[0])) == named
    (oldest,) = (each for each in PROJECT["project"]["dependencies"] if each.startswith("torch>"))
    assert f"'{oldest.replace('>=', '==')}.*'" in workflow


def test_pre_commit_runs_the_ruff_that_lint_runs() -> None:
    pinned = re.findall(r"^ruff==(.+)$", read("constraints-dev.txt"), re.MULTILINE)
    assert re.findall(r"ruff-pre-commit\n +rev: v(\S+)", read(".pre-commit-config.yaml")) == pinned


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_what_a_workflow_runs_exists(workflow: Path) -> None:
    text = workflow.read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", read("Makefile"), re.MULTILINE))
    assert set(re.findall(r"run: make (\S+)", text)) <= targets
    paths = set(re.findall(r"(?<![\w/])(?:tests|docs|\.ci)/[\w./-]+", text))
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []


def test_the_source_distribution_has_what_builds_it() -> None:
    kept = PROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    for path in ("hatch_build.py", "README.md", "CHANGELOG.md", "CITATION.cff", "SECURITY.md", "src", "tests"):
        assert any(fnmatchcase(path, each) for each in kept), path
        assert (ROOT / path).exists()


def addresses_to_fill(text: str) -> bool:
    return re.search(r"github\.com/OWNER|OWNER\.github\.io|OWNER@", text) is not None


def test_every_address_that_names_the_owner_is_filled_in() -> None:
    filled = set(re.findall(r"[\w./-]+\.(?:toml|cff|yaml|md)", read(".ci/owner")))
    places = [*ROOT.glob("*.*"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("conda/*"), *ROOT.glob("examples/*.py")]
    files = {path.relative_to(ROOT).as_posix(): path for path in places if path.is_file()}
    named = {name for name, path in files.items() if addresses_to_fill(path.read_text("utf-8", errors="ignore"))}
    assert named == filled


@pytest.mark.parametrize("workflow", ["docs", "release"])
def test_what_is_published_has_its_addresses(workflow: str) -> None:
    text = read(f".github/workflows/{workflow}.yml")
    build = "make package" if workflow == "release" else "make docs"
    assert 0 < text.index('.ci/owner "$OWNER"') < text.index(build)

"""Files that can be read in one sitting, and a window that stays small: features are parts, not branches of it."""

import ast
import inspect
import statistics
from pathlib import Path

import pytest

from microbatch.step.accumulator import Accumulator

PACKAGE = Path(__file__).parents[2] / "src" / "microbatch"
LARGEST, MEDIAN, OPTIONS = 400, 160, 18
WINDOW = {"lines": 300, "attributes": 30, "tests for None": 15}


def lengths() -> dict[str, int]:
    return {
        path.relative_to(PACKAGE).as_posix(): len(path.read_text(encoding="utf-8").splitlines())
        for path in sorted(PACKAGE.rglob("*.py"))
    }


def attributes(source: str) -> set[str]:
    """Return the attributes that the classes of a file set on themselves."""
    return {
        node.attr
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    }


def none_tests(source: str) -> int:
    """Count ``is None`` and ``is not None``."""
    return sum(
        isinstance(node, ast.Compare)
        and any(isinstance(each, ast.Constant) and each.value is None for each in node.comparators)
        and all(isinstance(each, ast.Is | ast.IsNot) for each in node.ops)
        for node in ast.walk(ast.parse(source))
    )


def test_no_file_is_longer_than_one_sitting() -> None:
    assert {path: lines for path, lines in lengths().items() if lines > LARGEST} == {}
    assert statistics.median(lengths().values()) <= MEDIAN


def test_the_window_stays_small() -> None:
    source = (PACKAGE / "step" / "window.py").read_text(encoding="utf-8")
    found = {
        "lines": len(source.splitlines()),
        "attributes": len(attributes(source)),
        "tests for None": none_tests(source),
    }
    assert {name: number for name, number in found.items() if number > WINDOW[name]} == {}


@pytest.mark.parametrize(("source", "number"), [("self.a = self.b, c.d = 1, 2\nself.a += 1", 2), ("x = self.y", 0)])
def test_attributes_are_counted(source: str, number: int) -> None:
    assert len(attributes(source)) == number


@pytest.mark.parametrize(("source", "number"), [("a is None or b is not None", 2), ("a == 1", 0)])
def test_none_tests_are_counted(source: str, number: int) -> None:
    assert none_tests(source) == number


def test_an_accumulator_has_few_options() -> None:
    asked = inspect.signature(Accumulator).parameters.values()
    assert sum(each.kind is each.KEYWORD_ONLY for each in asked) <= OPTIONS, "group it with the options it goes with"

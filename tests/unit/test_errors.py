"""The tree that is drawn in the docstring of the errors is the tree that the classes make."""

import inspect
import re
from typing import Any

import pytest
import torch

import microbatch.errors as errors_module
from microbatch.errors import MicrobatchError, NonfiniteError, OutOfMemoryError

LINE = re.compile(r"^(?P<indent>(?:│   |    )*)(?:[├└]── )?(?P<name>\w+Error) *(?:\((?P<base>[\w.]+)\))?")


def drawn(docstring: str) -> dict[str, tuple[str | None, str | None]]:
    """Read a tree: name -> (name above it, the base in brackets)."""
    tree: dict[str, tuple[str | None, str | None]] = {}
    above: list[str] = []
    for line in docstring.splitlines():
        text = line.removeprefix("    ")
        match = LINE.match(text)
        if match is None:
            continue
        depth = len(match["indent"]) // 4 + bool(re.match(r"[│ ]*[├└]", text))
        above = [*above[:depth], match["name"]]
        tree[match["name"]] = (above[depth - 1] if depth else None, match["base"])
    return tree


def real() -> dict[str, type[Any]]:
    classes = vars(errors_module).values()
    return {c.__name__: c for c in classes if inspect.isclass(c) and c.__module__ == errors_module.__name__}


TREE = drawn(errors_module.__doc__ or "")


def test_every_error_is_drawn_and_every_drawn_one_exists() -> None:
    assert set(TREE) == set(real())
    assert len(TREE) > 15


@pytest.mark.parametrize("name", sorted(set(TREE) - {"MicrobatchError"}))
def test_an_error_stands_under_its_base(name: str) -> None:
    above, base = TREE[name]
    bases: list[type[Any]] = [real()[above]] if above else []
    if base is not None:
        namespace = {"torch": torch}
        bases.append(eval(base, namespace))  # noqa: S307 - the base's name as the docstring writes it
    assert real()[name].__bases__ == tuple(bases)


def test_every_error_can_be_caught_as_one_of_ours() -> None:
    assert TREE["MicrobatchError"] == (None, None)
    assert all(issubclass(error, MicrobatchError) for error in real().values())


def test_the_reader_of_trees_sees_depth() -> None:
    lines = ["::", "", "AError", "├── BError   (ValueError)  why", "│   └── CError   why", "└── DError  (x.YError) why"]
    text = "\n".join(f"    {line}" for line in lines)
    assert drawn(text) == {
        "AError": (None, None),
        "BError": ("AError", "ValueError"),
        "CError": ("BError", None),
        "DError": ("AError", "x.YError"),
    }


def test_each_says_what_it_is() -> None:
    assert [name for name, error in real().items() if not (error.__doc__ or "").strip()] == []


def test_running_out_of_a_budget_is_running_out_of_memory() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        raise OutOfMemoryError("the budget was passed")


@pytest.mark.parametrize(
    ("microbatch", "parameter", "words"),
    [
        (None, None, ["the loss", "a microbatch"]),
        (3, None, ["the loss", "microbatch 3"]),
        (0, "head.weight", ["gradient of 'head.weight'", "microbatch 0"]),
    ],
)
def test_a_nonfinite_error_names_microbatch_and_parameter(
    microbatch: int | None, parameter: str | None, words: list[str]
) -> None:
    error = NonfiniteError(microbatch=microbatch, parameter=parameter)
    assert (error.microbatch, error.parameter) == (microbatch, parameter)
    assert [word for word in [*words, 'nonfinite="skip"'] if word not in str(error)] == []

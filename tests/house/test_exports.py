"""The public names are a contract: exactly these, each documented, each with two positional arguments at most."""

import importlib.metadata
import inspect
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest

import microbatch as mb

PUBLIC = {
    "Accumulator",
    "Batches",
    "Division",
    "Finding",
    "Hyperparameters",
    "BudgetPassed",
    "Cause",
    "Check",
    "DeepSpeed",
    "Job",
    "LearningRate",
    "Lengths",
    "LinearState",
    "Loss",
    "MemoryMeter",
    "MicrobatchDone",
    "MicrobatchError",
    "MicrobatchWarning",
    "NoiseScale",
    "Pipeline",
    "Plan",
    "PlanChosen",
    "Ranks",
    "Retry",
    "Rows",
    "Scaling",
    "SizeChanged",
    "Spill",
    "Step",
    "StepDone",
    "Sums",
    "Sweep",
    "SyncChosen",
    "Whole",
    "Window",
    "batch_gather",
    "batch_mean",
    "batch_sum",
    "check",
    "checkpointed",
    "convert_batch_norm",
    "cut",
    "divide_batch",
    "doctor",
    "keep_heap",
    "find_learning_rate",
    "linear_cross_entropy",
    "losses",
    "plan",
    "scale_hyperparameters",
    "sweep",
}


def test_the_public_names_are_exactly_these() -> None:
    assert sorted(mb.__all__) == sorted(PUBLIC)


def test_a_star_import_brings_exactly_these() -> None:
    namespace: dict[str, Any] = {}
    exec("from microbatch import *", namespace)  # noqa: S102 - an import of this kind cannot stand in a function
    assert set(namespace) - {"__builtins__"} == PUBLIC


def test_a_name_that_does_not_exist_is_refused_as_python_does() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Acumulator'"):
        mb.Acumulator  # noqa: B018


def test_the_version_is_the_installed_one() -> None:
    assert mb.__version__ == importlib.metadata.version("microbatch")


def callables() -> Iterator[tuple[str, Callable[..., Any]]]:
    """Yield every public function, class and public method, by name; an exception takes its message, as all do."""
    for name in sorted(PUBLIC):
        value = getattr(mb, name)
        if isinstance(value, type) and issubclass(value, Exception):
            continue
        if isinstance(value, ModuleType):
            yield from ((f"{name}.{member}", getattr(value, member)) for member in value.__all__)
            continue
        yield name, value
        if isinstance(value, type):
            for member, method in vars(value).items():
                if inspect.isfunction(method) and not member.startswith("_"):
                    yield f"{name}.{member}", method


CALLABLES = [pytest.param(value, id=name) for name, value in callables()]


@pytest.mark.parametrize("value", CALLABLES)
def test_everything_public_is_documented(value: Callable[..., Any]) -> None:
    text = value.__doc__ or ""
    # The generated docstring of a dataclass, its signature, says nothing.
    assert text.strip()
    assert not text.startswith(f"{value.__name__}(")


def positional(value: Callable[..., Any]) -> list[str]:
    """Return the arguments that can be given by position, without `self`."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(value).parameters.values()
    return [each.name for each in parameters if each.kind in kinds and each.name != "self"]


@pytest.mark.parametrize("value", CALLABLES)
def test_everything_after_the_second_argument_is_keyword_only(value: Callable[..., Any]) -> None:
    # The loss head's three tensors come in the order of torch's own functions: input, weight, labels. What is checked
    # comes in the order of a step's own arguments: model, loss function, batch.
    assert len(positional(value)) <= (3 if value in {mb.linear_cross_entropy, mb.check} else 2)


def test_a_third_positional_argument_would_be_seen() -> None:
    def too_many(first: int, second: int, third: int) -> None: ...

    assert positional(too_many) == ["first", "second", "third"]

"""The declared shape of every document in a checkpoint: what has no such shape is damaged, whatever its hash says."""

from __future__ import annotations

import json
import math
import random
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypeAlias

import torch
from pydantic import AfterValidator, BeforeValidator, Field, TypeAdapter, ValidationError
from torch import Tensor
from typing_extensions import TypedDict

from microbatch.errors import CheckpointError

_Count = Annotated[int, Field(ge=0, strict=True)]
_Real: TypeAlias = Annotated[float, Field(strict=True)]
_Text = Annotated[str, Field(strict=True)]
_Sha256 = Annotated[str, Field(strict=True, pattern=r"^[0-9a-f]{64}$")]
_FileName = Annotated[str, Field(strict=True, pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}$")]


def _python_state(value: Any) -> Any:
    random.Random().setstate(value)  # noqa: S311 -- to see whether it is a state
    return value


def _torch_state(value: Any) -> Any:
    torch.Generator().set_state(value)
    return value


def _numpy_state(value: Any) -> Any:
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.RandomState(0).set_state(value)
    return value


def _tensor(value: Any) -> Any:
    if not isinstance(value, Tensor):
        raise TypeError("it is not a tensor")
    return value


_NUMBER: Any = (int, float, Tensor)  # a capturable optimizer has tensors for numbers
_ROW: Any = (list, tuple)
_KINDS: tuple[Any, ...] = (bool, _NUMBER, str, _ROW, Mapping)


class _File(TypedDict):
    bytes: _Count
    sha256: _Sha256


class Manifest(TypedDict):
    """Declare ``manifest.json``."""

    format: _Count
    step: _Count
    torch: _Text
    files: dict[_FileName, _File]
    seal: NotRequired[_Sha256]


class _Document(TypedDict):
    tied: dict[_Text, _Text]
    state: dict[_Text, Any]


class _Part(TypedDict):
    name: _Text
    shape: list[_Count]
    offsets: list[_Count]


class _Run(TypedDict):
    seed: Annotated[int, Field(strict=True)]
    batch_size: _Count
    samples: _Count


class _Position(TypedDict):
    epoch: _Count
    start: _Count


def _device_states(states: Any) -> Any:
    """Check the states of accelerators' generators, which are under the names of their types."""
    if isinstance(states, dict):
        for name in states.keys() - {"python", "torch", "numpy"}:
            _tensor(states[name])
    return states


class _Random(TypedDict):
    python: Annotated[Any, AfterValidator(_python_state)]
    torch: Annotated[Any, AfterValidator(_torch_state)]
    numpy: NotRequired[Annotated[Any, AfterValidator(_numpy_state)]]


class _Own(TypedDict):
    extra: dict[_Text, Any]
    optimizers: list[dict[Any, Any]]
    schedulers: list[dict[Any, Any]]


class _Best(TypedDict):
    score: str
    value: _Real | None
    step: _Count
    waited: _Count


class _Progress(TypedDict):
    run: _Run
    position: _Position
    seconds: Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
    peak_bytes: _Count | None
    loss: _Real | None
    validation: dict[_Text, _Real]
    best: NotRequired[_Best]
    data: NotRequired[dict[Any, Any]]
    scaler: dict[_Text, Any] | None
    accumulator: dict[_Text, Any]
    random: Annotated[_Random, BeforeValidator(_device_states)]


class _Whole(_Progress, _Own):
    """The state of a run whose ranks have the whole model."""


class _Stages(_Progress):
    """The state of a run whose ranks have stages of a model."""

    stages: dict[_Text, _Own]


_DOCUMENT, _WHOLE, _STAGES, MANIFEST_SHAPE, _PARTS = (
    TypeAdapter[Any](each).validate_python for each in (_Document, _Whole, _Stages, Manifest, dict[_Text, _Part])
)


def read_document(file: Path) -> dict[str, Any]:
    """Read ``state.json``.

    Args:
        file: The file.

    Returns:
        ``"tied"``, names of tensors, and ``"state"``, which is not decoded yet.

    Raises:
        CheckpointError: It is not JSON, or has another shape.
    """
    return check_shape(read_json(file), _DOCUMENT, name=file.name)


def read_parts(text: str, *, name: str) -> dict[str, Any]:
    """Read which tensors of a file are parts, of what, and where they belong.

    Args:
        text: JSON from the file's metadata.
        name: The file.

    Returns:
        ``"name"``, ``"shape"`` and ``"offsets"`` of each part.

    Raises:
        CheckpointError: It is not JSON, or has another shape.
    """
    return check_shape(_parsed(text, name=name), _PARTS, name=name)


def check_run_state(state: Mapping[str, Any]) -> None:
    """Check the decoded state of a run.

    Args:
        state: As `microbatch.train.run_state.RunState.capture` makes it.

    Raises:
        CheckpointError: A value is missing, or is of another kind or range.
    """
    check_shape(dict(state), _STAGES if "stages" in state else _WHOLE, name="state.json")


def check_shape(document: Any, shape: Callable[[Any], Any], *, name: str) -> Any:
    """Check that a document has a shape.

    Args:
        document: Plain values.
        shape: Validates it.
        name: The file that it is from.

    Returns:
        The document.

    Raises:
        CheckpointError: It has another shape; the error says where.
    """
    try:
        shape(document)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = ".".join(map(str, first["loc"])) or "the whole of it"
        why = f"{name} is malformed at {place!a}: {first['msg']}"
    except (RuntimeError, TypeError, LookupError, OverflowError, ArithmeticError) as error:
        why = f"{name} is malformed: {error!a}"
    else:
        return document
    raise CheckpointError(why)


def read_json(file: Path) -> Any:
    """Read a file of strict JSON.

    Args:
        file: The file.

    Returns:
        Plain values; every number is finite.

    Raises:
        CheckpointError: It cannot be read, or is not strict JSON.
    """
    try:
        return _parsed(file.read_text(encoding="utf-8"), name=file.name)
    except OSError as error:
        raise CheckpointError(f"{file.name} cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{file.name} is not text ({error})") from error


def _parsed(text: str, *, name: str) -> Any:
    try:
        return json.loads(text, parse_float=_finite, parse_constant=_finite)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{name} is not a document of ours ({error!a})") from error


def check_like(saved: Any, live: Any, *, place: str) -> None:
    """Check that a saved value is of the kind of the value that it replaces.

    Entries that only one of both has are left alone: another version of PyTorch has more of them, or fewer.

    Args:
        saved: From a checkpoint.
        live: What the job's own object holds now, under the same name.
        place: Name of the value.

    Raises:
        CheckpointError: A value is of another kind, for example a text where a number was.
    """
    kind = next((each for each in _KINDS if isinstance(live, each)), object)
    fits = isinstance(saved, kind) and (kind is not _NUMBER or not isinstance(saved, bool))
    if not fits and not (saved is None and kind is not _NUMBER):
        found = f"{type(saved).__name__} in place of {type(live).__name__}"
        raise CheckpointError(f"state.json is malformed at {place!a}: {found}")
    if saved is None:
        return
    there: Any = saved
    here: Any = live
    if kind is Mapping:
        for key in set(here) & set(there):
            check_like(there[key], here[key], place=f"{place}.{key}")
    elif kind is _ROW:
        for index, (mine, value) in enumerate(zip(there, here, strict=False)):
            check_like(mine, value, place=f"{place}.{index}")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text} is not finite")
    return value

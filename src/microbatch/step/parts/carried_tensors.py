"""Warn about tensors that a microbatch leaves in plain attributes of the model for the next microbatch."""

from __future__ import annotations

import weakref
from collections.abc import Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from microbatch.step.part import OpenWindow, Part, Pass, Run
from microbatch.step.parts.compilation import has_compiled
from microbatch.step.record import Step

_NAMED = 4  # attributes that a warning names
_LONGEST = 64  # containers with more values are not searched
_TORCHS = frozenset(vars(nn.Module()))  # attributes that every module has, parameters and buffers among them
_OVERWRITES = frozenset({"zero_", "fill_", "copy_", "set_", "__setitem__"})

# A tensor and its version, by the path of the attribute. A strong reference would keep activations alive.
_Held = list[tuple[str, "weakref.ref[Tensor]", int]]


class CarriedTensors(Part):
    """Warn if the loss of a microbatch depends on a tensor that the microbatch before has left in the model.

    Examples are a recurrent state, a queue of old features or a running mean in a plain attribute. Buffers have a watch
    of their own. Three things must come together: the first microbatch changes an attribute, the second microbatch's
    loss is computed from it, and the second microbatch changes it again. So a table that is computed once is left
    alone, as is a value that is only written, or only added to for a report.

    Cost:
        In the first windows three searches of the modules' attributes. If the first microbatch has changed one, about
        two microseconds for each function of torch in the second microbatch.

    Source:
        Law S5.
    """

    first_windows = 2

    def __init__(self) -> None:
        self._before: _Held = []
        self._flow: _Flow | None = None
        self._reached = False

    def around(self, window: OpenWindow, p: Pass) -> AbstractContextManager[object] | None:
        """Watch the first two microbatches."""
        if p.index > 1 or p.again or p.filler or window.keeps_graphs or has_compiled(window):
            return None
        return self._first(window) if p.index == 0 else self._second(window)

    def backward(self, window: OpenWindow, run: Run) -> Run:
        """Notice a loss that was computed from a tensor of the microbatch before."""
        return partial(self._run, run)

    def done(self, window: OpenWindow, step: Step) -> None:
        """Forget what the first microbatch has left."""
        self._before = []

    @contextmanager
    def _first(self, window: OpenWindow) -> Generator[None]:
        before = _held_by(window.model)
        yield
        self._before = [each for each in _held_by(window.model) if not _is_in(each, before)]

    @contextmanager
    def _second(self, window: OpenWindow) -> Generator[None]:
        before, self._before, self._reached = self._before, [], False
        if not before:
            yield
            return
        self._flow = _Flow([tensor for _, ref, _ in before if (tensor := ref()) is not None])
        try:
            with self._flow:
                yield
        finally:
            self._flow = None
        if self._reached:
            after = _held_by(window.model)
            self._warn(window, sorted({each[0] for each in before if not _is_in(each, after)}))

    def _warn(self, window: OpenWindow, names: Sequence[str]) -> None:
        if names:
            more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
            window.setup.warn(
                "carried",
                "each microbatch reads a tensor that the microbatch before has left in the model: "
                f"{', '.join(names[:_NAMED])}{more}. So the loss depends on the microbatch size. Reset it at the start "
                "of forward, or pass each row's state in the batch. If it is a statistic, use register_buffer: "
                'buffers= then moves it once a window. If it is meant, call warnings.filterwarnings("ignore", '
                "category=mb.MicrobatchWarning)",
            )

    def _run(self, run: Run, tensors: Sequence[Any], seeds: Sequence[Tensor]) -> object:
        flow = self._flow
        self._reached = self._reached or (flow is not None and any(map(flow.reaches, tensors)))
        return run(tensors, seeds)


class _Flow(TorchFunctionMode):
    """Follow tensors through the functions of torch that are called in Python."""

    def __init__(self, sources: Sequence[Tensor]) -> None:
        super().__init__()
        self._reached = WeakIdKeyDictionary()
        for each in sources:
            self._reached[each] = None

    def reaches(self, tensor: object) -> bool:
        """Return whether a tensor was computed from one of the sources."""
        return isinstance(tensor, Tensor) and tensor in self._reached

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function, and mark its results if it was given a marked tensor."""
        kwargs = kwargs or {}
        overwrites = getattr(func, "__name__", "") in _OVERWRITES
        given = any(map(self.reaches, _tensors([*args[overwrites:], *(v for k, v in kwargs.items() if k != "out")])))
        found = func(*args, **kwargs)
        for each in _tensors([args[0] if overwrites else found]):
            if given:
                self._reached[each] = None
            elif overwrites or "out" in kwargs:
                self._reached.pop(each, None)
        return found


def _held_by(model: nn.Module) -> _Held:
    """List the tensors in plain attributes of a model's modules."""
    return [
        (f"{path}.{name}" if path else name, weakref.ref(each), 0 if each.is_inference() else each._version)
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if name not in _TORCHS
        for each in _tensors([value])
    ]


def _is_in(each: tuple[str, weakref.ref[Tensor], int], held: _Held) -> bool:
    name, ref, version = each
    return any(name == other and ref() is place() and version == at for other, place, at in held)


def _tensors(values: Sequence[Any]) -> Iterator[Tensor]:
    """Yield the tensors among values, and in lists, tuples and dicts among them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif type(value) in {list, tuple, dict} and len(value) <= _LONGEST:  # no methods of the user's run here
            inner = list(value.values()) if isinstance(value, dict) else value
            if inner:
                yield from _tensors(inner)

"""Copies of random state, buffers and modes, to restore when a window does not end in a step."""

from __future__ import annotations

import ctypes
import random
import struct
import sys
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from operator import methodcaller
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from microbatch.devices.backend import random_state, set_random_state
from microbatch.gradients.parameters import Frozen
from microbatch.shards import PLAIN

_TWISTER = 4 * 624 + 4  # bytes of a Mersenne twister: its words, and its place in them
_HEAD = object.__basicsize__  # bytes of a Python object before what its type adds
_C: Any = getattr(torch, "_C")  # noqa: B009 - private, and without types


_STORAGE, _ADDRESS = methodcaller("untyped_storage"), methodcaller("data_ptr")


class Memory:
    """Keep the memory of tensors' values, to see whether an assignment to ``.data`` replaces it.

    Memory that is freed may be given to the next tensor, at the same address. Memory that is kept is not.

    Args:
        tensors: Strided tensors.
    """

    __slots__ = ("_addresses", "_kept", "_tensors")

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors, self._kept = tensors, list(map(_STORAGE, tensors))
        self._addresses = list(map(_ADDRESS, tensors))

    @property
    def replaced(self) -> set[int]:
        """The ids of the tensors whose values lie elsewhere now."""
        now = list(map(_ADDRESS, self._tensors))
        if now == self._addresses:
            return set()
        trios = zip(self._tensors, now, self._addresses, strict=True)
        return {id(tensor) for tensor, address, before in trios if address != before}


NO_MEMORY = Memory(())


@dataclass(frozen=True, slots=True)
class Buffer:
    """A buffer, or a parameter without ``requires_grad``, at the start of a window.

    Attributes:
        module: The module that holds it.
        name: Its name there.
        tensor: The tensor.
        copy: Its values at the start.
        version: Its version counter at the start.
        memory: A parameter's memory at the start; `None` for a buffer.
    """

    module: nn.Module
    name: str
    tensor: Tensor
    copy: Tensor
    version: int
    memory: Memory | None = None

    def now(self) -> Tensor:
        """Return the module's present tensor of this name."""
        return getattr(self.module, self.name)

    @property
    def moved(self) -> bool:
        """Whether it was written to, or replaced by another tensor."""
        written = self.now() is not self.tensor or self.tensor._version != self.version
        return written or (self.memory is not None and bool(self.memory.replaced))

    @property
    def same(self) -> bool:
        """Whether its values are those of the start, bit by bit or NaN in both; waits for the device."""
        if type(self.tensor) not in PLAIN or self.tensor.layout is not torch.strided:
            return True  # comparing them might communicate, or is not possible
        if self.tensor.is_quantized or self.tensor.is_meta:
            return True
        if self.tensor.shape != self.copy.shape:
            return False
        copy = self.copy.to(self.tensor.device)
        equal = self.tensor == copy
        nan = (self.tensor != self.tensor) & (copy != copy)  # noqa: PLR0124 - NaN differs from itself
        return bool((equal | nan).all())


class Unscaled:
    """Set aside which optimizers a scaler has unscaled, so that it can unscale the window's gradients.

    A scaler refuses to unscale an optimizer's gradients twice between two updates. The window sets earlier gradients
    aside; this class sets aside the scaler's record of them.

    Args:
        scaler: The scaler; `None` for none.
        optimizers: The window's optimizers.
    """

    def __init__(self, scaler: torch.amp.GradScaler | None, optimizers: Iterable[Optimizer]) -> None:
        # Private by name; without it nothing is set aside.
        self._stages: dict[int, Any] = getattr(scaler, "_per_optimizer_states", {})
        self._keys = [id(optimizer) for optimizer in optimizers]
        self._before = dict[int, Any]()

    def set_aside(self) -> None:
        """Set the scaler's record aside."""
        self._before = {key: self._stages[key] for key in self._keys if key in self._stages}
        for key in self._before:
            del self._stages[key]

    def restore(self) -> None:
        """Restore the scaler's record of the earlier gradients."""
        for key in self._keys:
            self._stages.pop(key, None)
        self._stages.update(self._before)


class Snapshot:
    """Copy the current random state and the model's buffers.

    The generators are torch's on the CPU and on ``device``, Python's ``random``, and NumPy's global one if NumPy is
    imported. Buffers are always copied: a version counter would miss writes through ``.data``.

    Args:
        model: The module whose buffers forward passes may change.
        device: The device where the model computes.

    Attributes:
        modules: Every module of the model.
        buffers: Every buffer of the model, and the parameters of `keep`.

    Cost:
        A copy of the buffers and a few kilobytes; no host synchronisation.

    Source:
        Laws B4, M1.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._random, self._device, self._model = RandomState(device), device, model
        self.modules = _modules_of(model)
        self.buffers = [
            Buffer(module, name, tensor, tensor.detach().clone(), tensor._version)
            for module in self.modules
            if module._buffers  # pyright: ignore[reportPrivateUsage] - most have none, and the call takes longer
            for name, tensor in module.named_buffers(recurse=False)
        ]

    def keep(self, frozen: Iterable[Frozen], *, on_host: bool = False) -> None:
        """Copy parameters that forward passes may move, and restore them together with the buffers.

        Args:
            frozen: The parameters, which have no gradient.
            on_host: Whether the copies take memory of the host, instead of the device.
        """
        for each in frozen:
            tensor = each.parameter.detach()
            copy = tensor.to("cpu", copy=True) if on_host else tensor.clone()
            version, memory = each.parameter._version, Memory([each.parameter])
            self.buffers.append(Buffer(each.module, each.name, each.parameter, copy, version, memory))

    def drop_still(self) -> None:
        """Drop the parameters of `keep` that nothing has moved, so that their copies are freed."""
        self.buffers = [each for each in self.buffers if each.memory is None or each.moved or not each.same]

    def again(self) -> Snapshot:
        """Return a snapshot of the same things as they are now."""
        found = Snapshot(self._model, self._device)
        kept = [each for each in self.buffers if each.memory is not None]
        found.keep(Frozen(each.module, each.name, each.tensor) for each in kept)
        return found

    def restore(self, *, uncounted: bool = False) -> None:
        """Restore the random state and the buffers.

        Args:
            uncounted: As for `restore_buffers`.
        """
        self._random.restore()
        self.restore_buffers(uncounted=uncounted)

    @torch.no_grad()
    def restore_buffers(self, *, uncounted: bool = False) -> None:
        """Restore the buffers, including buffers that were replaced by other tensors.

        Args:
            uncounted: Whether the buffers' version counters stay as they are, so that only the model's own writes
                count. Only while no graph is alive that may have saved a buffer.
        """
        for buffer in self.buffers:
            if buffer.now() is not buffer.tensor:
                setattr(buffer.module, buffer.name, buffer.tensor)
            with _version_kept(buffer.tensor) if uncounted else nullcontext():
                if buffer.tensor.shape == buffer.copy.shape:
                    buffer.tensor.copy_(buffer.copy)
                else:  # it was resized in place
                    buffer.tensor.set_(buffer.copy.clone())  # pyright: ignore[reportArgumentType]


def _modules_of(model: nn.Module) -> list[nn.Module]:
    """Return what ``list(model.modules())`` returns, without a generator for each module."""
    if type(model).modules is not nn.Module.modules:
        return list(model.modules())
    found: dict[nn.Module, None] = {}
    waiting: list[nn.Module | None] = [model]
    while waiting:
        module = waiting.pop()
        if module is not None and module not in found:
            if type(module).named_modules is not nn.Module.named_modules:
                return list(model.modules())
            found[module] = None
            children: Any = module._modules  # pyright: ignore[reportPrivateUsage]
            waiting += reversed(children.values()) if children else ()
    return list(found)


def _version_kept(tensor: Tensor) -> AbstractContextManager[object]:
    keep = getattr(torch.autograd, "_unsafe_preserve_version_counter", None)  # private by name
    return nullcontext() if keep is None else keep(tensor)


def seed_everything(seed: int) -> None:
    """Seed Python, PyTorch on every device, and NumPy if it is imported.

    Args:
        seed: A number in ``[0, 2**63)``.
    """
    random.seed(seed)
    torch.manual_seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)


class RandomState:
    """Copy the current state of every global random generator.

    Args:
        device: The device whose generator is copied, in addition to the CPU's.

    Cost:
        A few kilobytes; no host synchronisation.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cpu = torch.get_rng_state()
        self._on_device = random_state(device)
        self._python = _python_state()
        self._numpy = _numpy_state()

    def restore(self) -> None:
        """Restore every generator."""
        torch.set_rng_state(self._cpu)
        if self._on_device is not None:
            set_random_state(self._device, self._on_device)
        random.setstate(self._python)
        if self._numpy is not None:
            sys.modules["numpy"].random.set_state(self._numpy)
            _Seen.numpy = b"", None  # the same memory may belong to a state with another kept number


class _Seen:
    """The last states that were read of Python's and of NumPy's generator, with the memory that held them.

    Most models draw nothing from these generators, and reading one of them takes 25 microseconds.
    """

    python: tuple[bytes, Any] = b"", None
    numpy: tuple[bytes, Any] = b"", None


def _python_state() -> Any:
    """Return what `random.getstate` returns."""
    generator: Any = getattr(random.getstate, "__self__", None)
    plain = type(generator) is random.Random  # noqa: S311 - a type
    if not plain or not _lies_behind_its_head(generator):
        return random.getstate()
    raw = ctypes.string_at(id(generator) + _HEAD, _TWISTER)
    seen, words = _Seen.python
    if raw != seen:
        words = _words_of(raw)
        _Seen.python = raw, words
    return generator.VERSION, words, generator.gauss_next  # pyright: ignore[reportAttributeAccessIssue]


@cache
def _lies_behind_its_head(generator: Any) -> bool:
    """Return whether a generator's memory is, behind the head of the object, its place and its words, as in CPython."""
    if sys.implementation.name != "cpython":
        return False
    return generator.getstate()[1] == _words_of(ctypes.string_at(id(generator) + _HEAD, _TWISTER))


def _words_of(raw: bytes) -> tuple[int, ...]:
    place, *words = struct.unpack("=i624I", raw)
    return (*words, place)


def _numpy_state() -> Any:
    """Return the state of NumPy's global generator; `None` if NumPy is not imported."""
    if "numpy" not in sys.modules:
        return None
    generators: Any = sys.modules["numpy"].random
    generator: Any = generators.get_bit_generator() if hasattr(generators, "get_bit_generator") else None
    if type(generator).__name__ != "MT19937":
        return generators.get_state(legacy=False)
    raw = ctypes.string_at(generator.ctypes.state_address, _TWISTER)
    seen, state = _Seen.numpy
    # The second number of a pair of normals, which NumPy keeps for the next call, is not in this memory.
    if raw != seen or state["has_gauss"]:
        state = generators.get_state(legacy=False)
        _Seen.numpy = raw, state
    return state


class Modes:
    """What torch has switched on in this thread: grad mode, function modes, and hooks for saved tensors.

    Contexts restore all this themselves, unless an error is raised after the last line of a ``with`` block and before
    its end. Python then never leaves the context.
    """

    def __init__(self) -> None:
        self._grad, self._functions = torch.is_grad_enabled(), _C._len_torch_function_stack()
        self._hooks = _C._autograd._top_saved_tensors_default_hooks(True)

    def restore(self) -> None:
        """Switch off what has been switched on since."""
        while _C._len_torch_function_stack() > self._functions:
            _C._pop_torch_function_stack()
        while (hooks := _C._autograd._top_saved_tensors_default_hooks(True)) is not None and hooks != self._hooks:
            _C._autograd._pop_saved_tensors_default_hooks()
        torch.set_grad_enabled(self._grad)

"""Switch one thing off at a time: batch statistics, randomness, and state that a forward pass leaves behind."""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from microbatch.checking.boundary import Boundary
from microbatch.memory.module_of_op import Where, current_node
from microbatch.step.saved_state import RandomState

Statistics = Mapping[str, list[tuple[Tensor, Tensor]]]


# -- batch statistics -------------------------------------------------------------------------------------------------


class Frozen(TorchFunctionMode):
    """Normalise by statistics that are known beforehand, or write down those of a batch.

    Every batch normalisation ends in one function of torch, whatever module calls it, so that is where it is met.

    Args:
        where: Which module runs.
        known: Mean and variance by module, in the order of its calls; `None` to write them down.

    Attributes:
        seen: Mean and variance of every call that took them from its batch.
    """

    def __init__(self, where: Where, *, known: Statistics | None = None) -> None:
        super().__init__()
        self.seen: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        self._where = where
        self._known = known
        self._calls: dict[str, int] = defaultdict(int)

    def __torch_function__(  # noqa: PLR0917 - torch calls it by position
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Meet batch normalisations that take statistics of their batch; let everything else through."""
        if func is not F.batch_norm and func is not torch.batch_norm:
            return func(*args, **(kwargs or {}))
        call = _read(func, args, kwargs or {})
        if not call["training"]:
            return func(*args, **(kwargs or {}))
        x, path = call["input"], self._where.here()[0]
        if self._known is None:
            if current_node() is None:  # else it is a checkpoint that computes it again
                dims = [dim for dim in range(x.ndim) if dim != 1]
                var, mean = torch.var_mean(x.detach(), dims, correction=0)
                self.seen[path].append((mean, var))
            return func(*args, **(kwargs or {}))
        known = self._known.get(path)
        if not known:  # it did not run on the whole batch, so there is nothing to keep it at
            return func(*args, **(kwargs or {}))
        mean, var = known[self._calls[path] % len(known)]
        self._calls[path] += 1
        return F.batch_norm(x, mean, var, call["weight"], call["bias"], training=False, eps=call["eps"])


def _read(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    functional = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
    native = ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps", "cudnn_enabled")
    names = functional if func is F.batch_norm else native
    return {
        "weight": None,
        "bias": None,
        "training": False,
        "eps": 1e-5,
        **dict(zip(names, args, strict=False)),
        **kwargs,
    }


# -- randomness -------------------------------------------------------------------------------------------------------


class Still(TorchDispatchMode):
    """Put the expected value in the place of everything that is drawn, so that dropout drops nothing.

    What has no expected value of use is drawn from the same state at every call of the model; a random order becomes a
    rotation by one.

    Args:
        boundary: Of the model's copy.
        device: Where it is.
    """

    def __init__(self, boundary: Boundary, device: torch.device) -> None:
        super().__init__()
        state = RandomState(device)
        boundary.before.append(lambda _rows: state.restore())

    def __torch_dispatch__(  # noqa: PLR0917 - torch calls it by position
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Replace what an operator draws."""
        names = [argument.name for argument in func._schema.arguments]
        call = {**dict(zip(names, args, strict=False)), **(kwargs or {})}
        for name in ("dropout_p", "dropout"):  # of attention and of recurrent layers, in forward and backward
            if isinstance(call.get(name), float):
                args = tuple(0.0 if names[place] == name else each for place, each in enumerate(args))
                kwargs = {key: 0.0 if key == name else each for key, each in (kwargs or {}).items()}
        if not is_random(func, args, kwargs or {}):
            return func(*args, **(kwargs or {}))
        kind = func.overloadpacket.__name__
        if kind == "native_dropout":
            return args[0].clone(), torch.ones_like(args[0], dtype=torch.bool)
        drawn = func(*args, **(kwargs or {}))
        if kind == "randperm":
            return drawn.sort().values.roll(1)
        value = _expected(kind, call)
        if value is None:
            return drawn
        # In place, for an operator that wrote into its argument; others have made what they return.
        return drawn.copy_(value) if isinstance(value, Tensor) else drawn.fill_(value)


def is_random(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Return whether a call of an operator draws random numbers.

    Args:
        func: The dispatcher's operator.
        args: Its positional arguments.
        kwargs: Its keyword arguments.

    Returns:
        What torch itself has noted of it; False for dropout with a probability of 0, or outside of training.
    """
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return False
    for place, argument in enumerate(func._schema.arguments):
        if argument.name in _NOTHING_DRAWN:
            value = args[place] if place < len(args) else kwargs.get(argument.name, argument.default_value)
            if value == _NOTHING_DRAWN[argument.name]:
                return False
    return True


_NOTHING_DRAWN = {"dropout_p": 0.0, "dropout": 0.0, "train": False, "training": False}


def _expected(kind: str, call: Mapping[str, Any]) -> Any:
    """Return what an operator draws on average; `None` where that is of no use."""

    def given(name: str, default: float) -> Any:
        return default if call.get(name) is None else call[name]

    if kind == "bernoulli_":  # an argument that is its default is not in the call
        return given("p", 0.5)
    if kind == "bernoulli":
        return given("p", call["self"])
    if kind in {"normal", "normal_"}:
        return given("mean", 0.0)
    if kind in {"randn", "randn_like"}:
        return 0.0
    if kind in {"rand", "rand_like"}:
        return 0.5
    if kind == "uniform_":
        return (given("from", 0.0) + given("to", 1.0)) / 2
    if kind.startswith("exponential"):
        return 1.0 / given("lambd", 1.0)
    return given("low", 0) if kind.startswith("randint") else None


# -- state ------------------------------------------------------------------------------------------------------------

_OURS = frozenset(vars(nn.Module()))  # what every module has: parameters, submodules, hooks, its mode
_HOOKS = tuple(name for name, value in vars(nn.Module()).items() if isinstance(value, dict) and "hooks" in name)


class ModuleState:
    """Hold what a model's modules hold beside their parameters: buffers, hooks, and attributes of their own.

    Hooks belong to it, because a module that registers hooks in its first forward pass remembers that in an attribute.

    Args:
        model: A copy that may be written to.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = dict(model.named_modules())
        self._kept = {path: _state_of(module) for path, module in self._modules.items()}

    def restore(self, *, names: set[str] | None = None) -> None:
        """Put it back, as copies, so that a graph that saved what is replaced keeps it.

        Args:
            names: Which, as `changed` names them; `None` for all.
        """
        for path, module in self._modules.items():
            kept, now = self._kept[path], _state_of(module, copied=False)
            for key in {*kept, *now}:
                if names is not None and _joined(path, key) not in names:
                    continue
                if key not in kept:
                    delattr(module, key)
                elif not _same(now.get(key), kept[key]):
                    if key in _HOOKS:  # the dictionary itself stays, because handles refer to it
                        now[key].clear()
                        now[key].update(kept[key])
                    else:
                        setattr(module, key, _copy(kept[key]))

    def changed(self) -> list[str]:
        """Name what is not as it was.

        Returns:
            Paths such as ``"encoder.norm.running_mean"``, in the model's order.
        """
        found: list[str] = []
        for path, module in self._modules.items():
            now, before = _state_of(module, copied=False), self._kept[path]
            keys = [key for key in {**before, **now} if key not in now or key not in before]
            keys += [key for key in now if key in before and not _same(now[key], before[key])]
            found += [_joined(path, key) for key in keys]
        return found


def _joined(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _state_of(module: nn.Module, *, copied: bool = True) -> dict[str, Any]:
    own = {key: value for key, value in vars(module).items() if key not in _OURS and _is_plain(value)}
    own |= dict(module.named_buffers(recurse=False, remove_duplicate=False))
    hooks = {key: getattr(module, key) for key in _HOOKS}
    if copied:
        return {key: _copy(value) for key, value in own.items()} | {key: dict(each) for key, each in hooks.items()}
    return own | hooks


def _is_plain(value: Any) -> bool:
    """Tell values from objects that have a life of their own, such as functions or another module in a list."""
    # An object of the user's own class, even a subclass of a tuple, may have no length, or may not be comparable.
    kind = type(value)
    if kind in {list, tuple, set}:
        return all(_is_plain(item) for item in value)
    if kind in {dict, OrderedDict, defaultdict}:
        return all(_is_plain(item) for pair in value.items() for item in pair)
    return value is None or kind in {bool, int, float, complex, str, bytes} or isinstance(value, Tensor)


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        copied = copy.copy(cast("dict[Any, Any]", value))  # a defaultdict stays one
        copied.update({key: _copy(each) for key, each in copied.items()})
        return copied
    if isinstance(value, list | tuple | set):
        return type(value)(_copy(each) for each in cast("list[Any]", value))
    return value


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        same_kind = one.shape == other.shape and one.dtype == other.dtype
        return same_kind and bool(((one == other) | (one.isnan() & other.isnan())).all())
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(each, other[key]) for key, each in one.items())
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(_same(a, b) for a, b in zip(one, other, strict=True))
    return one is other or (type(one) is type(other) and one == other)

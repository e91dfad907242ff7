"""Activation checkpointing: recompute a block's activations in backward instead of keeping them."""

from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial, update_wrapper
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from microbatch.arguments import attribute
from microbatch.errors import ConfigError
from microbatch.kind_words import kind_of

# Buffers of at most this many bytes are copied before each forward: statistics are small, but masks and frozen weights
# are large.
_SMALL = 1 << 16
# Names of a cache of keys and values, as Transformers calls it.
_CACHES = frozenset({"past_key_values", "past_key_value", "layer_past", "cache_params"})


def blocks_of(model: nn.Module) -> list[str]:
    """Return the names of a model's repeated blocks, in the model's order; no block lies inside another.

    A block is a child of an `nn.ModuleList` or `nn.Sequential` that has submodules of its own, and of whose type the
    container has several children.

    Example:
        >>> layers = [nn.Sequential(nn.Linear(2, 2), nn.Tanh()) for _ in range(3)]
        >>> blocks_of(nn.Sequential(nn.Linear(2, 2), *layers))
        ['1', '2', '3']
    """
    return [name for name, _ in _blocks(model, "")]


@contextmanager
def checkpointed(model: nn.Module, blocks: Sequence[str] | str = "all") -> Generator[None]:
    """Apply activation checkpointing to some blocks: keep only their inputs, and run their forward again in backward.

    The second forward starts from the same state as the first: autocast, the random generators of torch, Python and
    NumPy, and the buffers. So dropout draws the same masks, and running statistics are updated once. The gradient is
    the same. State dict and hooks of the model do not change; hooks inside a block are called in both forward passes.

    A cache of keys and values, as Transformers models keep it by default, would get every key twice. So
    ``config.use_cache`` is `False` inside the ``with`` block, as Transformers' own checkpointing sets it.

    Args:
        model: Any module.
        blocks: Names of submodules, as `torch.nn.Module.get_submodule` takes them; ``"all"`` for the repeated blocks of
            the model, see `blocks_of`.

    Yields:
        Nothing. Every forward inside the ``with`` block is recomputed, even if its backward runs after the block.

    Raises:
        ConfigError: A name is no submodule, lies inside another named one, or is a scripted module; or ``"all"`` for a
            model without repeated blocks. In forward: a block was given a cache. In backward: a block wrote to a large
            buffer, which is not copied.

    Cost:
        One more forward pass of the blocks, and a copy of their small buffers before each forward.

    Example:
        >>> model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)) for _ in range(3)))
        >>> with checkpointed(model):
        ...     loss = model(torch.ones(2, 4)).sum()
        >>> loss.backward()

    Source:
        Chen et al. 2016, arXiv:1604.06174.
    """
    with ExitStack() as stack:
        names = named_blocks(model, blocks)
        if names:
            _switch_caches_off(model, stack)
        for name in names:
            stack.callback(_wrap(name, model.get_submodule(name)))
        yield


def named_blocks(model: nn.Module, blocks: Sequence[str] | str) -> tuple[str, ...]:
    """Return the names of the submodules that ``blocks`` stands for."""
    if blocks == "all":
        found = blocks_of(model)
        if not found:
            raise ConfigError(
                f'checkpoint="all" found no repeated blocks in {type(model).__name__}; pass the names of submodules'
            )
        return tuple(found)
    names = (blocks,) if isinstance(blocks, str) else tuple(blocks)
    modules = dict(model.named_modules())
    for name in names:
        if not name or name not in modules:
            close = ", ".join(map(repr, get_close_matches(name, modules)))
            hint = f"; did you mean {close}?" if close else "; pass names from model.named_modules()"
            raise ConfigError(f"checkpoint: the model has no submodule {name!r}{hint}")
        outer = [other for other in names if name.startswith(f"{other}.")]
        if outer:
            raise ConfigError(
                f"checkpoint: {name!r} lies inside {outer[0]!r}, which is recomputed as a whole; leave out one of them"
            )
        if isinstance(modules[name], torch.jit.ScriptModule):
            raise ConfigError(
                f"checkpoint: {name!r} is a scripted module, whose forward cannot be recomputed; leave it out"
            )
    return names


def _blocks(module: nn.Module, prefix: str) -> Generator[tuple[str, nn.Module]]:
    holds = isinstance(module, nn.ModuleList | nn.Sequential)
    kinds = Counter(type(child) for child in module.children())
    for name, child in module.named_children():
        if holds and kinds[type(child)] > 1 and any(True for _ in child.children()):
            yield prefix + name, child
        else:
            yield from _blocks(child, f"{prefix}{name}.")


def _switch_caches_off(model: nn.Module, stack: ExitStack) -> None:
    """Set ``use_cache`` of the model's configurations to `False` until the stack is closed."""
    configs = {id(config): config for module in model.modules() if (config := vars(module).get("config")) is not None}
    for config in configs.values():
        if attribute(config, "use_cache") is True:
            config.use_cache = False
            stack.callback(setattr, config, "use_cache", True)


def _refuse_caches(name: str, given: Mapping[str, Any]) -> None:
    """Refuse an object that a block would write to in both forward passes."""
    for argument in _CACHES & given.keys():
        cache = given[argument]
        if not (cache is None or isinstance(cache, Tensor | tuple)):
            raise ConfigError(
                f"checkpoint: {name!r} was given a cache ({argument}=, {kind_of(cache)}), to which it would "
                "write again when it is recomputed in backward. Pass use_cache=False to the model, or leave this block "
                "out"
            )


def _wrap(name: str, block: nn.Module) -> Callable[[], object]:
    """Replace a block's forward, and return a function that restores it."""
    # Set on the instance, so that hooks, state dict, copies and the class itself do not change.
    members = vars(block)
    before = members.get("forward")
    members["forward"] = _Again(name, block)

    def undo() -> None:
        if before is None:
            del members["forward"]
        else:
            members["forward"] = before

    return undo


class _Again:
    """A checkpointed forward of a block. An object, so that a deep copy of the block gets its own copy of it."""

    def __init__(self, name: str, block: nn.Module) -> None:
        update_wrapper(self, block.forward)
        self._name, self._block, self._forward = name, block, block.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self._forward(*args, **kwargs)
        _refuse_caches(self._name, kwargs)
        # Positional arguments are saved with their versions; keyword arguments would only be referenced.
        call = partial(_call, self._forward, len(args), tuple(kwargs))
        contexts = partial(_contexts, self._name, self._block)
        return checkpoint(call, *args, *kwargs.values(), use_reentrant=False, context_fn=contexts)


def _call(forward: Callable[..., Any], positional: int, names: tuple[str, ...], *given: Any) -> Any:
    return forward(*given[:positional], **dict(zip(names, given[positional:], strict=True)))


def _contexts(name: str, block: nn.Module) -> tuple[AbstractContextManager[object], AbstractContextManager[object]]:
    return nullcontext(), _AsBefore(name, block)


@dataclass(frozen=True, slots=True)
class _Buffer:
    module: nn.Module
    name: str
    tensor: Tensor
    version: int
    copy: Tensor | None  # None if the buffer is too large


class _AsBefore(AbstractContextManager[Any]):
    """A context that saves a block's state now, restores it for a second forward, and undoes that forward's changes.

    torch's own checkpoint restores autocast and torch's generators. This class restores buffers, and the generators of
    Python and NumPy.
    """

    def __init__(self, name: str, block: nn.Module) -> None:
        self._name = name
        self._random = _others_random()
        self._buffers = [
            _Buffer(
                module,
                key,
                tensor,
                tensor._version,
                tensor.detach().clone() if tensor.numel() * tensor.element_size() <= _SMALL else None,
            )
            for module in block.modules()
            for key, tensor in module.named_buffers(recurse=False)
        ]
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        for buffer in self._buffers:
            if buffer.copy is None:
                self._check(buffer)
        with ExitStack() as stack:
            stack.callback(_set_others_random, _others_random())
            _set_others_random(self._random)
            for buffer in self._buffers:
                if buffer.copy is not None:
                    # The copy replaces the buffer, because autograd may have saved the buffer's own memory.
                    stack.callback(setattr, buffer.module, buffer.name, getattr(buffer.module, buffer.name))
                    setattr(buffer.module, buffer.name, buffer.copy.clone())
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _check(self, buffer: _Buffer) -> None:
        if getattr(buffer.module, buffer.name) is not buffer.tensor or buffer.tensor._version != buffer.version:
            raise ConfigError(
                f"checkpoint: {self._name!r} wrote to its buffer {buffer.name!r} of shape "
                f"{tuple(buffer.tensor.shape)}, which is too large to be copied before each forward, so the block "
                "cannot be recomputed. Leave this block out"
            )


def _others_random() -> tuple[Any, Any]:
    numpy = sys.modules.get("numpy")
    return random.getstate(), None if numpy is None else numpy.random.get_state()


def _set_others_random(state: tuple[Any, Any]) -> None:
    random.setstate(state[0])
    if state[1] is not None:
        sys.modules["numpy"].random.set_state(state[1])

"""Compute the activations of some blocks again in backward, instead of keeping them until then."""

from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial, update_wrapper
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from microbatch.errors import ConfigError

_SMALL = 1 << 16
"""Bytes of a buffer that is copied before each forward pass: statistics are small, masks and frozen weights large."""


def blocks_of(model: nn.Module) -> list[str]:
    """Find the blocks of a model: what `nn.ModuleList` or `nn.Sequential` holds several of, and has parts of its own.

    Args:
        model: Any module.

    Returns:
        Their names, in the model's order; none lies inside another.

    Example:
        >>> layers = [nn.Sequential(nn.Linear(2, 2), nn.Tanh()) for _ in range(3)]
        >>> blocks_of(nn.Sequential(nn.Linear(2, 2), *layers))
        ['1', '2', '3']
    """
    return [name for name, _ in _blocks(model, "")]


@contextmanager
def checkpointed(model: nn.Module, blocks: Sequence[str] | str = "all") -> Generator[None]:
    """Keep only the inputs of some blocks for backward, which runs their forward passes again.

    The second forward pass begins with what the first one did: autocast, the generators of torch, Python and NumPy,
    and the buffers, so that dropout draws the same masks, and running statistics move once. The gradient is the same.
    State dict and hooks stay as they are; hooks inside of a block are called in both passes.

    Args:
        model: Any module.
        blocks: Names of submodules, as `torch.nn.Module.get_submodule` takes them; ``"all"`` for those that the
            model repeats, see `blocks_of`.

    Yields:
        Nothing; forward passes inside the ``with`` block compute again, wherever their backward runs.

    Raises:
        ConfigError: A name is no submodule, lies inside another one, or is a scripted module; or ``"all"`` of a model
            that repeats none. In backward: a block wrote to a large buffer, which is not copied.

    Cost:
        One more forward pass of the blocks, and a copy of their small buffers for each.

    Example:
        >>> model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)) for _ in range(3)))
        >>> with checkpointed(model):
        ...     loss = model(torch.ones(2, 4)).sum()
        >>> loss.backward()

    Source:
        Chen et al. 2016, arXiv:1604.06174.
    """
    with ExitStack() as stack:
        for name in named_blocks(model, blocks):
            stack.callback(_wrap(name, model.get_submodule(name)))
        yield


def named_blocks(model: nn.Module, blocks: Sequence[str] | str) -> tuple[str, ...]:
    """Say which submodules are meant.

    Args:
        model: Any module.
        blocks: As for `checkpointed`.

    Returns:
        Their names.

    Raises:
        ConfigError: As `checkpointed` says.
    """
    if blocks == "all":
        found = blocks_of(model)
        if not found:
            raise ConfigError(
                f'checkpoint="all" found no repeated blocks in {type(model).__name__}; name the submodules whose '
                "activations are to be computed again"
            )
        return tuple(found)
    names = (blocks,) if isinstance(blocks, str) else tuple(blocks)
    modules = dict(model.named_modules())
    for name in names:
        if not name or name not in modules:
            close = ", ".join(map(repr, get_close_matches(name, modules)))
            raise ConfigError(f"checkpoint: the model has no submodule {name!r}" + (f"; it has {close}" * bool(close)))
        outer = [other for other in names if name.startswith(f"{other}.")]
        if outer:
            raise ConfigError(f"checkpoint: {name!r} lies inside {outer[0]!r}, which is computed again as a whole")
        if isinstance(modules[name], torch.jit.ScriptModule):
            raise ConfigError(f"checkpoint: {name!r} is a scripted module, whose forward cannot be run a second time")
    return names


def _blocks(module: nn.Module, prefix: str) -> Generator[tuple[str, nn.Module]]:
    holds = isinstance(module, nn.ModuleList | nn.Sequential)
    kinds = Counter(type(child) for child in module.children())
    for name, child in module.named_children():
        if holds and kinds[type(child)] > 1 and any(True for _ in child.children()):
            yield prefix + name, child
        else:
            yield from _blocks(child, f"{prefix}{name}.")


def _wrap(name: str, block: nn.Module) -> Callable[[], object]:
    """Give a block a forward of its own, and return what takes it away again."""
    # The instance's attribute: hooks, state dict, copies and everything else of the class stay as they are.
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
    """A block's forward, to be run again in backward. An object, so that a deep copy of the block has its own."""

    def __init__(self, name: str, block: nn.Module) -> None:
        update_wrapper(self, block.forward)
        self._name, self._block, self._forward = name, block, block.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self._forward(*args, **kwargs)
        # As positional arguments, inputs are saved, with their versions; named ones would only be referred to.
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
    copy: Tensor | None  # None where it is too large


class _AsBefore(AbstractContextManager[Any]):
    """Let a block run once more from what is there now, and leave no trace of it.

    torch's own checkpoint puts its generators back, and autocast; buffers, and the generators of others, it does not.
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
                    # Another tensor takes its place: what autograd has saved of the buffer is not written to.
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
                f"{tuple(buffer.tensor.shape)}, which is too large to be copied before each forward pass, so that it "
                "cannot be computed again; leave this block out"
            )


def _others_random() -> tuple[Any, Any]:
    numpy = sys.modules.get("numpy")
    return random.getstate(), None if numpy is None else numpy.random.get_state()


def _set_others_random(state: tuple[Any, Any]) -> None:
    random.setstate(state[0])
    if state[1] is not None:
        sys.modules["numpy"].random.set_state(state[1])

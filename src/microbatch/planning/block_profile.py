"""What a microbatch holds beside the model's own state, moment by moment, from fake runs of a few blocks."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from microbatch.batch.batch_tree import map_tensors
from microbatch.loss.loss import shares_of
from microbatch.memory.ledger import ACTIVATIONS, BUFFERS, GRADIENTS, INPUTS, PARAMETERS, TEMPORARIES, Timeline
from microbatch.memory.meter import MemoryMeter, is_question
from microbatch.memory.signal_errors import is_from_signal
from microbatch.planning.flops import flops_of
from microbatch.planning.model_shapes import Case
from microbatch.step.size.dry_run_copies import Faked, some_rows

HEAD = "logits and loss"
HELD = (ACTIVATIONS, HEAD, TEMPORARIES, INPUTS)
FORWARD, BACKWARD = "forward", "backward"
# Blocks are told apart by their place from either end: first, second, second to last, last. What is held grows from
# one to the next by as much each time, so nothing between can be a peak. The third number of blocks is a check.
_DEPTHS, _CHECKED = (4, 5), 6
_SIZES = (2, 4)

Stretches = Mapping["Place", Tensor]  # int64 (operators, len(HELD)): the bytes of each category after each operator


@dataclass(frozen=True, slots=True)
class Place:
    """A stretch of a microbatch: the forward or backward of one unit, and what comes until the next.

    Attributes:
        phase: ``"forward"`` or ``"backward"``.
        unit: Index of the unit in the whole model.
        pass_: How often it was entered before, for units that run several times.
    """

    phase: Literal["forward", "backward"]
    unit: int
    pass_: int


@dataclass(frozen=True, slots=True)
class Unit:
    """A module that is gathered and let go of as one.

    Attributes:
        name: Its path in the model.
        sizes: Elements of each of its parameters that is trained, largest first.
        frozen: Elements of the others.
    """

    name: str
    sizes: Sequence[int]
    frozen: int

    @property
    def elements(self) -> int:
        """Elements of all its parameters."""
        return sum(self.sizes) + self.frozen


class Model:
    """A model cut into units.

    Args:
        case: What is to be trained.
    """

    def __init__(self, case: Case) -> None:
        self.case = case
        self.path = repeated_blocks(case.model)
        self.depth = len(_children(case.model, self.path)) if self.path else 0
        modules = _units(case.model, self.path)
        self.units = [_unit(name, module) for name, module in modules]
        self.first = next((i for i, unit in enumerate(self.units) if self._is_block(unit.name)), 0)
        inside = {id(each) for _, module in modules for each in module.parameters()}
        self.rest = [each for each in case.model.parameters() if id(each) not in inside]

    def unit_at(self, index: int, depth: int) -> int:
        """Find which unit of the whole model one of a shortened model stands for.

        Args:
            index: In the model of so many blocks.
            depth: Its blocks.

        Returns:
            The index in the whole model, counted from the nearer end.
        """
        if index - self.first < min(2, depth):
            return index
        return index + self.depth - depth

    @property
    def head(self) -> int:
        """The last unit, where it is not a block; or else one more than there are."""
        last = len(self.units) - 1
        return len(self.units) if self._is_block(self.units[last].name) else last

    def _is_block(self, name: str) -> bool:
        return self.path is not None and name.startswith(f"{self.path}.")


class Profile:
    """What a microbatch holds, at every moment and for every size.

    Args:
        model: What is trained.
        checkpointing: Whether blocks keep only what goes into them.
        dtype: Of the forward; `None` for that of the model.
        multiply: Whether to run four and five blocks and multiply, where more are alike and six confirm it.
    """

    def __init__(
        self, model: Model, *, checkpointing: bool, dtype: torch.dtype | None = None, multiply: bool = True
    ) -> None:
        self._model, self._checkpointing, self._dtype = model, checkpointing, dtype
        self._multiply = multiply and model.depth > _CHECKED
        self._confirmed = False
        self._known: dict[int, Stretches] = {}
        self._flops: dict[tuple[int, int], int] = {}

    @property
    def row_flops(self) -> float:
        """Floating-point operations of one row, forward and backward, as matrix products and convolutions have them."""
        size, depth = _SIZES[0], self._model.depth
        self.at(size)
        if (size, depth) not in self._flops:
            (few, more), (low, high) = (self._flops[size, each] for each in _DEPTHS), _DEPTHS
            self._flops[size, depth] = few + (more - few) * (depth - low) // (high - low)
        return self._flops[size, depth] / size

    def at(self, size: int) -> Stretches:
        """Say what is held.

        Args:
            size: Rows of the microbatch; at least 1.

        Returns:
            By stretch, in the order they are run, bytes of each category of `HELD` after each of its operators; int64,
            one row an operator.

        Cost:
            Under a second for up to 4 rows; then nothing, where the operators of 2 and 4 rows are the same.
        """
        if size not in self._known:
            low, high = _SIZES
            found = None
            if size > low and size != high:
                found = _line(self.at(low), self.at(high), low=low, high=high, to=size)
            self._known[size] = found or self._deep(size)
        return self._known[size]

    def _deep(self, size: int) -> Stretches:
        if self._multiply:
            try:
                found = self._multiplied(size)
            except Exception as error:
                if is_from_signal(error):
                    raise
                found = None  # whatever a model does that wants all of its blocks
            self._multiply = found is not None
            if found is not None:
                return found
        return self._run(size, self._model.depth)

    def _multiplied(self, size: int) -> Stretches | None:
        few, more = (self._run(size, depth) for depth in _DEPTHS)
        low, high = _DEPTHS
        if not self._confirmed:
            checked, expected = self._run(size, _CHECKED), _line(few, more, low=low, high=high, to=_CHECKED)
            if expected is None or not all(_same(held, checked.get(place)) for place, held in expected.items()):
                return None  # blocks that are not alike in what they hold
            self._confirmed = True
        return _line(few, more, low=low, high=high, to=self._model.depth)

    def _run(self, size: int, depth: int) -> Stretches:
        options = (self._checkpointing, self._dtype)
        timeline, marks, self._flops[size, depth] = _play(self._model, size, depth=depth, options=options)
        return _stretches(self._model, timeline, marks, depth=depth)


def repeated_blocks(model: nn.Module) -> str | None:
    """Find the list of blocks that are alike and hold most of a model's parameters.

    Args:
        model: Any.

    Returns:
        The path of the list; `None` where there is none of two blocks or more.

    Example:
        >>> repeated_blocks(nn.Sequential(nn.Linear(2, 4), nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])))
        '1'
    """
    most, path = 0, None
    for name, module in model.named_modules():
        if not name or not isinstance(module, nn.ModuleList | nn.Sequential) or len(module) < 2:
            continue
        alike = {(type(child), *((n, p.shape) for n, p in child.named_parameters())) for child in module}
        size = sum(each.numel() for each in module.parameters())
        if len(alike) == 1 and size > most:
            most, path = size, name
    return path


# -- the run ----------------------------------------------------------------------------------------------------------

_Mark = tuple[int, Literal["forward", "backward"], int]  # operators before it, and the unit of the model that was run


def _play(
    model: Model, size: int, *, depth: int, options: tuple[bool, torch.dtype | None]
) -> tuple[Timeline, list[_Mark], int]:
    """Run one microbatch on fake copies, with so many blocks, and count its floating-point operations."""
    checkpointing, dtype = options
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    case = model.case
    with _Cast(mode, dtype):
        copied = copy.deepcopy(case.model)
    blocks = _children(copied, model.path) if model.path else []
    if model.path and depth < len(blocks):
        parent, _, last = model.path.rpartition(".")
        kept = type(copied.get_submodule(model.path))
        kept_blocks = nn.Sequential(*blocks[:depth]) if kept is nn.Sequential else nn.ModuleList(blocks[:depth])
        setattr(copied.get_submodule(parent), last, kept_blocks)
    if checkpointing:
        for block in blocks:  # of our own copy
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
    batch = map_tensors(Faked(mode).of, some_rows(case.batch, size))
    meter, marks = _Counting(timeline=True), list[_Mark]()
    with mode:
        for index, (_, module) in enumerate(_units(copied, model.path)):
            _mark(module, index, meter=meter, marks=marks)
        meter.track(copied)
        meter.track(batch, category=INPUTS)
        with meter:
            shares = shares_of(case.loss_fn(copied, batch), rows=size)
            torch.autograd.backward([share.value for share in shares])
        timeline = meter.timeline
    return timeline, marks, meter.flops


class _Counting(MemoryMeter):
    """A meter that says at any time how long its timeline is, and how much arithmetic there was."""

    operators = 0
    flops = 0

    def __torch_dispatch__(  # noqa: PLR0917 - torch calls it by position
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Count the operator, once it has run."""
        out = super().__torch_dispatch__(func, types, args, kwargs)
        self.operators += not is_question(func)
        self.flops += flops_of(func, args, out)
        return out


class _Cast(Faked):
    """Make fake copies of another precision.

    Args:
        mode: The fake tensors' mode.
        dtype: Of floating-point copies; `None` for what they are copies of.
    """

    def __init__(self, mode: FakeTensorMode, dtype: torch.dtype | None) -> None:
        super().__init__(mode)
        self._dtype = dtype

    def of(self, tensor: Tensor) -> Tensor:
        """Return a fake copy.

        Args:
            tensor: Any.

        Returns:
            Of the same shape and strides, in the precision.
        """
        if self._dtype is None or not tensor.is_floating_point():
            return super().of(tensor)
        with self.mode:
            made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=self._dtype, device="cpu")
            return made.requires_grad_(tensor.requires_grad)


def _mark(module: nn.Module, index: int, *, meter: _Counting, marks: list[_Mark]) -> None:
    """Note when a unit's forward begins, and its backward."""

    def enter(module: nn.Module, args: object) -> None:
        del module, args
        marks.append((meter.operators, FORWARD, index))

    def leave(module: nn.Module, args: object, out: object) -> None:
        del module, args
        for each in tree_leaves(out):
            if isinstance(each, Tensor) and each.requires_grad:
                each.register_hook(back)
                return

    def back(gradient: Tensor) -> None:
        del gradient
        marks.append((meter.operators, BACKWARD, index))

    module.register_forward_pre_hook(enter)
    module.register_forward_hook(leave)


def _stretches(model: Model, timeline: Timeline, marks: Sequence[_Mark], *, depth: int) -> Stretches:
    """Cut a timeline at the marks, and leave out what the model's state is: that is counted by rank."""
    ends = [*(at for at, _, _ in marks[1:]), len(timeline.live)]
    starts = [0, *(at for at, _, _ in marks[1:])]
    ends = [*starts[1:], len(timeline.live)]
    units = [model.unit_at(index, depth) for _, _, index in marks]
    # Of the head and the loss, forward and backward.
    in_head = [(start, end) for start, end, unit in zip(starts, ends, units, strict=True) if unit == model.head]
    first_head, last_head = min(in_head, default=(0, 0))[0], max((end for _, end in in_head), default=-1)
    changes = torch.zeros(len(timeline.live) + 1, len(HELD), dtype=torch.int64)
    for size, category, born, died in timeline.storages:
        if category in {PARAMETERS, BUFFERS, GRADIENTS}:
            continue
        kind = HEAD if category != INPUTS and first_head < born <= last_head else category
        column = HELD.index(kind if kind in HELD else TEMPORARIES)
        changes[max(0, born - 1), column] += size
        if died is not None:
            changes[died, column] -= size
    moments = changes[:-1].cumsum(0)
    passes, found = Counter[tuple[str, int]](), dict[Place, Tensor]()
    for (_, phase, _), unit, start, end in zip(marks, units, starts, ends, strict=True):
        found[Place(phase, unit, passes[phase, unit])] = moments[start:end]
        passes[phase, unit] += 1
    return found


def _line(few: Stretches, more: Stretches, *, low: int, high: int, to: int) -> Stretches | None:
    """Go on in a straight line, operator by operator; `None` where they are not the same."""
    if set(few) - set(more) or any(len(few[place]) != len(more[place]) for place in few):
        return None
    return {place: a + (more[place] - a) * (to - low) // (high - low) for place, a in few.items()}


def _same(one: Tensor, other: Tensor | None) -> bool:
    return other is not None and torch.equal(one, other)


# -- units ------------------------------------------------------------------------------------------------------------


def _children(model: nn.Module, path: str) -> list[nn.Module]:
    return list(model.get_submodule(path).children())


def _units(model: nn.Module, blocks: str | None) -> list[tuple[str, nn.Module]]:
    return list(_beside(model, blocks, prefix="")) or [("the model", model)]


def _beside(module: nn.Module, blocks: str | None, *, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """Yield the blocks, and the modules beside them and beside what holds them."""
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        holds = blocks is not None and f"{blocks}.".startswith(f"{path}.")
        if holds or isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from _beside(child, blocks, prefix=f"{path}.")
        elif any(True for _ in child.parameters()):
            yield path, child


def _unit(name: str, module: nn.Module) -> Unit:
    trained = sorted((each.numel() for each in module.parameters() if each.requires_grad), reverse=True)
    frozen = sum(each.numel() for each in module.parameters() if not each.requires_grad)
    return Unit(name, trained, frozen)

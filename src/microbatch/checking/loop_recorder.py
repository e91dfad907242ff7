"""Watch a loop of the user's own take a step, on copies: what it adds up, when it writes, and what it keeps."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from microbatch.checking.gradient import Gradient, plain, taken
from microbatch.checking.survey import draw_apart
from microbatch.checking.trial_runs import Play
from microbatch.memory.meter import READ
from microbatch.memory.module_of_op import current_node

_SAME = 1e-6
"""Relative change of a gradient between two backwards that is none."""


@dataclass(slots=True)
class Gap:
    """Say what became of the gradients between one backward and the next.

    Attributes:
        last: Squared norm of what the earlier one left.
        now: Squared norm of what the later one found.
        product: Inner product of the two.
        stepped: Whether the optimizer stepped in between.
    """

    last: float = 0.0
    now: float = 0.0
    product: float = 0.0
    stepped: bool = False

    @property
    def factor(self) -> float:
        """What they were multiplied by: 0 where they were zeroed, 1 where they were let alone."""
        if self.last == 0:
            return 1.0
        factor = self.product / self.last
        distance = max(0.0, self.now - 2 * self.product + self.last)
        return 1.0 if distance <= (_SAME**2) * self.last else factor


@dataclass(slots=True)
class Run:
    """Hold what one call of the loop did.

    Attributes:
        rows: Rows of each outermost call of the model.
        parts: What each backward added.
        gaps: What became of the gradients before each backward; the first one's ``now`` is what an earlier call left.
        steps: How many backwards there were before each optimizer step.
        added: The gradients after the last backward before the first of them.
        stepped_with: The gradients that it was given.
        alive: Most graphs of earlier backwards, the last one apart, that were alive when the model was called.
        left_alive: Graphs that were alive when the loop had returned.
        reads: Numbers read back from the device, outside of the model, backward and the optimizer.
        reductions: Backwards that reduced gradients over the ranks; `None` where nobody could count.
        scheduled: Most steps of a learning-rate scheduler.
    """

    rows: list[int] = field(default_factory=list[int])
    parts: list[Gradient] = field(default_factory=list[Gradient])
    gaps: list[Gap] = field(default_factory=list[Gap])
    steps: list[int] = field(default_factory=list[int])
    added: Gradient = field(default_factory=dict[str, Tensor])
    stepped_with: Gradient = field(default_factory=dict[str, Tensor])
    alive: int = 0
    left_alive: int = 0
    reads: int = 0
    reductions: int | None = None
    scheduled: int = 0


def watch(play: Play, *, calls: int = 1) -> list[Run]:
    """Call the loop, with the weights put back after every optimizer step, so that all that it adds belongs to them.

    Args:
        play: Where.
        calls: How many times, one after the other.

    Returns:
        What each call did.
    """
    witness = Witness(play)
    given, runs = play.replica.given, list[Run]()
    if given.loop is None:
        return runs
    draw_apart(given.device)
    with witness:
        for _ in range(calls):
            with witness.call() as run:
                given.loop(witness.model, given.optimizer, play.batch)
            runs.append(run)
    return runs


class _Token:
    """Live as long as the graph that holds it."""


class Witness(TorchDispatchMode):
    """Watch a loop, through hooks on the copies that it is given.

    Args:
        play: Whose copies.

    Attributes:
        model: What the loop is given: the copy, wrapped as the user's model is.
    """

    def __init__(self, play: Play) -> None:
        super().__init__()
        self._play = play
        self._run = Run()
        self._names = {id(each): name for name, each in play.model.named_parameters()}
        self._weights = {name: each.detach().clone() for name, each in play.model.named_parameters()}
        self._last: dict[str, Tensor] = {}
        self._tokens: list[tuple[int, weakref.ref[_Token]]] = []
        self._task = -1
        self._stepping = self._reduced = self._kept = False
        self.model: nn.Module = play.model
        self._stack = ExitStack()

    def __enter__(self) -> Any:
        """Begin to watch."""
        for name, parameter in self._play.model.named_parameters():
            if parameter.requires_grad:
                parameter.register_hook(partial(self._before_adding, name, parameter))
                parameter.register_post_accumulate_grad_hook(self._after_adding)
        given = self._play.replica.given
        for optimizer in [given.optimizer] if isinstance(given.optimizer, Optimizer) else given.optimizer:
            self._stack.callback(optimizer.register_step_pre_hook(self._before_step).remove)
            self._stack.callback(optimizer.register_step_post_hook(self._after_step).remove)
        self._play.boundary.before.append(self._before_forward)
        self._play.boundary.after.append(self._after_forward)
        self.model = self._wrapped()
        return super().__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stop."""
        super().__exit__(kind, error, traceback)
        self._stack.close()

    @contextmanager
    def call(self) -> Generator[Run]:
        """Watch one call of the loop.

        Yields:
            What it does.
        """
        self._run = run = Run(reductions=0 if self.model is not self._play.model else None)
        self._task, self._tokens, self._kept = -1, [], False
        scheduled = [each.last_epoch for each in self._play.replica.schedulers]
        yield run
        run.left_alive = self._alive()
        after = [each.last_epoch for each in self._play.replica.schedulers]
        run.scheduled = max((now - before for now, before in zip(after, scheduled, strict=True)), default=0)

    def __torch_dispatch__(  # noqa: PLR0917 - torch calls it by position
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Count the numbers that are read back."""
        quiet = self._stepping or self._play.boundary.inside or current_node() is not None
        if func is READ and not quiet:
            self._run.reads += 1
        return func(*args, **(kwargs or {}))

    # -- backward -----------------------------------------------------------------------------------------------------

    def _before_adding(self, name: str, parameter: Tensor, gradient: Tensor) -> None:
        task = torch._C._current_graph_task_id()  # pyright: ignore[reportPrivateUsage] -- nothing public tells
        run = self._run
        if task != self._task:
            self._task, self._reduced = task, False
            run.parts.append({})
            run.gaps.append(Gap(stepped=len(run.parts) - 1 in run.steps))
        run.parts[-1][name] = plain(gradient)
        gap, now = run.gaps[-1], parameter.grad
        last = self._last.get(name)
        found = plain(torch.zeros_like(gradient) if now is None else now)
        gap.now += float(found.square().sum())
        if last is not None:
            gap.last += float(last.square().sum())
            gap.product += float((last * found).sum())

    def _after_adding(self, parameter: Tensor) -> None:
        name, gradient = self._names[id(parameter)], parameter.grad
        if gradient is not None:
            self._last[name] = plain(gradient)

    # -- the optimizer ------------------------------------------------------------------------------------------------

    def _before_step(self, _optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        self._stepping, run = True, self._run
        run.steps.append(len(run.parts))
        if len(run.steps) == 1:
            run.added = dict(self._last)
            run.stepped_with = taken(self._play.model)

    @torch.no_grad()
    def _after_step(self, _optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        for name, parameter in self._play.model.named_parameters():
            parameter.copy_(self._weights[name])
        self._stepping = False

    # -- forward ------------------------------------------------------------------------------------------------------

    def _before_forward(self, rows: int | None) -> None:
        run = self._run
        run.rows.append(rows or 0)
        run.alive = max(run.alive, self._alive(before=len(run.parts) - 1))

    def _after_forward(self, output: Any) -> Any:
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and leaf.grad_fn is not None:
                node, token = cast("Any", leaf.grad_fn), _Token()
                node.metadata["microbatch"] = token
                self._tokens.append((len(self._run.parts), weakref.ref(token)))
                break
        return output

    def _alive(self, *, before: int | None = None) -> int:
        """Count the backwards whose graphs are alive."""

        def count() -> int:
            return len({at for at, token in self._tokens if token() is not None and (before is None or at < before)})

        if count() > 1 and not self._kept:  # a reference cycle keeps nothing, it is only not collected yet
            gc.collect()
            self._kept = count() > 1
        return count()

    # -- ranks --------------------------------------------------------------------------------------------------------

    def _wrapped(self) -> nn.Module:
        """Wrap the copy as the user's model is, with a reduction that only counts."""
        if not isinstance(self._play.replica.wrapper, DistributedDataParallel):
            return self._play.model
        wrapped = DistributedDataParallel(self._play.model, init_sync=False, broadcast_buffers=False)
        wrapped.register_comm_hook(None, self._reduce)
        return wrapped

    def _reduce(
        self,
        _state: object,
        bucket: dist.GradBucket,  # pyright: ignore[reportPrivateImportUsage] -- it is what torch's own pages name
    ) -> torch.futures.Future[Tensor]:
        if not self._reduced:
            self._run.reductions = (self._run.reductions or 0) + 1
            self._reduced = True
        done: torch.futures.Future[Tensor] = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

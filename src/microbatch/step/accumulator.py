"""The accumulator: one exact optimizer step, or one exact gradient, from a batch of any size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NoReturn, SupportsIndex

import torch
from torch import nn
from torch.optim import Optimizer

from microbatch.arguments import check_callable, whole
from microbatch.batch.batch_tree import rows_of
from microbatch.batch.batches import Batches
from microbatch.batch.lengths import Lengths
from microbatch.errors import ConfigError, NonfiniteError
from microbatch.gradients.noise_estimate import NoiseScale
from microbatch.loss.loss import LossLike
from microbatch.loss.representations import stand_in
from microbatch.memory.spill import Spill
from microbatch.step.attempts import Attempts, ByHand, locate
from microbatch.step.combinations import BATCHES, GRADIENT, WINDOW, WINDOWS, refuse
from microbatch.step.compose import Composition
from microbatch.step.denominator import Counts
from microbatch.step.events import Listener
from microbatch.step.finish import leave_gradient, take_step
from microbatch.step.loader_windows import Windows
from microbatch.step.options import Options, Ranks, Sums, bytes_of, lengths_of, listeners_of, names_checked, size_of
from microbatch.step.part import Function
from microbatch.step.plain_optimizers import plain_optimizers
from microbatch.step.record import Step
from microbatch.step.window import Window


class Accumulator:
    r"""Train on batches of any size: run a batch in microbatches, and take one optimizer step with its exact gradient.

    The gradient is ``sum_i grad S_i / sum_i c_i``: the summed losses ``S_i`` of all microbatches, divided once by the
    total count ``sum_i c_i`` of samples or targets. It is the gradient of the whole batch's mean loss, however the
    batch is cut, masked, or spread over ranks. The accumulator zeroes, divides, clips and applies gradients. Only the
    learning-rate scheduler is left to you: call it once per step.

    Args:
        model: The module to train, on its device; or a `Pipeline` that holds this rank's stages of the model.
        optimizer: The optimizer of the model's parameters, or several optimizers. `None` if you only call `gradient`.
        microbatch_size: Rows that go through the model at once; at least 1. When memory runs out, the size is halved.
            ``"auto"`` times several sizes in the first steps, which are exact too, and keeps the fastest that fits.
        memory_budget: Bytes, or text such as ``"6 GiB"``, that a window may use on the device. `None` allows what the
            device has; ``"none"`` sets no limit. See ``docs/out-of-memory.md``.
        max_grad_norm: Clip the finished gradient once to this Euclidean norm, above 0. `None` does not clip.
        autocast: ``torch.bfloat16`` or ``torch.float16`` to run forward passes under autocast; `None` for no autocast.
        grad_scaler: Loss scaling for float16 autocast; the parameters must be float32. The accumulator scales: a loss
            that went through ``scaler.scale`` is refused.
        nonfinite: What happens if the loss or the gradient is infinite or NaN. ``"raise"`` restores the state from
            before the window and raises. ``"skip"`` drops the window, keeps the weights and counts it in `skipped`.
        lengths: For rows of different lengths: group rows of similar length, and trim them to the longest in the
            group. The name of the mask or the lengths in the batch, or a `Lengths`.
        offload: ``"activations"`` to move activations off the device until backward needs them, in `step`. A `Spill`
            chooses where they go. `None` does not offload.
        checkpoint: Blocks under activation checkpointing: names of submodules, or ``"all"`` for the blocks that the
            model repeats. ``"auto"`` finds as few as needed in the first `step`. See ``docs/checkpoints.md``.
        coupled: How `step` encodes a batch for a loss that couples samples. ``"twice"`` encodes first without a graph,
            then with one. ``"keep"`` encodes once and keeps the graphs of all microbatches; ``"spill"`` offloads them.
            ``"auto"`` keeps the graphs once a window has shown that they fit.
        batch_norm: Which statistics batch normalisation uses. ``"exact"``: those of the effective batch, also in
            backward; only in `step`, in lockstep. ``"microbatch"``: those of each microbatch; the default, `None`, does
            the same and warns. ``"pooled"``: those of each microbatch, but running statistics are updated once, from
            the whole batch. ``"frozen"``: the running statistics. See ``docs/batchnorm.md``.
        buffers: What happens to other buffers that forward passes move, such as those of spectral normalisation or
            moving averages. ``"each"``: every microbatch moves them; the default, `None`, does the same and warns.
            ``"once"``: every microbatch starts from the values before the window; the first one's update stays.
            ``"mean"``: the mean of all updates stays, weighted by rows. See ``docs/warnings.md``.
        dropout: ``"by_row"`` to draw a dropout mask for each row of the effective batch, so that masks do not depend
            on the cut. See ``docs/dropout.md``.
        compile: Whether `step` runs the loss function (or ``encode``) and the model in it through `torch.compile`; or
            one of its modes, such as ``"reduce-overhead"``. Only the first two shapes of microbatches are compiled.
        sums: How gradients add up: in which dtype, in which buffer, and whether inside the matrix product. See `Sums`.
        ranks: Over which ranks gradients are reduced, when, in which dtype and in which order. See `Ranks`.
        noise_scale: How often to measure the gradient noise scale: a `NoiseScale`. `None` does not measure it.
        listeners: A callable, or several, that is called with every event, such as `StepDone`.

    Raises:
        ConfigError: A value cannot work, an option is unknown, or two exclude each other (``docs/combinations.md``).

    Example:
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> accumulator = Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.5), microbatch_size=2)
        >>> batch = torch.tensor([[1.0], [2.0], [3.0]])  # the gradient of mean(w x) is mean(x) = 2
        >>> step = accumulator.step(batch, lambda model, x: model(x).mean())
        >>> step.loss.item(), step.microbatches, model.weight.item()  # 1 - 0.5 * 2
        (2.0, 2, 0.0)
    """

    @names_checked
    def __init__(  # noqa: PLR0913 - each is one thing that a user may want to choose, by name
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer] | None = None,
        *,
        microbatch_size: SupportsIndex | str = "auto",
        memory_budget: int | str | None = None,
        max_grad_norm: float | None = None,
        autocast: torch.dtype | None = None,
        grad_scaler: torch.amp.GradScaler | None = None,
        nonfinite: str = "raise",
        lengths: Lengths | str | None = None,
        offload: str | Spill | None = None,
        checkpoint: str | Sequence[str] | None = None,
        coupled: str = "auto",
        batch_norm: str | None = None,
        buffers: str | None = None,
        dropout: str | None = None,
        compile: bool | str = False,  # noqa: A002 - torch's own name for it
        sums: Sums | None = None,
        ranks: Ranks | None = None,
        noise_scale: NoiseScale | None = None,
        listeners: Listener | Sequence[Listener] = (),
    ) -> None:
        self._it = Composition(
            Options(
                model=model,
                optimizers=plain_optimizers(optimizer),
                microbatch_size=size_of(microbatch_size),
                memory_budget=bytes_of(memory_budget),
                max_grad_norm=max_grad_norm,
                autocast=autocast,
                grad_scaler=grad_scaler,
                nonfinite=nonfinite,
                lengths=lengths_of(lengths),
                offload=offload,
                checkpoint=checkpoint,
                coupled=coupled,
                batch_norm=batch_norm,
                buffers=buffers,
                dropout=dropout,
                compile=compile,
                sums=Sums() if sums is None else sums,
                ranks=Ranks() if ranks is None else ranks,
                noise_scale=noise_scale,
                listeners=listeners_of(listeners),
            )
        )

    def __repr__(self) -> str:
        """Return one line with the model, the optimizers and the microbatch size."""
        options = self.options
        optimizers = ", ".join(type(each).__name__ for each in options.optimizers) or "no optimizer"
        size = self.microbatch_size or '"auto"'
        return f"Accumulator({type(options.bare_model).__name__}, {optimizers}, microbatch_size={size})"

    def __reduce__(self) -> NoReturn:
        """Refuse pickle and copy: hooks and process groups cannot be copied."""
        raise ConfigError("an Accumulator cannot be pickled or copied: save its state_dict(), load it in another")

    @property
    def options(self) -> Options:
        """The checked options."""
        return self._it.options

    @property
    def microbatch_size(self) -> int | None:
        """The current number of rows that go through the model at once; `None` before ``"auto"`` has seen a batch."""
        sizing = self._it.size.sizing
        return None if sizing.open else sizing.rows

    @property
    def skipped(self) -> int:
        """Number of windows dropped so far, because their gradient was not finite."""
        return self._it.history.skipped

    @property
    def eager(self) -> int:
        """Number of microbatches that ``compile=`` left uncompiled so far, because of their shapes."""
        return self._it.compilation.eager

    def step(
        self,
        batch: object,
        loss_fn: Callable[[nn.Module, Any], LossLike],
        *,
        counts: Counts | None = None,
        encode: Function | None = None,
    ) -> Step:
        """Take exactly one optimizer step on a batch.

        Args:
            batch: This rank's share of the effective batch, usually on the host: what `cut` accepts, or `Batches`.
            loss_fn: ``loss_fn(model, microbatch)`` returns the mean over the microbatch's samples (shape ``()``), a
                `Loss`, a dict of these for several terms, or `None` for a microbatch that contributes nothing.
            counts: For several terms with different counts: a dict of each term's denominator over the whole batch, or
                a function ``counts(batch)`` that returns this dict.
            encode: For losses that couple samples: ``encode(model, microbatch)`` returns the representations of the
                microbatch's rows: tensors of shape ``(rows, ...)``, in any nested structure. Then ``loss_fn(model,
                representations)`` gets those of the whole batch, over all ranks. See ``docs/coupled.md``.

        Returns:
            The record of the step.

        Raises:
            BatchError: The batch cannot be cut, or is empty.
            ConfigError: There is no optimizer, or ``encode`` does not go with an option.
            LossError: The result of ``loss_fn`` is not a loss that can be used.
            NonfiniteError: The loss or the gradient is infinite or NaN, and ``nonfinite="raise"``.
            OutOfMemoryError: Memory ran out with a microbatch of one row, or where a smaller microbatch cannot help.

        Cost:
            One forward and one backward for each microbatch, and one host synchronisation at the end of the window.
            ``encode`` takes one more forward for each, unless graphs are kept (``coupled``). If memory runs out, the
            window runs again with microbatches of half the size; the result is the same.
        """
        self._need_optimizer("step()")
        return self._run(batch, loss_fn, finish=take_step, counts=counts, encode=encode)

    def gradient(
        self,
        batch: object,
        loss_fn: Callable[[nn.Module, Any], LossLike],
        *,
        counts: Counts | None = None,
        encode: Function | None = None,
    ) -> Step:
        """Leave the whole batch's gradient in the parameters' `.grad`, and take no step.

        Use it where other code takes the step: closures (LBFGS, SAM), clipping by value, other training frameworks. It
        is the gradient that `step` applies: divided, unscaled, reduced over the ranks, in each parameter's dtype, and
        clipped if ``max_grad_norm`` is set. It replaces the old `.grad`; a parameter without a gradient gets `None`.
        See ``docs/gradient.md``.

        Args:
            batch: As for `step`.
            loss_fn: As for `step`.
            counts: As for `step`.
            encode: As for `step`.

        Returns:
            The record of the window; ``applied`` is False.

        Raises:
            BatchError: As for `step`.
            ConfigError: An option does not go with this method: ``Sums(buffer="none")`` leaves no gradient.
            LossError: As for `step`.
            NonfiniteError: As for `step`. With ``nonfinite="skip"``, every `.grad` becomes `None` instead. With a
                ``grad_scaler``, infinite gradients stay, so that ``grad_scaler.step(optimizer)`` skips the step.
            OutOfMemoryError: As for `step`.

        Cost:
            As `step`, without the optimizer.

        Example:
            >>> model = torch.nn.Linear(1, 1, bias=False)
            >>> accumulator = Accumulator(model, microbatch_size=2)
            >>> batch = torch.tensor([[1.0], [2.0], [3.0]])  # the gradient of mean(w x) is mean(x) = 2
            >>> accumulator.gradient(batch, lambda model, x: model(x).mean()).applied, model.weight.grad.item()
            (False, 2.0)
        """
        refuse(self.options, use=[GRADIENT])
        return self._run(batch, loss_fn, finish=leave_gradient, counts=counts, encode=encode)

    def window(self, *, counts: Counts | None = None) -> Window:
        """Open a window for a hand-written loop.

        Args:
            counts: As for `step`; a function gets the batch that ``window.split`` cuts.

        Returns:
            A context manager; see `Window`.

        Raises:
            ConfigError: There is no optimizer, or an option needs `step`: ``batch_norm="exact"`` or a `Pipeline`.
        """
        self._need_optimizer("window()")
        refuse(self.options, use=[WINDOW])
        return Window(self._it.setup(), attempt=ByHand(self._it.policies), counts=counts)

    def windows(self, loader: Iterable[Any], *, microbatches: SupportsIndex, counts: Counts | None = None) -> Windows:
        """Group a loader's microbatches into windows; the last window may have fewer.

        The step is taken when the loop over a window's microbatches ends. ``window.step`` can be read right after it.
        Nothing is cut, so that microbatches may be any objects: those with a method ``to`` are moved by it. If their
        rows are not known, a plain mean needs ``window.backward(loss, count=...)``.

        Args:
            loader: Yields microbatches.
            microbatches: Number of microbatches in a window; at least 1.
            counts: As for `step`; a function is called with each microbatch, and its results are added up.

        Returns:
            An iterator over windows, with a length if the loader has one. Iterate over each window to get its
            microbatches.

        Raises:
            ConfigError: There is no optimizer, or ``microbatches`` is not a whole number of at least 1; or an option
                excludes this method: ``batch_norm="exact"``, ``Ranks(deterministic=True)`` or a `Pipeline`.

        Cost:
            Holds one window's microbatches on the host.
        """
        self._need_optimizer("windows()")
        refuse(self.options, use=[WINDOWS])
        number = whole(microbatches, least=1)
        if number is None:
            raise ConfigError(f"microbatches must be a whole number of at least 1, not {microbatches!r}")
        return Windows(loader, number, partial(self._window_of, counts=counts))

    def fusion(self) -> Mapping[str, str]:
        """Return for each parameter whether the last window added its gradients inside the matrix product.

        Returns:
            ``"fused"`` or the reason why not, by parameter name; empty before the first step or without fusion.
        """
        return self._it.fused.report()

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a resumed run needs to continue bit for bit.

        Returns:
            Plain numbers and texts: counts of windows, the seed, the microbatch size, and other choices made so far.
        """
        return self._it.state()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state.

        Args:
            state: The result of `state_dict`.

        Raises:
            ConfigError: A key is missing.
        """
        self._it.load(state)

    def _run(
        self, batch: object, loss_fn: Function, *, finish: Any, counts: Counts | None, encode: Function | None
    ) -> Step:
        """Run the window of a batch, again if memory runs out."""
        it, size = self._it, self._it.size
        if encode is not None:
            check_callable("encode", encode, "encode(model, microbatch)")
        check_callable("loss_fn", loss_fn, "loss_fn(model, microbatch)")
        if isinstance(batch, Batches):
            refuse(self.options, use=[BATCHES])
        # Methods: a function made here would hold on to the accumulator where annotations are checked.
        run = partial(self._run_in, batch=batch, loss_fn=loss_fn, encode=encode)
        alone = partial(_alone, loss_fn=loss_fn, encode=encode)
        if self.options.pipeline is not None:
            # A pipeline's batch is run once: the stages that did not fail do not know which size would fit.
            return Window(it.setup(finish), attempt=ByHand(it.policies), counts=counts).enclose(run).step
        it.history.check_free()
        attempts, saved = Attempts(lambda: it.setup(finish), it.policies, run, counts), size.saved()
        try:
            it.prepare(batch, alone)
            return attempts.step().step
        except NonfiniteError as error:
            if attempts.window is None:
                raise
            again = it.to_locate().setup(finish)
            raise locate(attempts.window, again, batch=batch, function=alone, counts=counts, error=error) from None
        except BaseException:
            if attempts.window is None or attempts.window.record is None:
                size.restore(saved)
            raise
        finally:
            attempts.window = None  # or the two would hold each other until the garbage collector runs

    def _run_in(self, window: Window, *, batch: object, loss_fn: Function, encode: Function | None) -> None:
        """Run a batch through an open window."""
        if encode is None:
            for loss in window.losses(batch, loss_fn):
                window.backward(loss)
                del loss
            return
        keep = self._it.way.keep(rows_of(batch), settled=self._it.size.is_settled)
        representations = window.encode(batch, encode, keep=keep)
        window.backward(loss_fn(window.model, representations))

    def _window_of(self, source: Sequence[Any], *, counts: Counts | None) -> Window:
        """Create the window of a loader's microbatches."""
        return Window(self._it.setup(), attempt=ByHand(self._it.policies), counts=counts, source=source)

    def _need_optimizer(self, what: str) -> None:
        if not self.options.optimizers:
            raise ConfigError(
                f"the accumulator was made without an optimizer, so {what} has none to step: pass one, or call "
                "gradient(batch, loss_fn) and step by yourself"
            )


def _alone(model: Any, microbatch: Any, *, loss_fn: Function, encode: Function | None) -> Any:
    """Put one microbatch through the model, for dry runs and to find a fault."""
    return loss_fn(model, microbatch) if encode is None else stand_in(encode(model, microbatch))

"""Exact batches of any size in Transformers' `Trainer` and its subclasses.

::

    from microbatch.integrations.transformers import MicrobatchTrainer

    trainer = MicrobatchTrainer(model, args, train_dataset=dataset)  # in the place of Trainer
    trainer.train()

See ``docs/transformers.md``.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from microbatch.batch.batches import Batches
from microbatch.errors import ConfigError, EmptyWindowError, LossError, MissingDependencyError, NonfiniteError
from microbatch.integrations.packed_batches import are_packed, as_batch, as_one_row
from microbatch.integrations.trainer_limits import check_arguments, check_trainer, has_own_loss
from microbatch.loss.asked_rows import different_rows, joined
from microbatch.loss.counted_labels import IGNORED, CountOf, fields_of, rows_in, take
from microbatch.loss.find_count import Found
from microbatch.loss.loss import Loss
from microbatch.loss.model_loss import ModelLoss
from microbatch.step.accumulator import Accumulator
from microbatch.step.events import Retry
from microbatch.step.options import listeners_of
from microbatch.step.plain_optimizers import check_optimizers, plain_optimizers
from microbatch.step.record import Step

try:
    from accelerate.utils import gather_object
    from transformers import Trainer, TrainingArguments
except ImportError as error:
    raise MissingDependencyError('install the frameworks with: pip install "microbatch[transformers]"') from error

__all__ = ["MicrobatchMixin", "MicrobatchTrainer"]

_Trainer: Any = Trainer  # decorated there, so that type checkers see no class

_ASKED = 3  # rows that the model is asked about
_OWN = {"model", "optimizer", "microbatch_size", "autocast", "grad_scaler", "max_grad_norm"}


class MicrobatchMixin(_Trainer):
    """Run each batch of a `Trainer` in microbatches, with the whole batch's gradient; put it before the trainer.

    ``per_device_train_batch_size`` is the batch; it is cut to fit. With ``gradient_accumulation_steps=N``, the N
    batches of a step are one effective batch. Losses, norms, learning rates, evaluations and checkpoints are those of a
    run with the whole batch.

    Args:
        args: Arguments of the trainer.
        microbatch_size: Rows that go through the model at once, or ``"auto"``; as for `Accumulator`.
        count: What the loss is a mean over; as for `microbatch.losses.from_model`.
        accumulator: Other options of `Accumulator` by name, such as ``{"memory_budget": "6 GiB"}``.
        kwargs: Arguments of the trainer.

    Attributes:
        accumulator: The accumulator; `None` before the first step.
        last_step: The record of the last step; `None` before the first.

    Raises:
        ConfigError: An argument of the trainer does not go with a window; the message tells what to do.

    Example:
        >>> from transformers import Seq2SeqTrainer
        >>> class MyTrainer(MicrobatchMixin, Seq2SeqTrainer):
        ...     pass
    """

    known_classes: Sequence[str] = ()
    """Names of classes behind this one whose `training_step` may be replaced."""

    def __init__(
        self,
        *args: Any,
        microbatch_size: int | str = "auto",
        count: CountOf = "auto",
        accumulator: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self._options: dict[str, Any] = {**(accumulator or {}), "microbatch_size": microbatch_size}
        for name in _OWN & (accumulator or {}).keys():
            raise ConfigError(f"accumulator= does not take {name!r}, which the trainer's own arguments set")
        self.accumulator: Accumulator | None = None
        self.last_step: Step | None = None
        self._held: list[Any] = []
        self._collects = self._runs = self._packed = False
        self._noted_logs: list[dict[str, Any]] = []
        self._window_logs: list[tuple[Any, dict[str, Any]]] = []
        self._resume: Path | None = None
        for each in (*args, *kwargs.values()):
            if isinstance(each, TrainingArguments):
                check_arguments(each)
        super().__init__(*args, **kwargs)
        check_trainer(self, MicrobatchMixin, known=self.known_classes)
        self._options["listeners"] = [*listeners_of(self._options.get("listeners", ())), self._start_again]
        self._loss = ModelLoss(self._ask, count, takes_items=_always, ignores=self.label_smoother is not None)

    # -- one step ------------------------------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """Collect the batches of a step; fill up a shorter last step, which the trainer would not take otherwise.

        Args:
            epoch_iterator: Yields batches.
            num_batches: Number of batches of a step.
            device: The device.

        Returns:
            The batches, and `None`: the window counts by itself.
        """
        self._collects = True
        try:
            samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        finally:
            self._collects = False
        self._held = []
        if 0 < len(samples) < num_batches:
            name = getattr(self.model, "main_input_name", "input_ids")
            samples = [*samples, *(_Filler({name: torch.empty(0)}) for _ in range(num_batches - len(samples)))]
        return samples, None

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: Any) -> Any:
        """Return nothing for the batches of a step: the window counts by itself, over all ranks."""
        return None if self._collects else super()._get_num_items_in_batch(batch_samples, device)

    def log(self, logs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """Log values; those that `compute_loss` logs are logged once a step, as the window's mean.

        Args:
            logs: The values.
            args: As for the trainer.
            kwargs: As for the trainer.
        """
        if self._runs:
            self._noted_logs.append(dict(logs))
        else:
            super().log(logs, *args, **kwargs)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Keep a batch until the step's last one, then run all of them as one window.

        The trainer's loop calls this method with each batch, then clips and steps.

        Args:
            model: The wrapped model.
            inputs: A batch.
            num_items_in_batch: Ignored.

        Returns:
            The effective batch's mean loss after the last batch of a step, and 0 after the others.
        """
        del num_items_in_batch
        if not isinstance(inputs, _Filler):
            self._held.append(inputs)
        if not self.accelerator.sync_gradients or not self._held:
            return torch.zeros((), device=self.args.device)
        batches, self._held = self._held, []
        model.train()
        if hasattr(self.optimizer, "train") and callable(self.optimizer.train):
            self.optimizer.train()
        accumulator = self._accumulator_of(model)
        if type(self).fold is MicrobatchMixin.fold:
            self._packed = are_packed(batches, together=self.args.gradient_accumulation_steps)
        with self._as_whole_batch(), _words_of_a_trainer():
            self._find_count(accumulator.options.bare_model, batches)
            folded = [self.fold(each) for each in batches]
            step = self.gradient(accumulator, folded[0] if len(folded) == 1 else Batches(folded))
        self.last_step = step
        self.report(step)
        if self._window_logs:
            self.log(_mean_of(self._window_logs))
        return step.loss.to(self.args.device, torch.float32)

    def gradient(self, accumulator: Accumulator, batch: Any) -> Step:
        """Run the window of a step; a subclass does it for losses of another kind.

        Args:
            accumulator: The accumulator.
            batch: The effective batch.

        Returns:
            The record of the window.
        """
        return accumulator.gradient(batch, self._loss_of)

    def fold(self, batch: Any) -> Any:
        """Mark the rows of a batch; a subclass does where several entries are one row.

        Args:
            batch: A batch of the loader.

        Returns:
            What the accumulator cuts.
        """
        return as_one_row(batch) if self._packed else batch

    def unfold(self, microbatch: Any) -> Any:
        """Undo `fold` for a microbatch.

        Args:
            microbatch: Rows of what `fold` returned.

        Returns:
            What `compute_loss` takes.
        """
        return as_batch(microbatch) if self._packed else microbatch

    def report(self, step: Step) -> None:
        """Take over the metrics of a step; a subclass does.

        Args:
            step: The record.
        """

    def _loss_of(self, model: nn.Module, microbatch: Any) -> Loss | None:
        return self._weighed(self._loss(model, self._prepare_inputs(self.unfold(microbatch))))

    def _weighed(self, loss: Loss | None) -> Loss | None:
        """Keep what `compute_loss` logged for this microbatch, with the microbatch's count."""
        if self._noted_logs and loss is not None:
            self._window_logs += [(loss.count, each) for each in self._noted_logs]
        self._noted_logs = []
        return loss

    def _start_again(self, event: object) -> None:
        """Drop what was kept of a window that runs again."""
        if isinstance(event, Retry):
            self._window_logs = []

    def _ask(self, model: Any, batch: Any, items: Tensor | None) -> tuple[Tensor, Any]:
        """Compute the loss of some rows, and the output where it contains a router's loss."""
        self._noted_logs = []  # of an earlier question
        if items is None and has_own_loss(self):
            items = self._get_num_items_in_batch([batch], self.args.device)
        outputs = bool(getattr(getattr(self.model, "config", None), "output_router_logits", False))
        with self.compute_loss_context_manager():
            found: Any = self.compute_loss(model, batch, return_outputs=outputs, num_items_in_batch=items)
        return found if outputs else (found, None)

    def _gathered(self, value: Any) -> Any:
        del value
        raise ConfigError(
            "compute_loss gathers values from all ranks, and the ranks may have different numbers of microbatches: "
            "gather in a callback, or after the step from trainer.last_step"
        )

    @contextmanager
    def _as_whole_batch(self) -> Generator[None]:
        """Set what `compute_loss` reads to one batch on one rank, because the window counts and reduces."""
        args, accelerator = self.args, self.accelerator
        before = args.average_tokens_across_devices, args.gradient_accumulation_steps
        steps = self.current_gradient_accumulation_steps
        args.average_tokens_across_devices, args.gradient_accumulation_steps = False, 1
        self.current_gradient_accumulation_steps = 1
        self._runs, self._window_logs = True, []
        gathers = ("gather", "gather_for_metrics", "reduce") if args.world_size > 1 else ()
        for name in gathers:
            setattr(accelerator, name, self._gathered)
        try:
            yield
        finally:
            self._runs = False
            for name in gathers:
                delattr(accelerator, name)
            args.average_tokens_across_devices, args.gradient_accumulation_steps = before
            self.current_gradient_accumulation_steps = steps

    # -- what is made before the first step ----------------------------------------------------------------------------

    def _accumulator_of(self, model: nn.Module) -> Accumulator:
        made = self.accumulator
        if made is None or made.options.model is not model:
            optimizers, scaler = plain_optimizers(self.optimizer), self.accelerator.scaler
            check_optimizers(model, optimizers)
            if scaler is None:
                made = Accumulator(model, **self._options)
            else:
                made = Accumulator(model, optimizers, grad_scaler=scaler, **self._options)
                # The window has unscaled the gradients, and a scaler refuses to do it twice.
                self.accelerator.unscale_gradients = _nothing
            self.accumulator = made
        if self._resume is not None:
            path, self._resume = self._resume, None
            if path.exists():
                state = json.loads(path.read_text(encoding="utf-8"))
                made.load_state_dict(state["accumulator"])
                self._loss.found = None if state["count"] is None else Found(**state["count"])
        return made

    def _find_count(self, model: nn.Module, batches: Sequence[Any]) -> None:
        """Find out what the loss is a mean over: every rank asks about the same rows, and comes to the same answer."""
        if self._loss.known:
            return
        offer: Any = None
        try:
            if self._packed:
                offer = 0, batches[0]
            else:
                some = [_rows_to_ask(fields_of(self.unfold(each))) for each in batches]
                together = joined([rows for _, rows in some]) if len(some) > 1 else None
                offer = max(some, key=_labelled) if together is None else _rows_to_ask(together)
        except LossError as problem:
            offer = problem
        offers = gather_object([offer]) if self.args.world_size > 1 else [offer]
        for each in offers:
            if isinstance(each, LossError):
                raise each
        self._loss.find(model, self._prepare_inputs(max(offers, key=_labelled)[1]))

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.accumulator is not None:
            found = self._loss.found
            count = None if found is None else {"count": found.count, "takes_items": found.takes_items}
            state = {"accumulator": self.accumulator.state_dict(), "count": count}
            path = self._state_file(output_dir)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(state), encoding="utf-8")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self._resume = self._state_file(checkpoint)

    def _state_file(self, folder: str) -> Path:
        return Path(folder) / f"microbatch_{self.args.process_index}.json"


class MicrobatchTrainer(MicrobatchMixin):
    """A `Trainer` with exact batches of any size; see `MicrobatchMixin`."""


class _Filler(dict[str, Any]):
    """No batch: it fills up a step that data without a length ends."""


def _rows_to_ask(batch: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
    """Return the rows with the most labels and some that differ, on the host, and their number of labels."""
    rows, labels = rows_in(batch), batch.get("labels")
    order, number = list(range(rows)), 0
    if isinstance(labels, Tensor) and labels.ndim and not labels.is_floating_point():
        kept = (labels != IGNORED).reshape(rows, -1).sum(1)
        order, number = kept.argsort(descending=True, stable=True).tolist(), int(kept.sum())
    order = list(dict.fromkeys([*order[:_ASKED], *different_rows(batch, 2 * _ASKED)]))
    some = take(batch, order)
    return number, {name: each.cpu() if isinstance(each, Tensor) else each for name, each in some.items()}


def _mean_of(logs: Sequence[tuple[Any, dict[str, Any]]]) -> dict[str, Any]:
    """Return the mean of what the microbatches logged, by their counts; what is no number stays the last one's."""
    found: dict[str, Any] = {}
    for name in dict.fromkeys(name for _, each in logs for name in each):
        values = [(float(count), each[name]) for count, each in logs if name in each]
        total = sum(count for count, _ in values)
        numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for _, value in values)
        found[name] = sum(count * value for count, value in values) / total if numbers and total else values[-1][1]
    return found


@contextmanager
def _words_of_a_trainer() -> Generator[None]:
    """Replace the accumulator's arguments in errors by the trainer's."""
    try:
        yield
    except (NonfiniteError, EmptyWindowError) as error:
        words = str(error).replace('ass nonfinite="skip"', 'ass accumulator={"nonfinite": "skip"}')
        error.args = (words, *error.args[1:])
        raise


def _labelled(offer: tuple[int, Any]) -> int:
    return offer[0]


def _always(model: Any) -> bool:
    del model
    return True


def _nothing(optimizer: Any = None) -> None:
    del optimizer

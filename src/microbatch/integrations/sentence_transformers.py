"""Exact contrastive batches of any size in sentence-transformers' `SentenceTransformerTrainer`.

::

    from microbatch.integrations.sentence_transformers import MicrobatchSentenceTransformerTrainer

    trainer = MicrobatchSentenceTransformerTrainer(model, args, train_dataset=dataset, loss=loss)
    trainer.train()

See ``docs/sentence-transformers.md``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from microbatch.batch.batches import parts_of
from microbatch.errors import ConfigError, MissingDependencyError
from microbatch.integrations.embedding_losses import EmbeddingLoss, ModelAndLoss, check_loss
from microbatch.integrations.transformers import MicrobatchMixin
from microbatch.step.accumulator import Accumulator
from microbatch.step.record import Step

try:
    from sentence_transformers import SentenceTransformerTrainer
except ImportError as error:
    raise MissingDependencyError(
        'install the frameworks with: pip install "microbatch[sentence-transformers]"'
    ) from error

_Trainer: Any = SentenceTransformerTrainer  # decorated there, so that type checkers see no class

__all__ = ["MicrobatchSentenceTransformerMixin", "MicrobatchSentenceTransformerTrainer"]


class MicrobatchSentenceTransformerMixin(MicrobatchMixin):
    """Run each batch of a `SentenceTransformerTrainer` in microbatches, with the loss of the whole batch.

    Put it before the trainer. ``per_device_train_batch_size`` is the batch, so every other row of it is a negative,
    whatever fits into memory at once. Over several ranks, and over the batches of
    ``gradient_accumulation_steps=N``, the rows of all of them are one batch.

    Args:
        args: Arguments of the trainer.
        kwargs: Arguments of the trainer, ``microbatch_size`` and ``accumulator`` as for `MicrobatchMixin`.

    Raises:
        ConfigError: The loss runs the model in a way of its own, or an argument does not go with a window.
    """

    known_classes: Sequence[str] = ("SentenceTransformerTrainer",)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if kwargs.get("count", "auto") != "auto":
            raise ConfigError(
                "count= is for losses of Transformers only: a loss of embeddings is computed from the whole batch. "
                "Leave it out"
            )
        check_loss(self.loss)
        if isinstance(self.train_dataset, Mapping) and self.args.world_size > 1:
            raise ConfigError(
                f"{len(self.train_dataset)} datasets on {self.args.world_size} ranks: the ranks may have batches of "
                "different datasets in one step, which have no loss together; train on one dataset, or on one rank"
            )
        self._embedding = EmbeddingLoss(lambda batch: self.collect_features(self._prepare_inputs(batch)))

    def gradient(self, accumulator: Accumulator, batch: Any) -> Step:
        """Encode the whole batch in microbatches, and take the gradient of its loss.

        Args:
            accumulator: The accumulator.
            batch: The effective batch.

        Returns:
            The record of the window.

        Raises:
            ConfigError: The batches of a step are from several datasets.
        """
        names = {str(each.get("dataset_name", "")) for each in parts_of(batch)}
        if len(names) > 1:
            raise ConfigError(
                f"the batches of one step are from the datasets {', '.join(sorted(names))}, which have no loss "
                "together: set gradient_accumulation_steps=1 and a larger per_device_train_batch_size"
            )
        self._embedding.dataset = names.pop() or None
        return accumulator.gradient(batch, self._whole_loss, encode=self._encoded)

    def report(self, step: Step) -> None:
        """Log the terms of a loss that has several.

        Args:
            step: The record.
        """
        super().report(step)
        if self._embedding.parts:
            self.track_loss_components(dict(self._embedding.parts))

    def _encoded(self, model: Any, microbatch: Any) -> Any:
        with self.compute_loss_context_manager():
            return self._embedding.encode(model, microbatch)

    def _whole_loss(self, model: Any, encoded: Any) -> Tensor:
        with self.compute_loss_context_manager():
            return self._embedding.loss(model, encoded)

    def _find_count(self, model: nn.Module, batches: Sequence[Any]) -> None:
        """Ask nothing: the loss is computed once, from the whole batch."""

    def _accumulator_of(self, model: nn.Module) -> Accumulator:
        made = self.accumulator
        bare = self.accelerator.unwrap_model(model)
        whole = made.options.model if made is not None else None
        if not isinstance(whole, ModelAndLoss) or whole.model is not bare:
            whole = ModelAndLoss(bare, self.loss)
        return super()._accumulator_of(whole)


class MicrobatchSentenceTransformerTrainer(MicrobatchSentenceTransformerMixin, _Trainer):
    """A `SentenceTransformerTrainer` with exact batches; see `MicrobatchSentenceTransformerMixin`."""

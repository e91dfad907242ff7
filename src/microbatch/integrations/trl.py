"""Exact batches of any size in TRL's trainers for supervised fine-tuning, preference pairs and reward models.

::

    from microbatch.integrations.trl import MicrobatchSFTTrainer

    trainer = MicrobatchSFTTrainer(model, args, train_dataset=dataset)  # in the place of SFTTrainer
    trainer.train()

See ``docs/transformers.md``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from microbatch.batch.marks import Rows, Whole
from microbatch.errors import ConfigError, MissingDependencyError
from microbatch.integrations.trainer_limits import has_own_loss
from microbatch.integrations.transformers import MicrobatchMixin as TrainerMixin
from microbatch.loss.counted_labels import IGNORED, NEXT_LABELS
from microbatch.loss.find_count import Found
from microbatch.loss.loss import Loss
from microbatch.step.events import Retry
from microbatch.step.record import Step
from microbatch.warned import warn

try:
    from trl import DPOTrainer, RewardTrainer, SFTTrainer
except ImportError as error:
    raise MissingDependencyError('install the frameworks with: pip install "microbatch[trl]"') from error

__all__ = ["MicrobatchDPOTrainer", "MicrobatchMixin", "MicrobatchRewardTrainer", "MicrobatchSFTTrainer"]

_SFT, _DPO, _REWARD = "SFTTrainer", "DPOTrainer", "RewardTrainer"
_TOKENS, _CHOSEN, _REJECTED, _PAIRS, _LEAST, _MOST = "tokens", "chosen tokens", "rejected tokens", "pairs", "min", "max"
# Losses of DPO that are means over pairs; "aot" sorts the batch, and "sft" is a mean over tokens.
_PAIRWISE = {
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard"),
    *("apo_zero", "apo_down", "discopop", "sigmoid_norm"),
}


@dataclass(frozen=True, slots=True)
class _Recipe:
    """What a trainer's loss and metrics are means over.

    Attributes:
        means: For each metric, the count that it is a mean over, or ``"min"`` or ``"max"``.
        pairs: Whether its batches are N chosen rows above N rejected ones.
    """

    means: Mapping[str, str]
    pairs: bool


_RECIPES = {
    _SFT: _Recipe({"entropy": _TOKENS, "mean_token_accuracy": _TOKENS}, pairs=False),
    _DPO: _Recipe(
        {
            "entropy": _TOKENS,
            "mean_token_accuracy": _CHOSEN,
            "logits/chosen": _CHOSEN,
            "logits/rejected": _REJECTED,
            **dict.fromkeys(["rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"], _PAIRS),
            **dict.fromkeys(["logps/chosen", "logps/rejected"], _PAIRS),
        },
        pairs=True,
    ),
    _REWARD: _Recipe(
        {
            "min_reward": _LEAST,
            "max_reward": _MOST,
            **dict.fromkeys(["mean_reward", "accuracy", "margin"], _PAIRS),
        },
        pairs=True,
    ),
}


@dataclass(slots=True)
class _Noted:
    """The metrics that `compute_loss` noted for one microbatch, and the tokens that it counted."""

    values: dict[str, list[float]] = field(default_factory=dict[str, list[float]])
    tokens: float = 0.0


class MicrobatchMixin(TrainerMixin):
    """Run each batch of TRL's `SFTTrainer`, `DPOTrainer` or `RewardTrainer` in microbatches; put it before the trainer.

    As for Transformers' `Trainer`. A pair of a chosen and a rejected text is one row. Every metric that the trainer
    logs is the whole batch's: means over tokens are weighted by tokens, over all microbatches and ranks.

    Args:
        args: Arguments of the trainer.
        kwargs: Arguments of the trainer and of `microbatch.integrations.transformers.MicrobatchMixin`.

    Raises:
        ConfigError: The trainer, or one of its losses, is not a mean over rows or tokens.
    """

    known_classes = tuple(_RECIPES)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._recipe_name = _kind_of(type(self))
        self._recipe = _RECIPES[self._recipe_name]
        self._noted, self._stacked, self._ends = _Noted(), set[str](), defaultdict[str, list[float]](list)
        count = kwargs.pop("count", "auto")
        pairs = self._recipe.pairs
        super().__init__(*args, count=_pairs_in if pairs and count == "auto" else count, **kwargs)
        theirs = not has_own_loss(self)
        if count == "auto" and pairs and not theirs:
            raise ConfigError(
                f"{type(self).__name__} has a compute_loss of its own, and for pairs it cannot be found out "
                "what that loss is a mean over. If it is a mean over pairs, pass "
                'count=lambda batch: len(batch["input_ids"]) // 2'
            )
        if count == "auto" and not pairs and theirs and self.label_smoother is None:
            self._loss.found = Found(NEXT_LABELS, takes_items=True)
        self._check_loss()

    def fold(self, batch: Any) -> Any:
        """Mark pairs as rows."""
        rows = len(batch["input_ids"])
        if not self._recipe.pairs:
            if not getattr(self, "padding_free", False):
                return batch
            # Rows joined to one: the lengths of the rows belong to all of them.
            return {name: each if _has(each, rows) else Whole(each) for name, each in batch.items()}
        self._stacked = {name for name, each in batch.items() if _has(each, rows)}
        return {
            name: Rows(each.unflatten(0, (2, -1)), dim=1) if name in self._stacked else each
            for name, each in batch.items()
        }

    def unfold(self, microbatch: Any) -> Any:
        """Stack the rejected rows below the chosen ones again."""
        return {name: each.flatten(0, 1) if name in self._stacked else each for name, each in microbatch.items()}

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Keep a batch until the step's last one, then run all of them as one window.

        Args:
            model: The wrapped model.
            inputs: A batch.
            num_items_in_batch: Ignored.

        Returns:
            The effective batch's mean loss after the last batch of a step, and 0 after the others.
        """
        self._ends.clear()
        return super().training_step(model, inputs, num_items_in_batch)

    def report(self, step: Step) -> None:
        """Note the metrics of the whole batch, where the trainer notes those of each of its batches."""
        noted = self._metrics["train"]
        sums = {name: float(value) for name, value in step.metrics.items()}
        self._total_train_tokens += round(sums.get("num_tokens", 0))
        noted["num_tokens"] = [self._total_train_tokens]
        for name, over in self._recipe.means.items():
            if over in {_LEAST, _MOST}:
                noted[name].append(self._end_of(name, over))
            elif name in sums:
                noted[name].append(sums[name] / sums[over] if sums[over] else 0.0)

    # -- one microbatch ------------------------------------------------------------------------------------------------

    def _loss_of(self, model: nn.Module, microbatch: Any) -> Loss | None:
        batch = self.unfold(microbatch)
        counts = self._counts(batch)  # before the trainer changes the batch
        loss = self._weighed(self._loss(model, self._prepare_inputs(batch)))
        if loss is None:
            return None
        sums: dict[str, Any] = {**counts, "num_tokens": self._noted.tokens}
        for name, values in self._noted.values.items():
            over = self._recipe.means.get(name)
            if over in {_LEAST, _MOST}:
                self._ends[name] += values
            elif over is not None:
                sums[name] = sum(values) * counts[over]
        return replace(loss, metrics=sums)

    def _ask(self, model: Any, batch: Any, items: Tensor | None) -> tuple[Tensor, Any]:
        """Compute the loss of some rows, and take what the trainer notes out of its lists."""
        metrics, tokens = self._metrics, self._total_train_tokens
        self._metrics = {mode: defaultdict(list) for mode in metrics}
        self._total_train_tokens = 0
        try:
            loss: Any = super()._ask(model, batch, items)
            values = {name: each for name, each in self._metrics["train"].items() if name != "num_tokens"}
            self._noted = _Noted(values, self._total_train_tokens)
        finally:
            self._metrics, self._total_train_tokens = metrics, tokens
        return loss

    def _counts(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the means of this microbatch are over."""
        if self._recipe_name == _SFT:
            return {_TOKENS: (batch["labels"][..., 1:] != IGNORED).sum()}
        found: dict[str, Any] = {_PAIRS: _pairs_in(batch)}
        if self._recipe_name == _DPO:
            chosen, rejected = (each.sum() for each in batch["completion_mask"][..., 1:].chunk(2))
            found |= {_CHOSEN: chosen, _REJECTED: rejected, _TOKENS: chosen + rejected}
        return found

    def _gathered(self, value: Any) -> Any:
        return value  # the window adds up over the ranks

    def _start_again(self, event: object) -> None:
        super()._start_again(event)
        if isinstance(event, Retry):
            self._ends.clear()

    def _end_of(self, name: str, over: str) -> float:
        choose = min if over == _LEAST else max
        own = torch.tensor([choose(self._ends[name], default=torch.inf if over == _LEAST else -torch.inf)])
        return choose(self.accelerator.gather(own.to(self.args.device)).tolist())

    # -- what is refused -----------------------------------------------------------------------------------------------

    def _check_loss(self) -> None:
        if getattr(self, "aux_loss_enabled", False):
            raise ConfigError(
                f"{self._recipe_name} would add the router's aux_loss, a product of means over the whole batch: set "
                "model.config.output_router_logits = False, or router_aux_loss_coef = 0"
            )
        losses: Collection[str] = getattr(self, "loss_types", ()) if self._recipe_name == _DPO else ()
        for other in sorted(set(losses) - _PAIRWISE):
            raise ConfigError(
                f"loss_type={other!r} is no mean over pairs ('aot' sorts the whole batch, 'sft' is a mean over "
                f"tokens): choose one of {', '.join(sorted(_PAIRWISE))}"
            )
        if getattr(self, "padding_free", False):
            warn(
                "padding_free=True, or packing, joins the rows of a batch to one row, which is not cut further. Each "
                "of the gradient_accumulation_steps batches is a microbatch; padding_free=False lets batches be cut"
            )


_SFTTrainer: Any = SFTTrainer
_DPOTrainer: Any = DPOTrainer
_RewardTrainer: Any = RewardTrainer


class MicrobatchSFTTrainer(MicrobatchMixin, _SFTTrainer):
    """TRL's `SFTTrainer` with exact batches of any size; see `MicrobatchMixin`."""


class MicrobatchDPOTrainer(MicrobatchMixin, _DPOTrainer):
    """TRL's `DPOTrainer` with exact batches of any size; see `MicrobatchMixin`."""


class MicrobatchRewardTrainer(MicrobatchMixin, _RewardTrainer):
    """TRL's `RewardTrainer` with exact batches of any size; see `MicrobatchMixin`."""


def _kind_of(trainer: type) -> str:
    """Return the name of the trainer of TRL that a class extends."""
    named = [each.__name__ for each in trainer.__mro__ if each.__module__.startswith("trl.")]
    theirs = [name for name in named if name.endswith("Trainer") and not name.startswith("_")]
    if len(theirs) == 1 and theirs[0] in _RECIPES:
        return theirs[0]
    name = theirs[0] if theirs else trainer.__name__
    raise ConfigError(
        f"{name} is not supported: its losses or advantages depend on the whole batch, or on what was generated for "
        f"it. Supported are {', '.join(_RECIPES)}; for other losses, use mb.Accumulator in a loop of your own"
    )


def _has(value: Any, rows: int) -> bool:
    return isinstance(value, Tensor) and value.shape[:1] == (rows,)


def _pairs_in(batch: Mapping[str, Any]) -> int:
    return len(batch["input_ids"]) // 2

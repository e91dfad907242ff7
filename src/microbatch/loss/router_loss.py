"""Compute the load-balancing loss of a mixture of experts from the statistics of the whole batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from microbatch.arguments import attribute
from microbatch.errors import LossError
from microbatch.loss.batch_reductions import batch_mean
from microbatch.loss.counted_labels import Fields

_WAYS_OUT = (
    "Leave it out with model.config.output_router_logits = False, or write a loss function with mb.batch_mean for the "
    "router's statistics"
)


@dataclass(frozen=True, slots=True)
class RouterLoss:
    """The load-balancing loss inside a model's loss.

    It multiplies two means over all tokens of the batch, for each expert: how often it was chosen, and its probability.
    So it is no mean over rows, and needs both means over the whole batch.

    Attributes:
        own: The weighted loss of this microbatch alone, as the model added it to its loss; shape ``()``.
        chosen: How often each expert was chosen, for each token of this microbatch; shape ``(experts,)``.
        probability: Mean probability of each expert in this microbatch; shape ``(experts,)``, with its graph.
        tokens: Number of tokens; shape ``()``.
        weight: The factor of this loss.
    """

    own: Tensor
    chosen: Tensor
    probability: Tensor
    tokens: Tensor
    weight: float

    def of_this_microbatch(self) -> Tensor:
        """Compute the loss from this microbatch's own statistics."""
        return self._of(self.chosen, self.probability)

    def of_the_batch(self, model: nn.Module) -> Tensor:
        """Compute the weighted loss from the whole batch's statistics, which the microbatches must share."""
        chosen = batch_mean(self.chosen, count=self.tokens)
        if chosen is self.chosen and type(chosen).__name__ != "FakeTensor":
            raise LossError(
                f"the loss of {type(model).__name__} contains its router's aux_loss, a product of means over the whole "
                'batch. Pass batch_norm="exact" to the accumulator, with which microbatches share such means. '
                f"{_WAYS_OUT}"
            )
        return self._of(chosen, batch_mean(self.probability, count=self.tokens))

    def _of(self, chosen: Tensor, probability: Tensor) -> Tensor:
        return self.weight * len(chosen) * (chosen * probability).sum()


def router_loss_of(output: Any, batch: Fields, model: nn.Module) -> RouterLoss | None:
    """Find the load-balancing loss inside a model's loss; `None` if there is none."""
    aux, weight = attribute(output, "aux_loss"), _setting(model, "router_aux_loss_coef")
    if not isinstance(aux, Tensor) or not weight:
        return None
    logits, top = attribute(output, "router_logits"), _setting(model, "num_experts_per_tok")
    if not isinstance(logits, tuple) or not logits or not all(isinstance(each, Tensor) for each in logits) or not top:
        raise LossError(
            f"the loss of {type(model).__name__} contains its router's aux_loss, a product of means over the whole "
            f"batch, and its router_logits are not reachable. {_WAYS_OUT}"
        )
    mask = batch.get("attention_mask")
    flat = torch.cat([each.reshape(-1, each.shape[-1]) for each in logits])
    probabilities = F.softmax(flat.float(), dim=-1)
    chosen = F.one_hot(probabilities.topk(top, dim=-1).indices, flat.shape[-1]).sum(1).float()
    each = torch.ones(len(flat) // len(logits), device=flat.device) if mask is None else mask.reshape(-1).float()
    weights = each.to(flat.device).repeat(len(logits))
    tokens = weights.sum()
    means = [(weights[:, None] * values).sum(0) / tokens for values in (chosen, probabilities)]
    return RouterLoss(weight * aux, means[0], means[1], tokens, float(weight))


def check_router_loss(found: RouterLoss, model: nn.Module) -> None:
    """Refuse a load-balancing loss of another formula."""
    ours, own = float(found.of_this_microbatch()), float(found.own)
    if abs(ours - own) > 1e-4 * abs(own):
        raise LossError(
            f"the loss of {type(model).__name__} contains its router's aux_loss of another formula than is known here "
            f"({own:.6g} instead of {ours:.6g} on the same rows). {_WAYS_OUT}"
        )


def _setting(model: nn.Module, name: str) -> Any:
    """Return a setting of the model, of a submodule, or of the model's configuration."""
    for module in model.modules():
        if name in vars(module):
            return vars(module)[name]
    return attribute(attribute(model, "config"), name)

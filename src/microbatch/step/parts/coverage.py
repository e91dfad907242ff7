"""Compare what the loss depends on with what the optimizers step."""

from __future__ import annotations

from itertools import compress
from operator import attrgetter

from microbatch.errors import NoGraphError
from microbatch.step.part import OpenWindow, Part

_NAMED = 4  # parameters that a message names
_HELD = attrgetter("held")


class Coverage(Part):
    """Refuse a loss that depends on no parameter of the optimizers, and warn about parameters that none of them holds.

    Source:
        Law S3.
    """

    def check(self, window: OpenWindow) -> None:
        """Compare the gradients of a window with what the optimizers hold."""
        if window.peers.size > 1:
            return  # a rank may have no row that reaches a parameter
        reached = list(compress(window.gradients.named, window.peers.present(window)))
        held = list(map(_HELD, reached))
        if not window.options.optimizers:
            if window.gradients.named and not reached and window.denominator.contributed:
                raise NoGraphError(
                    "the loss depends on no parameter of the model that requires a gradient, so there is no gradient. "
                    "Compute the loss, and what encode= returns, with the model that the function is given, and "
                    "without detach() or torch.no_grad()"
                )
            return
        if not any(held) and window.denominator.contributed:
            raise NoGraphError(
                "the loss depends on no parameter that an optimizer of this accumulator holds, so the step would "
                "change nothing. Compute the loss with the model that the loss function is given, and create the "
                "optimizer from the parameters of this model, after the last change to its layers (such as LoRA)"
            )
        if all(held) or window.setup.warn.has("coverage"):
            return
        missing = [each.name for each in reached if not each.held]
        more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
        window.setup.warn(
            "coverage",
            f"no optimizer of this accumulator holds {', '.join(missing[:_NAMED])}{more}: their gradients were "
            "computed, and the step leaves these parameters as they are. If that is meant, call "
            "parameter.requires_grad_(False), which saves their backward; otherwise add them to an optimizer "
            "with optimizer.add_param_group",
        )

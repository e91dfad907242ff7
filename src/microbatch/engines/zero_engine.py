"""A DeepSpeed engine as a window uses it: the only module that knows where the engine keeps its gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from microbatch.gradients.clipping import gradient_norm
from microbatch.gradients.gradient_sum import GradientSum
from microbatch.gradients.parameters import Named


class ZeroEngine:
    """Call a DeepSpeed engine, of any ZeRO stage.

    Args:
        engine: What ``deepspeed.initialize`` returned first.

    Attributes:
        engine: The engine.
        stage: Its ZeRO stage, 0 to 3.
        together: Whether passes communicate, so that all ranks need the same number of them. Without ZeRO and with
            ZeRO-1, the engine reduces gradients once, at the end. From ZeRO-2 on it reduces them in every backward, and
            ZeRO-3 also gathers weights.
    """

    def __init__(self, engine: Any) -> None:
        self.engine, self.stage = engine, int(engine.zero_optimization_stage())
        # ZeRO-1 has an option to overlap its reduction with the last backward.
        self.together = self.stage >= 2 or bool(getattr(engine.optimizer, "overlap_comm", False))
        self._managed: bool = engine.managed_gradient_accumulation()

    @property
    def scales(self) -> bool:
        """Whether the engine scales losses, and so handles infinite gradients itself."""
        engine = self.engine
        narrow = engine.torch_autocast_enabled() and engine.torch_autocast_dtype() == torch.float16
        return bool(engine.fp16_enabled() or narrow)

    @property
    def on_host(self) -> bool:
        """Whether the optimizer is on the host, with a part of the gradient that the engine cannot drop."""
        return bool(self.engine.zero_use_cpu_optimizer())

    def keep_boundary(self, stack: ExitStack) -> None:
        """Restore, when a stack is closed, what decides where an accumulation ends; `None`: the engine counts."""
        if self._managed:
            before = getattr(self.engine, "_is_gradient_accumulation_boundary", None)
            stack.callback(self.engine.set_gradient_accumulation_boundary, before)

    def set_boundary(self, *, last: bool) -> None:
        """Set whether the next backward is the last one of the step."""
        if self._managed:
            self.engine.set_gradient_accumulation_boundary(last)

    def backward(self, loss: Tensor) -> None:
        """Run the engine's backward of a loss that is divided already."""
        self.engine.backward(loss, scale_wrt_gas=False)

    def reduce(self, parameters: Sequence[Tensor]) -> Tensor:
        """Reduce the gradients, if the engine has not done it and does not do it in its step.

        Args:
            parameters: The trainable parameters.

        Returns:
            The norm of the gradient; NaN if only the engine knows it.
        """
        self.set_boundary(last=True)
        if self._managed and not self.together:
            self.engine.allreduce_gradients()
            if self.stage == 0 and not self.scales:
                return gradient_norm([p.grad for p in parameters if p.grad is not None], self.engine.device)
        return torch.tensor(math.nan, device=self.engine.device)

    def step(self) -> dict[str, Any]:
        """Take the engine's step, which clips.

        Returns:
            Fields of the `Step` record: whether the step was applied, and the norm if the engine returns one.
        """
        self.engine.step()
        norm, applied = self.engine.get_global_grad_norm(), bool(self.engine.was_step_applied())
        found = {} if norm is None else {"grad_norm": torch.tensor(float(norm), device=self.engine.device)}
        return found | {"applied": applied}

    def drop(self) -> None:
        """Drop the gradient of a window that failed, as the engine does after an overflow."""
        self.engine.optimizer.zero_grad()
        self.engine.zero_grad()
        # ZeRO-3 starts a new gradient after its zero_grad.
        for name in ("averaged_gradients", "all_grad_tensors"):
            held = getattr(self.engine.optimizer, name, {})
            held.update(dict.fromkeys(held))

    def describe(self) -> dict[str, str]:
        """Describe the settings that must be the same on all ranks.

        Returns:
            Texts by name; the names are those of DeepSpeed's configuration.
        """
        engine = self.engine
        found = {
            "the model": type(engine.module).__name__,
            "zero_optimization.stage": self.stage,
            "zero_optimization.overlap_comm": engine.zero_overlap_comm(),
            "zero_optimization.reduce_bucket_size": engine.zero_reduce_bucket_size(),
            "gradient_clipping": float(engine.gradient_clipping()),
            "gradient_allreduce_op": "mean" if engine.gradient_average else "sum",
            "prescale_gradients": not engine.postscale_gradients(),
            "gradient_predivide_factor": float(engine.gradient_predivide_factor()),
            "managed_gradient_accumulation": self._managed,
            "fp16.enabled": engine.fp16_enabled(),
            "bf16.enabled": engine.bfloat16_enabled(),
        }
        return {name: str(value) for name, value in found.items()}


class EngineGradients(GradientSum):
    """The gradients of a window that an engine holds: the window itself neither adds them up nor divides them.

    After an error, `ZeroEngine.drop` drops them; the window has nothing to restore.

    Args:
        zero: The engine.
    """

    def __init__(self, zero: ZeroEngine) -> None:
        super().__init__(torch.float32)
        self._zero = zero

    def open(self, named: Sequence[Named]) -> None:
        """Start a window; the engine's gradients stay where they are.

        Args:
            named: The window's parameters.
        """
        self._named, self._parameters = list(named), [each.parameter for each in named]

    @property
    def present(self) -> list[bool]:
        """Whether each parameter has a gradient that waits for its reduction."""
        return [getattr(each.parameter, self._where, None) is not None for each in self._named]

    def fill(self, wanted: Sequence[bool], sparse: Sequence[bool] = ()) -> None:
        """Make zero gradients for parameters that got one only on other ranks: ZeRO-1 would reduce other buckets.

        Args:
            wanted: For each parameter in the order of `open`, whether any rank has a gradient for it.
            sparse: Not used.
        """
        del sparse
        optimizer = self._zero.engine.optimizer
        if self._zero.together or not hasattr(optimizer, "get_gradient_for_reduction"):
            return  # other optimizers make zeros themselves
        optimizer.setup_buckets()  # the first gradient does so, and this rank may have none
        dtype = optimizer.gradient_accumulation_dtype if self._where == "grad_accum" else None
        for each, want in zip(self._named, wanted, strict=True):
            if want and getattr(each.parameter, self._where, None) is None:
                setattr(each.parameter, self._where, torch.zeros_like(each.parameter, dtype=dtype))

    def _sums(self, some: slice) -> list[Tensor | None]:
        return [None for _ in self._named[some]]

    @property
    def _where(self) -> str:
        """The attribute of a parameter in which gradients wait for their reduction."""
        return "grad_accum" if getattr(self._zero.engine.optimizer, "use_grad_accum_attribute", False) else "grad"

"""How the simulation reads a call that adds to the gradients."""

import ast
from dataclasses import replace
from fractions import Fraction
from typing import Any

from microbatch.linting.simulated import Simulated
from microbatch.linting.syntax import last_name, text_of
from microbatch.linting.values import Data, Obj, Unknown, is_number, number, tags

__all__ = ["BackwardCalls"]


class BackwardCalls(Simulated):
    """The part of the machine that runs backwards."""

    def backward_call(self, node: ast.Call) -> Any:
        """A call that adds to the gradients."""
        func = node.func
        base = self.evaluate(func.value) if isinstance(func, ast.Attribute) else None
        holder = base.kind if isinstance(base, Obj) else ""
        name = last_name(func)
        if name not in ("backward", "manual_backward"):
            return NotImplemented if holder == "native_scaler" else self._native_scaler(node)
        args, keywords = self.arguments(node)
        values = [v for v in self.flat([*args, *keywords.values()]) if isinstance(v, Data)]
        given = values[0] if values else None
        if (
            len(args) > 1
            and name == "backward"
            and all(isinstance(arg, (ast.List, ast.Tuple)) for arg in node.args[:2])
        ):
            self.trace.settings["cached"] = True  # gradients of outputs that were cached are handed on
        if isinstance(base, Data):
            weight = args[0] if args and name == "backward" else keywords.get("gradient")
            loss = base if weight is None else self._weighted(node, base, weight)
        elif given is not None:
            loss = given
        elif holder in ("optimizer", "accelerator", "engine", "model", "fabric", "self", "scaler") and not args:
            return None
        else:
            loss = self._unseen_loss(node)
            if any("n" in tags(value) for value in (base, *args)):
                loss = replace(loss, opaque=(f"divided in {loss.opaque[0]}",))
        if not loss.weights:
            loss = replace(loss, weights=self.this_microbatch())
        if isinstance(base, Obj) and holder == "accelerator":
            loss = self._accelerate_backward(base, loss)
        elif holder in ("engine", "model") and given is not None:
            self.trace.frameworks.add("deepspeed")
        elif holder == "fabric":
            self.trace.frameworks.add("fabric")
        elif name == "manual_backward":
            self.trace.frameworks.add("lightning")
        owner = self.frame.owner if name == "manual_backward" else None
        self.hook("on_before_backward", owner)
        self._add(node, loss)
        self.hook("on_after_backward", owner)
        return None

    def _weighted(self, node: ast.Call, loss: Data, weight: Any) -> Data:
        """A loss whose backward begins with another number than 1: `loss.backward(torch.tensor(1 / n))`."""
        if is_number(weight):
            return self.operate(loss, ast.Mult(), weight, node=node)
        given = next((k.value for k in node.keywords if k.arg == "gradient"), node.args[0] if node.args else node)
        if "ones" in text_of(given):
            return loss
        return replace(loss, opaque=(*loss.opaque, f"multiplied by `{text_of(given)}`"))

    def _unseen_loss(self, node: ast.Call) -> Data:
        """The loss of a backward where the file does not show it; `anything.scale(loss).backward()` scales it."""
        holder = node.func.value if isinstance(node.func, ast.Attribute) else None
        shown = node.args[0] if node.args else holder
        loss = self.opaque_loss(last_name(node.func) if shown is None else text_of(shown))
        return replace(loss, scaled=isinstance(holder, ast.Call) and last_name(holder.func) == "scale")

    def _add(self, node: ast.AST, loss: Data) -> None:
        if len(loss.weights) > 1 and not loss.number:
            self.trace.mark("retained", node, value=loss)
        self.trace.backward(node, loss, synced=self.sync_off == 0)

    def _accelerate_backward(self, accelerator: Obj, loss: Data) -> Data:
        steps = accelerator.info.get("steps", self.window() if "accumulate" in self.trace.frameworks else None)
        self.trace.frameworks.add("accelerate")
        if is_number(steps) and number(steps) not in (0, 1):
            # Accelerate divides by itself; a division in the script comes on top. Without `accumulate()` it divides
            # all the same, and nothing holds the step back.
            managed = "accumulate" in self.trace.frameworks
            self.used_window |= not managed
            divided = loss.divided if managed else getattr(accelerator.info.get("node"), "lineno", 1)
            return replace(loss.times(1 / Fraction(number(steps))), divided=divided)
        return loss

    def _native_scaler(self, node: ast.Call) -> Any:
        """Timm's scaler: backward, and at the boundary unscale, clip, step and update."""
        condition = next((k.value for k in node.keywords if k.arg in ("update_grad", "need_update")), None)
        update = self.truth(self.evaluate(condition), condition) if condition is not None else True
        args, keywords = self.arguments(node)
        values = self.flat([*args, *keywords.values()])
        losses = [v for v in values if isinstance(v, Data)]
        optimizer = next((v for v in values if isinstance(v, Obj) and v.kind == "optimizer"), None)
        if not losses or optimizer is None:
            return Unknown(text_of(node))
        loss = losses[0] if losses[0].weights else replace(losses[0], weights=self.this_microbatch())
        self._add(node, loss)
        if update:
            self.trace.step(node, optimizer.key, by_scaler=True)
        return Data(self.this_microbatch(), number=True)

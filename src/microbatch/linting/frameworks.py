"""What Accelerate, Fabric, Lightning, and the contexts of torch and apex do when a loop calls them."""

import ast
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from microbatch.linting.simulated import Simulated
from microbatch.linting.syntax import dotted, last_name, text_of
from microbatch.linting.values import Data, Obj, Unknown, is_number, number

__all__ = ["Frameworks"]


def _nothing() -> None:
    """Leave a context that does nothing to gradients."""


def _as_given(args: list[Any]) -> Any:
    """What `prepare()` and `setup()` return: the object that they were given, or the tuple of several."""
    if len(args) > 1:
        return tuple(args)
    return args[0] if args else Unknown("")


class Frameworks(Simulated):
    """The part of the machine that knows what frameworks do."""

    def _on_self(self, _base: Obj, node: ast.Call, attr: str) -> Any:
        """A method of Lightning's module or of an unknown base class."""
        if attr == "optimizers":
            return Obj("optimizer", "optimizer")
        if attr == "lr_schedulers":
            return Obj("scheduler", "scheduler")
        if attr in ("log", "log_dict"):
            if any(
                k.arg == "sync_dist" and isinstance(k.value, ast.Constant) and k.value.value is True
                for k in node.keywords
            ):
                self.trace.mark("sync", node, "sync_dist")
            args, keywords = self.arguments(node)
            for value in self.flat([*args, *keywords.values()]):
                if isinstance(value, Data) and value.kind == "loss" and value.weights:
                    self.trace.mark("log", node, attr, value=value, detail="all")  # averaged, without a wait
            return None
        if attr == "zero_grad":
            self.trace.zero(node, None)
            return None
        if attr == "print":
            return self.log_call(node, "print")
        return NotImplemented

    def _on_accelerator(self, base: Obj, node: ast.Call, attr: str) -> Any:
        if attr == "accumulate":
            self.trace.frameworks.add("accumulate")
            self.arguments(node)
            return Obj("context", "accumulate", {"accelerator": base})
        if attr in ("prepare", "prepare_model", "prepare_optimizer", "prepare_scheduler", "prepare_data_loader"):
            return self._prepare(node)
        if attr in ("clip_grad_norm_", "clip_grad_value_"):
            return self.clip_call(node, f"{base.name}.{attr}", unscales=True)
        if attr in ("log", "print"):
            return self.log_call(node, f"{base.name}.{attr}")
        if attr in ("gather", "reduce", "gather_for_metrics", "unwrap_model", "skip_first_batches"):
            args, _ = self.arguments(node)
            return args[0] if args else Unknown("")
        return NotImplemented

    def _prepare(self, node: ast.Call) -> Any:
        args, _ = self.arguments(node)
        self.trace.settings["prepare"] = node
        for value in args:
            if isinstance(value, Obj):
                value.info["prepared"] = True
        return _as_given(args)

    def _on_fabric(self, base: Obj, node: ast.Call, attr: str) -> Any:
        args, keywords = self.arguments(node)
        if attr == "no_backward_sync":
            self.trace.frameworks.add("no_sync")
            enabled = args[1] if len(args) > 1 else keywords.get("enabled", True)
            on = self.truth(enabled, node)
            return Obj("context", "no_sync" if on else "nothing")
        if attr == "launch":
            self.launch(args)
        if attr == "clip_gradients":
            return self.clip_call(node, attr)
        if attr in ("setup", "setup_dataloaders", "setup_module", "setup_optimizers"):
            return _as_given(args)
        if attr in ("log", "log_dict", "print"):
            return self.log_call(node, f"{base.name}.{attr}", evaluated=self.flat([*args, *keywords.values()]))
        return Unknown(text_of(node))

    # ---- contexts

    def enter(self, item: ast.withitem) -> Callable[[], None]:
        """Enter one context; the result is called to leave it."""
        value = self._context_value(item.context_expr)
        target = item.optional_vars
        if isinstance(value, Obj) and value.kind == "context" and value.name in ("no_grad", "inference_mode"):
            self.without_graph += 1
            return self._with_graph
        if isinstance(value, Obj) and value.kind == "context":
            if value.name == "no_sync":
                self.trace.frameworks.add("no_sync")
                self.sync_off += 1
                return self._sync_on
            if value.name == "accumulate":
                return self._accumulate(value.info["accelerator"])
            if value.name == "scale_loss":
                if target is not None:
                    self.store(target, value.info["loss"])
                return self.trace.unscale_all
        if isinstance(value, Obj) and value.kind == "instance":
            value, leave = self.enter_object(value)
            if target is not None:
                self.store(target, value)
            return leave
        if target is not None:
            known = value if isinstance(value, (Obj, Data)) else self.guess(dotted(target))
            self.store(target, known or Unknown(text_of(target)))
        return _nothing

    def _context_value(self, node: ast.expr) -> Any:
        if isinstance(node, ast.Call):
            name = last_name(node.func)
            if name == "scale_loss":
                args, _ = self.arguments(node)
                loss = next((v for v in args if isinstance(v, Data)), None)
                if loss is None:
                    first = args[0] if args else None
                    loss = self.unseen_loss(first, text_of(node.args[0]) if node.args else "a loss")
                return Obj("context", "scale_loss", {"loss": replace(loss, scaled=True, kind="loss")})
            if name in ("join", "ExitStack", "profile", "device", "stream"):
                return None
            if (
                "sync" in name
                and name not in ("no_sync", "no_backward_sync")
                and self.module.resolve(node.func, self.frame.owner) is None
            ):
                self.trace.frameworks.add("no_sync")  # a switch of its own, by its name
        return self.evaluate(node)

    def _with_graph(self) -> None:
        self.without_graph -= 1

    def _sync_on(self) -> None:
        self.sync_off -= 1

    def _accumulate(self, accelerator: Obj) -> Callable[[], None]:
        count = self.heap.get("accelerator count", 0) + 1
        steps = accelerator.info.get("steps", self.window())
        every = int(number(steps)) if is_number(steps) and number(steps) else self.run.microbatches
        self.heap["accelerator count"] = count
        now = count % every == 0 or self.at_last
        self.heap["accelerator sync"] = now
        if now:
            self.heap["accelerator count"] = 0
            return _nothing
        self.sync_off += 1
        return self._sync_on

"""What optimizers, scalers, schedulers, Accelerate, Lightning, Fabric, DeepSpeed and apex do when a loop calls them."""

import ast
from dataclasses import replace
from fractions import Fraction
from typing import Any

from microbatch.linting.guesses import MEAN_LOSSES, kind_of_constructor, kind_of_name
from microbatch.linting.module import dotted, last_name, text_of
from microbatch.linting.trace import Gradients
from microbatch.linting.values import Bound, Data, Function, Num, Obj, Unknown, is_number, number, tags

__all__ = ["Frameworks"]

_LOG_METHODS = frozenset(
    "update add append log log_dict add_scalar add_scalars info debug warning set_postfix set_postfix_str set_description write print "
    "log_metrics log_scalar track push".split()
)


def _nothing() -> None:
    pass


class Frameworks:
    """The part of the machine that knows what training objects do."""

    # ---- what a constructor makes

    def made_by(self, node: ast.Call, text: str) -> Any:
        """The object that a constructor of the field makes, or `None`."""
        if not text:
            return None
        kind = kind_of_constructor(text)
        if kind is None or (kind == "optimizer" and text.rsplit(".", 1)[-1] in ("optimizers", "optimizer") and not node.args and not node.keywords):
            return None
        args, keywords = self.arguments(node)
        name = text.rsplit(".", 1)[-1]
        if kind == "ddp":
            self.trace.frameworks.add("ddp")
            self.trace.settings.setdefault("ddp", node)
            return args[0] if args and isinstance(args[0], Obj) else Obj("model", name)
        if kind == "criterion":
            said = keywords.get("reduction")
            reduction = said if isinstance(said, str) else ("mean" if MEAN_LOSSES.search(text) else "")
            return Obj("criterion", name, {"reduction": reduction, "ignore": node.lineno if "ignore_index" in keywords else 0})
        self.made += 1
        made = Obj(kind, name, {"node": node, "key": f"{name} {self.made}"})
        if kind == "optimizer":
            self.trace.settings.setdefault("optimizers", {})[name] = node
            self.trace.mark("optimizer", node, name)
            self.trace.groups[made.key] = Gradients()
        elif kind == "scheduler":
            made.info["units"] = self._units([*args, *keywords.values()])
        elif kind == "accelerator":
            plugin = keywords.get("gradient_accumulation_plugin")
            steps = keywords.get("gradient_accumulation_steps")
            made.info["steps"] = steps if steps is not None else (self.window() if plugin is not None or "**" in keywords else 1)
            self.heap["accelerator"] = made
        elif kind == "scaler" and keywords.get("enabled") is False:
            made.info["off"] = True
        return made

    @staticmethod
    def _units(values: list[Any]) -> str:
        """What a scheduler's length counts: "microbatches" or "windows", by what is in its numbers; empty if the file does not show it."""
        found = [tags(v) for v in values if "len" in tags(v)]
        if not found:
            return ""
        return "windows" if any("n" in origin for origin in found) else "microbatches"

    # ---- backward

    def backward_call(self, node: ast.Call) -> Any:
        """A call that adds to the gradients."""
        func = node.func
        base = self.evaluate(func.value) if isinstance(func, ast.Attribute) else None
        name = last_name(func)
        if name not in ("backward", "manual_backward"):
            return self._native_scaler(node) if not isinstance(base, Obj) or base.kind != "native_scaler" else NotImplemented
        args, keywords = self.arguments(node)
        values = [v for v in self.flat([*args, *keywords.values()]) if isinstance(v, Data)]
        given = values[0] if values else None
        if len(args) > 1 and name == "backward" and all(isinstance(arg, ast.List | ast.Tuple) for arg in node.args[:2]):
            self.trace.settings["cached"] = True  # gradients of outputs that were cached are handed on
        holder = base.kind if isinstance(base, Obj) else ""
        if isinstance(base, Data):
            loss = base
        elif given is not None:
            loss = given
        elif isinstance(base, Obj) and base.kind in ("optimizer", "accelerator", "engine", "model", "fabric", "self", "scaler") and not args:
            return None
        else:
            what = text_of(node.args[0]) if node.args else text_of(func.value) if isinstance(func, ast.Attribute) else name
            loss = replace(self.opaque_loss(what), scaled=self._is_scaled(func))
        if not loss.weights:
            loss = replace(loss, weights=self.this_microbatch())
        if holder == "accelerator":
            loss = self._accelerate_backward(base, loss)
        elif holder in ("engine", "model") and given is not None:
            self.trace.frameworks.add("deepspeed")
            self.trace.settings.setdefault("deepspeed", node)
        elif holder == "fabric":
            self.trace.frameworks.add("fabric")
        elif name == "manual_backward":
            self.trace.frameworks.add("lightning")
        self._add(node, loss)
        return None

    @staticmethod
    def _is_scaled(func: ast.AST) -> bool:
        """Whether a loss that cannot be seen went through a scaler: `anything.scale(loss).backward()`."""
        return isinstance(func, ast.Attribute) and isinstance(func.value, ast.Call) and last_name(func.value.func) == "scale"

    def opaque_loss(self, what: str) -> Data:
        """A loss of this microbatch, of which the file does not show how it is made."""
        return Data(self.this_microbatch(), kind="loss", opaque=(f"`{what}`",))

    def _add(self, node: ast.AST, loss: Data) -> None:
        if len(loss.weights) > 1 and not loss.number:
            self.trace.mark("retained", node, value=loss)
        self.trace.backward(node, loss, synced=self.sync_off == 0, owner=self.frame.function)

    def _accelerate_backward(self, accelerator: Obj, loss: Data) -> Data:
        steps = accelerator.info.get("steps", self.window() if "accumulate" in self.trace.frameworks else None)
        self.trace.frameworks.add("accelerate")
        if is_number(steps) and number(steps) not in (0, 1):
            # Accelerate divides by itself; a division in the script comes on top.
            return replace(loss.times(1 / Fraction(number(steps))), divided=loss.divided)
        return loss

    def _native_scaler(self, node: ast.Call) -> Any:
        """timm's scaler: backward, and at the boundary unscale, clip, step and update."""
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

    # ---- attributes and methods of objects

    def attribute_of_object(self, base: Obj, node: ast.Attribute) -> Any:
        """What an attribute of a known object is; `None` if it is not known."""
        kind, attr = base.kind, node.attr
        if kind == "accelerator" and attr == "sync_gradients":
            return self.heap.get("accelerator sync", True)
        if kind == "accelerator" and attr in ("is_main_process", "is_local_main_process"):
            return True
        if attr in ("no_sync", "backward", "step", "zero_grad"):
            return Bound(base, attr, text_of(node))
        if kind == "model" and attr == "module":
            return base
        if kind == "optimizer" and attr in ("optimizer", "_optimizer"):
            return base
        if kind == "meter" and attr in ("avg", "val", "value", "global_avg", "sum", "count"):
            return Unknown(text_of(node))
        return None

    def call_bound(self, bound: Bound, node: ast.Call, args: list[Any], keywords: dict[str, Any]) -> Any:
        """A method that was kept in a variable and is called now."""
        if bound.attribute == "no_sync":
            return Obj("context", "no_sync")
        if isinstance(bound.base, Obj) and bound.base.kind == "optimizer":
            return self._optimizer(bound.base, node, bound.attribute, args)
        return Unknown(text_of(node))

    def object_method(self, base: Obj, node: ast.Call, func: ast.Attribute) -> Any:
        """A method of a known object; `NotImplemented` where nothing is known of it."""
        attr, kind = func.attr, base.kind
        if attr == "no_sync" and kind in ("model", "engine", "accelerator", "instance", "self"):
            self.trace.frameworks.add("no_sync")
            return Obj("context", "no_sync")
        method = getattr(self, f"_on_{kind}", None)
        return method(base, node, attr) if method is not None else NotImplemented

    def _on_optimizer(self, base: Obj, node: ast.Call, attr: str) -> Any:
        if attr in ("step", "zero_grad", "optimizer_step"):
            args, _ = self.arguments(node)
            return self._optimizer(base, node, attr, args)
        if attr in ("clip_master_grads", "clip_grad_norm"):
            return self.clip_call(node, attr)
        if attr == "synchronize":
            return None
        return NotImplemented

    def _optimizer(self, base: Obj, node: ast.AST, attr: str, args: list[Any]) -> None:
        if not self._runs_now(base):
            return
        if attr == "zero_grad":
            self.trace.zero(node, base.key)
            return
        for value in args:
            if isinstance(value, Function):
                self.call_function(value, [], {})
        self.trace.step(node, base.key)

    def _runs_now(self, base: Obj) -> bool:
        """Whether a call does something: a prepared object of Accelerate sleeps off the boundary of `accumulate()`."""
        if self.heap.get("accelerator sync", True):
            return True
        return not (base.info.get("prepared") or not self.trace.settings.get("prepare"))

    def _on_scaler(self, base: Obj, node: ast.Call, attr: str) -> Any:
        args, _ = self.arguments(node)
        first = args[0] if args else None
        if attr == "scale":
            if not isinstance(first, Data):
                first = self.opaque_loss(text_of(node.args[0]) if node.args else "a loss")
            return first if base.info.get("off") else replace(first, scaled=True)
        name = first.key if isinstance(first, Obj) else "optimizer"
        if attr == "step":
            if not isinstance(first, Obj) or self._runs_now(first):
                self.trace.mark("scaler step", node, name)
                self.trace.step(node, name, by_scaler=True)
        elif attr == "unscale_":
            self.trace.unscale(node, name)
        elif attr == "update":
            self.trace.update(node)
        else:
            return Unknown(text_of(node))
        return None

    def _on_scheduler(self, base: Obj, node: ast.Call, attr: str) -> Any:
        args, _ = self.arguments(node)
        if attr == "step" and not args and not node.keywords:
            if self._runs_now(base):
                prepared = bool(base.info.get("prepared")) or not self.trace.settings.get("prepare")
                self.trace.mark("schedule", node, base.name, base.info.get("units", ""), "" if prepared else "unprepared")
            return None
        return Unknown(text_of(node))

    def _on_ema(self, base: Obj, node: ast.Call, attr: str) -> Any:
        args, keywords = self.arguments(node)
        if attr in ("update", "step", "update_parameters", "update_ema", "step_ema"):
            exact = any("n" in tags(v) for v in [*args, *keywords.values()])
            self.trace.mark("ema", node, base.name, detail="adapted" if exact else "")
            return None
        return Unknown(text_of(node))

    def _on_model(self, base: Obj, node: ast.Call, attr: str) -> Any:
        if attr == "zero_grad":
            if self._runs_now(base):
                self.trace.zero(node, None)
            return None
        if attr == "step" and "deepspeed" in self.trace.frameworks:
            self.trace.mark("engine step", node, base.name)
            return None
        if attr in ("train", "eval", "to", "cuda", "half", "apply", "requires_grad_", "module"):
            return base
        if attr in ("parameters", "named_parameters", "state_dict", "modules", "named_modules", "children", "load_state_dict", "buffers"):
            return Unknown(f"{dotted(node.func.value) or base.name}.{attr}()" if isinstance(node.func, ast.Attribute) else attr)
        made = self.made_by(node, attr)
        return made if made is not None else self.forward(node)

    _on_engine = _on_model

    def _on_criterion(self, base: Obj, node: ast.Call, attr: str) -> Any:
        if attr in ("forward", "calc", "compute", "calculate", "compute_loss", "get_loss", "__call__"):
            return self.loss_call(node, base.info.get("reduction", ""), base.name, info=base.info)
        return NotImplemented

    def _on_instance(self, base: Obj, node: ast.Call, attr: str) -> Any:
        return self._on_model(base, node, attr) if attr in ("zero_grad", "train", "eval", "parameters") else NotImplemented

    def _on_loader(self, base: Obj, node: ast.Call, attr: str) -> Any:
        args, _ = self.arguments(node)
        if attr in ("next", "get_batch", "sample", "next_batch", "__next__"):
            return Data({}, kind="batch")
        return base if attr in ("__iter__", "iter", "get_varlen_iter", "shuffle") else Unknown(text_of(node))

    def _on_log(self, base: Obj, node: ast.Call, attr: str) -> Any:
        if attr in _LOG_METHODS:
            return self.log_call(node, f"{base.name}.{attr}")
        if attr == "log_every":
            args, _ = self.arguments(node)
            return args[0] if args else Unknown("")
        return Unknown(text_of(node))

    def _on_meter(self, base: Obj, node: ast.Call, attr: str) -> Any:
        return self._on_log(base, node, attr)

    def _on_self(self, base: Obj, node: ast.Call, attr: str) -> Any:
        """A method of Lightning's module or of an unknown base class."""
        if attr == "optimizers":
            return Obj("optimizer", "optimizer")
        if attr == "lr_schedulers":
            return Obj("scheduler", "scheduler")
        if attr in ("log", "log_dict"):
            if any(k.arg == "sync_dist" and isinstance(k.value, ast.Constant) and k.value.value is True for k in node.keywords):
                self.trace.mark("sync", node, "sync_dist")
            self.arguments(node)  # Lightning averages what it is given over the microbatches, without a wait
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
            self.trace.settings.setdefault("accumulate", node)
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
        return tuple(args) if len(args) > 1 else args[0] if args else Unknown("")

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
            return tuple(args) if len(args) > 1 else args[0] if args else Unknown("")
        if attr in ("log", "log_dict", "print"):
            return self.log_call(node, f"{base.name}.{attr}", evaluated=self.flat([*args, *keywords.values()]))
        return Unknown(text_of(node))

    def clip_call(self, node: ast.Call, name: str, *, unscales: bool = False) -> Any:
        """Gradients are clipped."""
        args, keywords = self.arguments(node)
        limits = [*args[1:], *keywords.values()]
        if any(isinstance(v, float) and v == float("inf") for v in limits) or any("inf" in text_of(a) for a in node.args[1:]):
            return Unknown(text_of(node))  # a norm is measured, nothing is clipped
        if unscales:
            for group in self.trace.every_group():
                group.scaled = False
        self.trace.clip(node, name)
        return Unknown(text_of(node), data=True)

    # ---- contexts

    def enter(self, item: ast.withitem) -> Any:
        """Enter one context; the result is called to leave it."""
        value = self._context_value(item.context_expr)
        target = item.optional_vars
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
                return self._apex_left
        if target is not None:
            guessed = self.guess(dotted(target))
            self.store(target, value if isinstance(value, Obj | Data) and value is not None else guessed or Unknown(text_of(target)))
        return _nothing

    def _context_value(self, node: ast.expr) -> Any:
        if isinstance(node, ast.Call):
            name = last_name(node.func)
            if name == "scale_loss":
                args, _ = self.arguments(node)
                loss = next((v for v in args if isinstance(v, Data)), Data(self.this_microbatch(), kind="loss"))
                return Obj("context", "scale_loss", {"loss": replace(loss, scaled=True, kind="loss")})
            if name in ("join", "ExitStack", "profile", "device", "stream"):
                return None
            if "sync" in name and name not in ("no_sync", "no_backward_sync") and self.module.resolve(node.func, self.frame.owner) is None:
                self.trace.frameworks.add("no_sync")  # a switch of its own, by its name
        return self.evaluate(node)

    def _sync_on(self) -> None:
        self.sync_off -= 1

    def _apex_left(self) -> None:
        for group in self.trace.every_group():
            group.scaled = False

    def _accumulate(self, accelerator: Obj) -> Any:
        count = self.heap.get("accelerator count", 0) + 1
        steps = accelerator.info.get("steps", self.window())
        every = int(number(steps)) if is_number(steps) and number(steps) else self.run.microbatches
        self.heap["accelerator count"] = count
        now = count % every == 0 or getattr(self, "at_last", False)
        self.heap["accelerator sync"] = now
        if now:
            self.heap["accelerator count"] = 0
            return _nothing
        self.sync_off += 1
        return self._sync_on

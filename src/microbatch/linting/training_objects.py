"""What optimizers, scalers, schedulers, models and other objects of a loop do when it calls them."""

import ast
import re
from dataclasses import replace
from typing import Any

from microbatch.linting.guesses import MEAN_LOSSES, kind_of_constructor, kind_of_name
from microbatch.linting.simulated import Simulated
from microbatch.linting.syntax import dotted, last_name, text_of
from microbatch.linting.trace import Gradients
from microbatch.linting.values import Bound, Data, Function, Obj, Unknown, is_number, number, tags

__all__ = ["TrainingObjects"]

_METHODS = {  # that only an object of this kind has
    "scaler": ("scale", "unscale_", "step", "update"),
    "optimizer": ("step", "zero_grad"),
    "scheduler": ("step",),
}
_USES = re.compile(r"(step|update|zero|clip|save|log|apply)_")  # verbs of what is done with an object that is there
_LOGS = re.compile(r"^(log|write|record|report|add)_\w*(metric|scalar|loss|value|stat)")
_LOG_METHODS = frozenset(
    [
        "update",
        "add",
        "append",
        "log",
        "log_dict",
        "add_scalar",
        "add_scalars",
        "info",
        "debug",
        "warning",
        "set_postfix",
        "set_postfix_str",
        "set_description",
        "write",
        "print",
        "log_metrics",
        "log_scalar",
        "track",
        "push",
    ]
)


class TrainingObjects(Simulated):
    """The part of the machine that knows what training objects do."""

    # ---- what a constructor makes

    def made_by(self, node: ast.Call, text: str) -> Any:
        """The object that a constructor of the field makes, or `None`."""
        if not text:
            return None
        kind = kind_of_constructor(text)
        if (
            kind is None
            or text.endswith("optimizer_step")
            or _USES.match(text.rsplit(".", 1)[-1])
            or (
                kind == "optimizer"
                and text.rsplit(".", 1)[-1] in ("optimizers", "optimizer")
                and not node.args
                and not node.keywords
            )
        ):
            return None
        args, keywords = self.arguments(node)
        name = text.rsplit(".", 1)[-1]
        if kind == "ddp":
            self.trace.frameworks.add("ddp")
            return args[0] if args and isinstance(args[0], Obj) else Obj("model", name)
        if kind == "criterion":
            said = keywords.get("reduction")
            reduction = said if isinstance(said, str) else ("mean" if MEAN_LOSSES.search(text) else "")
            return Obj(
                "criterion", name, {"reduction": reduction, "ignore": node.lineno if "ignore_index" in keywords else 0}
            )
        self.made += 1
        made = Obj(kind, name, {"node": node, "key": f"{name} {self.made}"})
        if kind == "optimizer":
            self.trace.settings.setdefault("optimizers", {})[name] = node
            self.trace.mark("optimizer", node, name)
            self.trace.groups[made.key] = Gradients()
            if any("by n" in tags(v) for v in [*args, *keywords.values()]):
                self.trace.settings["small rate"] = node
        elif kind == "scheduler":
            made.info["units"] = self._units([*args, *keywords.values(), *self._captured(args)])
        elif kind == "accelerator":
            plugin = keywords.get("gradient_accumulation_plugin")
            steps = keywords.get("gradient_accumulation_steps")
            if steps is None:
                steps = self.window() if plugin is not None else 1
                if "**" in keywords:  # a guess: a loop under `accumulate()` gives it steps, another one does not
                    steps = self.window() if "accumulate" in self.module.names_text.split() else 1
            made.info["steps"] = self.window() if is_number(steps) and number(steps) > 1 else steps
            self.heap["accelerator"] = made
        elif kind == "scaler" and keywords.get("enabled") is False:
            made.info["off"] = True
        return made

    def _captured(self, values: list[Any]) -> list[Any]:
        """The numbers around a lambda that it reads: the length in `LambdaLR(optimizer, lambda k: k / length)`."""
        found: list[Any] = []
        for function in (v for v in values if isinstance(v, Function) and v.name == "lambda"):
            own = {arg.arg for arg in function.node.args.args}
            for node in ast.walk(function.node.body[0]):
                if isinstance(node, ast.Name) and node.id not in own:
                    frame = self.frame.find(node.id)
                    found += [] if frame is None else [frame.locals[node.id]]
        return found

    @staticmethod
    def _units(values: list[Any]) -> str:
        """What a scheduler's length counts, by what is in its numbers.

        Returns:
            "microbatches" or "windows"; "perhaps" if they are microbatches by the name of a batch size; else empty.
        """
        found = [tags(v) for v in values if tags(v) & {"len", "perhaps len"}]
        if not found:
            return ""
        if any("n" in origin for origin in found):
            return "windows"
        return "microbatches" if any("len" in origin for origin in found) else "perhaps"

    # ---- attributes and methods of objects

    def holder_of(self, func: ast.Attribute) -> Any:
        """What a method is called of: also an object among the settings, as in `config.scaler.step(optimizer)`."""
        base = self.evaluate(func.value)
        kind = kind_of_name(last_name(func.value)) if isinstance(base, Unknown) and not base.data else None
        return Obj(kind, last_name(func.value)) if kind and func.attr in _METHODS.get(kind, ()) else base

    def attribute_of_object(self, base: Obj, node: ast.Attribute) -> Any:
        """What an attribute of a known object is; `None` if it is not known."""
        kind, attr = base.kind, node.attr
        if kind == "accelerator" and attr == "sync_gradients":
            return self.heap.get("accelerator sync", True)
        if kind == "accelerator" and attr in ("is_main_process", "is_local_main_process"):
            return True
        if attr in ("no_sync", "backward", "step", "zero_grad"):
            return Bound(base, attr)
        if kind == "model" and attr == "module":
            return base
        if kind == "optimizer" and attr in ("optimizer", "_optimizer"):
            return base
        if kind == "meter" and attr in ("avg", "val", "value", "global_avg", "sum", "count"):
            return Unknown(text_of(node))
        return None

    def call_bound(self, bound: Bound, node: ast.Call, args: list[Any]) -> Any:
        """A method that was kept in a variable and is called now."""
        if bound.attribute == "no_sync":
            return Obj("context", "no_sync")
        if isinstance(bound.base, Obj) and bound.base.kind == "optimizer":
            return self._optimizer(bound.base, node, bound.attribute, args=args)
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
        if attr in ("step", "zero_grad", "optimizer_step") or attr.startswith("step_"):
            attr = attr if attr == "zero_grad" else "step"
            args, _ = self.arguments(node)
            return self._optimizer(base, node, attr, args=args)
        if attr in ("clip_master_grads", "clip_grad_norm"):
            return self.clip_call(node, attr)
        if attr == "synchronize":
            return None
        return NotImplemented

    def _optimizer(self, base: Obj, node: ast.AST, attr: str, *, args: list[Any]) -> None:
        if not self._runs_now(base):
            return
        if attr == "zero_grad":
            self.trace.zero(node, base.key)
            return
        for value in args:
            if isinstance(value, Function):
                self.call_function(value, [], {})
        if "lightning" in self.trace.frameworks:
            self.hook("on_before_optimizer_step", self.frame.owner)
        scales = any(isinstance(value, Obj) and value.kind == "scaler" for value in args)  # a wrapper that is given it
        self.trace.step(node, base.key, by_scaler=scales)

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
                first = self.unseen_loss(first, text_of(node.args[0]) if node.args else "a loss")
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
                self.trace.mark(
                    "schedule",
                    node,
                    base.name,
                    value=base.info.get("units", ""),
                    detail="" if prepared else "unprepared",
                )
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
        if attr in (
            "parameters",
            "named_parameters",
            "state_dict",
            "modules",
            "named_modules",
            "children",
            "load_state_dict",
            "buffers",
        ):
            holder = dotted(node.func.value) if isinstance(node.func, ast.Attribute) else ""
            return Unknown(f"{holder or base.name}.{attr}()")
        made = self.made_by(node, attr)
        if made is None:
            made = self.own_loss(base, node, attr)
        return made if made is not None else self.forward(node)

    _on_engine = _on_model

    def _on_criterion(self, base: Obj, node: ast.Call, attr: str) -> Any:
        if attr in ("forward", "calc", "compute", "calculate", "compute_loss", "get_loss", "__call__"):
            return self.loss_call(node, base.info.get("reduction", ""), base.name, info=base.info)
        return base if attr in ("to", "cuda", "train", "eval", "cpu", "double", "float", "half") else NotImplemented

    def _on_instance(self, base: Obj, node: ast.Call, attr: str) -> Any:
        known = attr in ("zero_grad", "train", "eval", "parameters")
        return self._on_model(base, node, attr) if known else NotImplemented

    def _on_loader(self, base: Obj, node: ast.Call, attr: str) -> Any:
        self.arguments(node)
        if attr in ("next", "get_batch", "sample", "next_batch", "__next__"):
            return Data({}, kind="batch")
        return base if attr in ("__iter__", "iter", "get_varlen_iter", "shuffle") else Unknown(text_of(node))

    def _on_log(self, base: Obj, node: ast.Call, attr: str) -> Any:
        if attr in _LOG_METHODS or _LOGS.search(attr):
            return self.log_call(node, f"{base.name}.{attr}")
        if attr == "log_every":
            args, _ = self.arguments(node)
            return args[0] if args else Unknown("")
        return Unknown(text_of(node))

    _on_meter = _on_log

    def clip_call(self, node: ast.Call, name: str, *, unscales: bool = False) -> Any:
        """Gradients are clipped."""
        args, keywords = self.arguments(node)
        limits = [*args[1:], *keywords.values()]
        if any(isinstance(v, float) and v == float("inf") for v in limits) or any(
            "inf" in text_of(a) for a in node.args[1:]
        ):
            return Unknown(text_of(node))  # a norm is measured, nothing is clipped
        if unscales:
            self.trace.unscale_all()
        given = (*node.args, *(keyword.value for keyword in node.keywords))
        self.trace.clip(node, name, handled=any("scal" in text_of(arg) for arg in given))
        return Unknown(text_of(node), data=True)

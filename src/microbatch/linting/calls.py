"""How the simulation reads a call.

It goes to a function of Python's own, to one of the file, to a method of data or of an object, or to what the file does
not show.
"""

import ast
import re
from dataclasses import replace
from functools import lru_cache
from typing import Any

from microbatch.linting.backward_calls import BackwardCalls
from microbatch.linting.call_words import words_of
from microbatch.linting.frameworks import Frameworks
from microbatch.linting.guesses import CLIP_CALLS, COUPLED_LOSSES, MEASURED, PIECE_CALLS
from microbatch.linting.own_models import layers, losses_of_models, takes
from microbatch.linting.own_objects import OwnObjects
from microbatch.linting.python_functions import PYTHON_FUNCTIONS
from microbatch.linting.syntax import dotted, is_backward_call, is_gradient, last_name, text_of
from microbatch.linting.tensor_calls import TensorCalls, is_zeros, pairs_rows, within_rows
from microbatch.linting.training_objects import TrainingObjects
from microbatch.linting.values import Bound, Data, Function, Obj, Unknown, is_number, number, tags

__all__ = ["Calls", "is_library"]

_LIBRARIES = re.compile(
    r"^(torch|F|nn|np|numpy|math|functional|dist|tf|jnp|os|time|random|json|re|functools|itertools|collections|copy|gc)(\.|$)"
)
_AVERAGES = re.compile(
    r"(^|_)ema(_|$)|update_teacher|momentum_update|update_momentum|update_target_net|moving_average_update",
    re.IGNORECASE,
)
_NO_AVERAGES = re.compile(
    r"dict|stats|loss|metric|log|sched|decay|get|save|load|state|copy|eval|model$|init|register|store|restore|apply|swap",
    re.IGNORECASE,
)
_SCALINGS = {
    **dict.fromkeys(("mul", "multiply"), ast.Mult),
    **dict.fromkeys(("div", "divide", "true_divide"), ast.Div),
}
_OF_LISTS = frozenset({"append", "extend", "clear", "pop", "popleft", "format"})
_PRINTS = re.compile(r"_?(print|log|report|write_log)(\d|_|$)", re.IGNORECASE)


@lru_cache(8192)
def is_library(text: str) -> bool:
    """Whether a name begins with that of a library which the doctor knows."""
    return _LIBRARIES.match(text) is not None


def _kind_of_call(node: ast.Call) -> tuple[bool, bool]:
    """Whether a call updates an average of the weights, and whether it adds to the gradients, by its name."""
    found = getattr(node, "_kind", None)
    if found is None:
        name = last_name(node.func)
        averages = _AVERAGES.search(name) is not None and _NO_AVERAGES.search(name) is None
        found = node._kind = averages, is_backward_call(node) and name != ""  # type: ignore[attr-defined]
    return found


class Calls(BackwardCalls, Frameworks, OwnObjects, TensorCalls, TrainingObjects):
    """The part of the machine that reads calls."""

    def call(self, node: ast.Call) -> Any:
        """The value of a call, with what it does to the gradients."""
        func = node.func
        if self.names_window(node):
            return self.window()  # `config.get("accum_steps", 4)`
        target = self.module.resolve(func, self.frame.owner)
        averages, adds = _kind_of_call(node)
        if averages and self.trace.begun:
            self.trace.mark("ema", node, last_name(func))
        if adds and target is None:
            found = self.backward_call(node)
            if found is not NotImplemented:
                return found
        if isinstance(func, ast.Attribute):
            if self.scales_gradients(node, func):
                return None
            return self._method(node, func, target)
        if isinstance(func, ast.Name) and func.id in PYTHON_FUNCTIONS and func.id not in self.module.functions:
            return PYTHON_FUNCTIONS[func.id](self, node)
        return self._plain(node, self.evaluate(func))

    def arguments(self, node: ast.Call) -> tuple[list[Any], dict[str, Any]]:
        """The values of a call's arguments."""
        args: list[Any] = []
        for arg in node.args:
            value = self.evaluate(arg.value if isinstance(arg, ast.Starred) else arg)
            if isinstance(arg, ast.Starred) and isinstance(value, (tuple, list)):
                args.extend(value)
            else:
                args.append(value)
        keywords: dict[str, Any] = {}
        for keyword in node.keywords:
            value = self.evaluate(keyword.value)
            if keyword.arg is not None:
                keywords[keyword.arg] = value
            elif isinstance(value, dict):
                keywords |= {k: v for k, v in value.items() if isinstance(k, str)}
            else:
                keywords["**"] = value
        return args, keywords

    # ---- a plain name, or the result of another call

    def _plain(self, node: ast.Call, callee: Any) -> Any:
        text = dotted(node.func) or text_of(node.func)
        if isinstance(callee, Function):
            if _PRINTS.match(callee.name) and not self.module.reaches(self.module.key(callee)):
                return self.log_call(node, callee.name)
            args, keywords = self.arguments(node)
            made = self.call_function(callee, args, keywords)
            if isinstance(made, Data) and COUPLED_LOSSES.search(callee.name):
                return replace(made, coupled=made.coupled or node.lineno)
            return made
        if isinstance(callee, Obj) and callee.kind == "class":
            return self.construct(node, callee)
        if text in self.module.library_names and isinstance(callee, Unknown):
            return self._library(node, self.module.full_name(text))
        if isinstance(callee, Bound):
            args, _ = self.arguments(node)
            return self.call_bound(callee, node, args)
        last = text.rsplit(".", 1)[-1]
        if last[:1].isupper() and (made := self.made_by(node, text)) is not None:
            return made
        if CLIP_CALLS.match(last):
            return self.clip_call(node, text)
        if isinstance(callee, Obj):
            return self.call_object(callee, node)
        made = self.made_by(node, text)
        if made is not None:
            return made
        return self.unknown_call(node, text)

    def call_object(self, callee: Obj, node: ast.Call) -> Any:
        """A call of an object: a model, a loss, an object of a class of the file."""
        kind = callee.kind
        if kind == "instance":
            cls, find = callee.info["class"], self.module.find_method
            method = find(cls, "__call__") or find(cls, "forward")
            if method is not None:
                args, keywords = self.arguments(node)
                return self.call_function(method, args, keywords, owner=cls, holder=callee.info.get("id", ""))
        if kind in ("model", "engine"):
            return self.own_loss(callee, node, "forward") or self.forward(node)
        if kind == "criterion":
            return self.loss_call(node, callee.info.get("reduction", ""), callee.name, info=callee.info)
        if kind == "ema":
            self.trace.mark("ema", node, callee.name)
        if kind in ("log", "meter"):
            return self.log_call(node, callee.name)
        made = self.made_by(node, dotted(node.func))
        return made if made is not None else self.unknown_call(node, text_of(node.func))

    def own_loss(self, model: Obj, node: ast.Call, method: str) -> Any:
        """The loss that a model of the file computes itself; `None` where it computes none, or it cannot be read."""
        if not self.trace.begun:
            return None
        known = losses_of_models(self.module)
        given = len(node.args) + len(node.keywords)
        classes = {model.info["class"]} if "class" in model.info else {cls for cls, _ in known}
        found = [
            (cls, function)
            for (cls, name), function in known.items()
            if cls in classes and name == method and cls != self.frame.owner and takes(function.node, given)
        ]
        if len(found) != 1:
            return None
        args, keywords = self.arguments(node)
        made = self.call_function(found[0][1], args, keywords, owner=found[0][0])
        parts = made if isinstance(made, (tuple, list)) else [made]
        if not any(isinstance(v, Data) and v.kind == "loss" and v.weights and not v.opaque for v in parts):
            return None
        synced = [replace(v, forward_synced=self.sync_off == 0) if isinstance(v, Data) else v for v in parts]
        return tuple(synced) if isinstance(made, (tuple, list)) else synced[0]

    # ---- a method

    def _method(self, node: ast.Call, func: ast.Attribute, target: Function | None) -> Any:
        attr, text = func.attr, dotted(func)
        if text and (is_library(text) or text.partition(".")[0] in self.module.library_names):
            return self._library(node, self.module.full_name(text))
        base = self.holder_of(func)
        if (
            isinstance(base, Obj)
            and base.kind == "instance"
            and (own := self.module.find_method(base.info["class"], attr))
        ):
            args, keywords = self.arguments(node)
            return self.call_function(own, args, keywords, owner=base.info["class"], holder=base.info.get("id", ""))
        if target is not None:
            args, keywords = self.arguments(node)
            if isinstance(base, Obj) and base.kind == "self":
                owner, holder = base.info.get("class"), base.info.get("id", "")
                return self.call_function(target, args, keywords, owner=owner, holder=holder)
            return self.call_function(target, args, keywords, owner=target.owner)
        if CLIP_CALLS.match(attr) or (attr in ("clamp_", "clip_") and is_gradient(func.value)):
            return self.clip_call(node, text or attr)
        if isinstance(base, Data):
            return self.data_method(node, base, func)
        if isinstance(base, (list, str)) and attr in _OF_LISTS:
            return self._list_method(node, base, attr)
        if isinstance(base, Obj):
            found = self.object_method(base, node, func)
            if found is not NotImplemented:
                return found
        value = self.heap.get(self.heap_key(func)) if text else None
        if isinstance(value, (Obj, Function, Bound)):
            return self._plain(node, value)
        made = self.made_by(node, text or attr)
        if made is not None:
            return made
        guessed = self.guess(attr) if attr not in ("eval", "train") else None
        if guessed is not None and guessed.kind in ("model", "criterion"):
            return self.call_object(guessed, node)
        return self._unknown_method(node, func, base)

    def _unknown_method(self, node: ast.Call, func: ast.Attribute, base: Any) -> Any:
        """A method that the file does not show, which may be one of a tensor that is not known as such."""
        text = dotted(func)
        if words_of(text).shows:
            return self.log_call(node, text)
        if func.attr in PIECE_CALLS and isinstance(base, Unknown) and node.args:
            of_text = any(isinstance(arg, ast.Constant) and isinstance(arg.value, str) for arg in node.args)
            if not of_text:
                self.trace.mark("pieces", node, text_of(func))
        result = self.unknown_call(node, text or func.attr)
        if isinstance(result, Unknown) and isinstance(base, Unknown):
            return replace(result, data=result.data or base.data, tags=result.tags | (base.tags & {"rows"}))
        return result

    def _list_method(self, node: ast.Call, base: list[Any] | str, attr: str) -> Any:
        args, keywords = self.arguments(node)
        if isinstance(base, str):
            return (*args, *keywords.values())  # a text, by what stands in it
        if attr == "clear":
            base.clear()
        elif attr == "append" and args and len(base) < 400:
            base.append(args[0])
        elif attr in ("pop", "popleft"):
            first = attr == "popleft" or (bool(args) and number(args[0]) == 0)
            return base.pop(0 if first else -1) if base else Unknown(text_of(node))
        return None

    def _library(self, node: ast.Call, text: str) -> Any:
        last = text.rsplit(".", 1)[-1]
        if last in ("partial", "count", "deque"):
            return PYTHON_FUNCTIONS[last](self, node)
        if CLIP_CALLS.match(last):
            return self.clip_call(node, text)
        if last in ("empty_cache", "synchronize"):
            self.trace.mark("sync" if last == "synchronize" else last, node, last)
            return None
        context = last in ("enable_grad", "no_grad", "autocast", "set_grad_enabled", "nullcontext", "inference_mode")
        made = Obj("context", last) if context else self.made_by(node, text)
        if made is not None:
            return made
        if words_of(text).means:
            return self.loss_call(node, "mean", text)
        if last in PIECE_CALLS:
            self.trace.mark("pieces", node, text)
        if (
            last in ("tensor", "as_tensor", "LongTensor")
            and len(node.args) == 1
            and (isinstance(value := self.evaluate(node.args[0]), Unknown) or is_number(value))
        ):
            return value
        args, keywords = self.arguments(node)
        values = self.flat([*args, *keywords.values()])
        data = [v for v in values if isinstance(v, Data)]
        if len(args) == 2 and last in _SCALINGS:
            return self.operate(args[0], _SCALINGS[last](), args[1], node=node)
        if last in ("isnan", "isinf", "isfinite", "allclose", "is_tensor"):
            if text.startswith("math.") and any(not v.number and v.kind != "batch" for v in data):
                self.trace.mark("sync", node, text)
            return Unknown(text_of(node), data=True)
        if data and not is_zeros(node):
            made = self._out_of_data(node, last, data, several=isinstance(args[0], (list, tuple)) if args else False)
            by_n = made.kind == "loss" and any("n" in tags(v) for v in values)
            return replace(made, opaque=(*made.opaque, f"divided inside of `{last}`")) if by_n else made
        rows = {"rows"} if last == "arange" or is_zeros(node) else set[str]()
        if data or any(isinstance(v, Unknown) and v.data for v in values):
            return Unknown(text_of(node), data=True, tags=(tags(*values) & {"rows"}) | rows)
        return Unknown(text_of(node), tags=tags(*args) | rows)

    def _out_of_data(self, node: ast.Call, name: str, data: list[Data], *, several: bool) -> Data:
        """What a function of a library makes of data."""
        made = self.combine(data)
        if name in ("mean", "nanmean", "sum") and within_rows(node, 1):
            return made
        if name in ("mean", "nanmean", "sum"):
            return self.reduce(made, "mean" if "mean" in name else "sum", len(data) if several else 0)
        compares = len(data) > 1 and (name in ("matmul", "mm", "cdist") or (name == "einsum" and pairs_rows(node)))
        return replace(made, coupled=node.lineno if compares else made.coupled)

    def unknown_call(self, node: ast.Call, text: str) -> Any:
        """A function that the file does not show: what it is given may be used for anything."""
        args, keywords = self.arguments(node)
        values = self.flat([*args, *keywords.values()])
        last, words = text.rsplit(".", 1)[-1], words_of(text)
        self.launch(values)
        data = [v for v in values if isinstance(v, Data)]
        objects = {v.kind for v in values if isinstance(v, Obj)}
        if words.logs:
            return self.log_call(node, text, evaluated=values)
        losses = [v for v in data if v.kind == "loss" and not v.number]
        if MEASURED.match(last) and not losses:
            return Unknown(text_of(node))
        if last == "optimizer_step" and (own := [v for v in values if isinstance(v, Obj) and v.kind == "optimizer"]):
            self.trace.step(node, own[0].key)  # torch_xla's
            return None
        if "scaler" in objects and ("optimizer" in objects or words.steps):
            self.trace.may_update()
        may_step = "optimizer" in objects and (losses or "scaler" in objects or words.steps)
        if may_step and not words.adjusts:
            self.trace.opaque.setdefault(f"`{text}` gets the optimizer", node)
        if words.rescales:
            self.trace.opaque.setdefault(f"`{text}` rescales the gradients", node)
        if words.means:
            return self.loss_call(node, "mean", text)
        if words.couples:
            return self.loss_call(node, "", text)
        if not data and not objects & {"model", "engine", "criterion"}:
            hangs = any(isinstance(v, Unknown) and v.data for v in values)
            return Unknown(text_of(node), data=hangs, tags=tags(*args, *keywords.values()))
        if not self.trace.begun:
            return Unknown(text_of(node))  # before the first microbatch: setup
        base = self.combine(data) if data else Data({})
        seen = objects & {"model", "engine"}
        numeric = bool(data) and all(v.number for v in data) and not seen
        opaque = base.opaque
        if data and any("n" in tags(v) for v in values):
            opaque = (*opaque, f"divided inside of `{text}`")
        elif not numeric and not words.averages and (losses or not self._is_layer(text)):
            opaque = (*opaque, f"`{text}`")
        return replace(
            base,
            weights=dict(base.weights) if data and all(v.kind == "loss" for v in data) else self.this_microbatch(),
            kind="loss" if losses or "loss" in last.lower() else "tensor",
            reduction=base.reduction if losses else "",
            opaque=opaque,
            forward_synced=self.sync_off == 0 if seen else base.forward_synced,
            number=numeric,
        )

    def _is_layer(self, text: str) -> bool:
        """Whether a name is a layer of the model whose method runs."""
        owner = self.frame.owner
        return owner is not None and text.startswith("self.") and text in layers(self.module, owner)

    def launch(self, values: list[Any]) -> None:
        """A launcher runs what it is given: `mp.spawn(train, ...)`, `fabric.launch(main)`."""
        for value in values:
            facts = self.module.facts.get(self.module.key(value)) if isinstance(value, Function) else None
            if facts is None or not facts.backward:
                continue
            if facts.flat and not self.loop_depth and not self.trace.begun:
                self.drive(value, value.owner)
            else:
                self.call_function(value, [], {}, guess=True)

    def flat(self, values: Any, depth: int = 0) -> list[Any]:
        """Values with the contents of lists, tuples and dictionaries."""
        found: list[Any] = []
        for value in values:
            if isinstance(value, (tuple, list)) and depth < 4:
                found += self.flat(value, depth + 1)
            elif isinstance(value, dict) and depth < 4:
                found += self.flat(value.values(), depth + 1)
            else:
                found.append(value)
        return found

    def log_call(self, node: ast.Call, name: str, evaluated: list[Any] | None = None) -> Any:
        """A number is shown or kept: printed, logged, put into a meter."""
        if evaluated is None:
            args, keywords = self.arguments(node)
            evaluated = self.flat([*args, *keywords.values()])
            if name.endswith(("tqdm", "trange")) and args:
                return args[0]
        sums = bool(self.trace.occasional) and any(
            isinstance(part, ast.Name | ast.Attribute) and dotted(part) in self.summed for part in ast.walk(node)
        )  # added up over more than the doctor sees
        for value in evaluated:
            if isinstance(value, Data) and value.kind == "loss" and value.weights and not sums:
                self.trace.mark("log", node, name, value=value)
            if isinstance(value, Data) and not value.number and value.kind != "batch":
                self.trace.mark("sync", node, name.rsplit(".", 1)[-1])
        return None

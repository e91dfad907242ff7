"""How the simulation reads a call: of Python's own functions, of the file's functions, of data, and of what it cannot see into."""

import ast
import re
from dataclasses import replace
from fractions import Fraction
from typing import Any

from microbatch.linting.frameworks import Frameworks
from microbatch.linting.guesses import CLIP_CALLS, COUPLED_LOSSES, MEAN_LOSSES, kind_of_constructor
from microbatch.linting.module import dotted, is_backward_call, last_name, text_of
from microbatch.linting.values import Bound, Data, Function, Num, Obj, Unknown, is_number, number, tags

__all__ = ["Calls"]

_SYNCS = frozenset({"item", "tolist", "numpy", "cpu"})
_PIECES = frozenset({"split", "chunk", "tensor_split"})
_SAME = frozenset(
    "to cuda half float double view reshape squeeze unsqueeze contiguous flatten clone transpose permute t type requires_grad_ "
    "bfloat16 gather values logits".split()
)
_LIBRARIES = re.compile(r"^(torch|F|nn|np|numpy|math|functional|dist|tf|jnp|os|time|random|json|re|functools|itertools|copy|gc)(\.|$)")
_AVERAGES = re.compile(r"(^|_)ema(_|$)|update_teacher|momentum_update|update_momentum|update_target_net|moving_average_update", re.IGNORECASE)
_NO_AVERAGES = re.compile(r"dict|stats|loss|metric|log|sched|decay|get|save|load|state|copy|eval|model$|init|register|store|restore", re.IGNORECASE)
_RESCALES = re.compile(r"(re)?scale_grad|average_grad|normali[sz]e_grad|divide_grad", re.IGNORECASE)
_PRINTS = re.compile(r"_?(print|log|report|write_log)(\d|_|$)", re.IGNORECASE)
_LOGS = re.compile(r"^(print|tqdm\.write|logging\.\w+|logger\.\w+|wandb\.log|mlflow\.\w+|pprint)$")


class Calls(Frameworks):
    """The part of the machine that reads calls."""

    def call(self, node: ast.Call) -> Any:
        """The value of a call, with what it does to the gradients."""
        func = node.func
        target = self.module.resolve(func, self.frame.owner)
        if self.trace.tick and _AVERAGES.search(last_name(func)) and not _NO_AVERAGES.search(last_name(func)):
            self.trace.mark("ema", node, last_name(func))
        if target is None and is_backward_call(node) and last_name(func) != "":
            found = self.backward_call(node)
            if found is not NotImplemented:
                return found
        if isinstance(func, ast.Attribute):
            return self._method(node, func, target)
        if isinstance(func, ast.Name) and func.id in _BUILTINS and func.id not in self.module.functions:
            return _BUILTINS[func.id](self, node)
        return self._plain(node, self.evaluate(func))

    def arguments(self, node: ast.Call) -> tuple[list[Any], dict[str, Any]]:
        """The values of a call's arguments."""
        args: list[Any] = []
        for arg in node.args:
            value = self.evaluate(arg.value if isinstance(arg, ast.Starred) else arg)
            if isinstance(arg, ast.Starred) and isinstance(value, tuple | list):
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
            return self.call_function(callee, args, keywords)
        if isinstance(callee, Obj) and callee.kind == "class":
            return self.construct(node, callee)
        if isinstance(callee, Bound):
            args, keywords = self.arguments(node)
            return self.call_bound(callee, node, args, keywords)
        if text.rsplit(".", 1)[-1][:1].isupper() and (made := self.made_by(node, text)) is not None:
            return made
        if CLIP_CALLS.match(text.rsplit(".", 1)[-1]):
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
            method = self.module.find_method(callee.info["class"], "__call__") or self.module.find_method(callee.info["class"], "forward")
            if method is not None:
                args, keywords = self.arguments(node)
                return self.call_function(method, args, keywords, owner=callee.info["class"])
        if kind in ("model", "engine"):
            return self.forward(node)
        if kind == "criterion":
            return self.loss_call(node, callee.info.get("reduction", ""), callee.name, info=callee.info)
        if kind == "ema":
            self.trace.mark("ema", node, callee.name)
        if kind in ("log", "meter"):
            return self.log_call(node, callee.name)
        made = self.made_by(node, dotted(node.func))
        return made if made is not None else self.unknown_call(node, text_of(node.func))

    def construct(self, node: ast.Call, cls: Obj) -> Any:
        """An object of a class of the file."""
        name = cls.name
        definition = self.module.classes.get(name)
        bases = [last_name(base) for base in definition.bases] if definition is not None else []
        is_loss = re.search(r"loss|criterion", name, re.IGNORECASE) is not None or kind_of_constructor(name) == "criterion"
        if not is_loss and self.module.find_method(name, "forward") and self.module.find_method(name, "__call__") is None:
            self.arguments(node)
            return Obj("model", name, {"class": name})
        guessed = kind_of_constructor(name)
        if guessed in ("loader", "ema", "meter", "scheduler", "optimizer", "scaler", "native_scaler") and not any(
            self.module.reaches(self.module.key(method)) for method in self.module.methods.get(name, {}).values()
        ):
            self.arguments(node)
            return Obj(guessed, name, {"class": name})
        args, keywords = self.arguments(node)
        init = self.module.find_method(name, "__init__")
        if init is not None:
            self.call_function(init, args, keywords, owner=name)
        return Obj("instance", name, {"class": name, "bases": bases})

    # ---- a method

    def _method(self, node: ast.Call, func: ast.Attribute, target: Function | None) -> Any:
        attr, text = func.attr, dotted(func)
        if text and _LIBRARIES.match(text):
            return self._library(node, text)
        base = self.evaluate(func.value)
        if isinstance(base, Obj) and base.kind == "instance" and (own := self.module.find_method(base.info["class"], attr)):
            args, keywords = self.arguments(node)
            return self.call_function(own, args, keywords, owner=base.info["class"])
        if target is not None:
            args, keywords = self.arguments(node)
            is_self = isinstance(base, Obj) and base.kind == "self"
            return self.call_function(target, args, keywords, owner=self.frame.owner if is_self else target.owner)
        if CLIP_CALLS.match(attr):
            return self.clip_call(node, text or attr)
        if isinstance(base, Data):
            return self.data_method(node, base, func)
        if isinstance(base, list) and attr in ("append", "extend", "clear"):
            return self._list_method(node, base, attr)
        if isinstance(base, Obj):
            found = self.object_method(base, node, func)
            if found is not NotImplemented:
                return found
        value = self.heap.get(self.heap_key(func)) if text else None
        if isinstance(value, Obj | Function | Bound):
            return self._plain(node, value)
        made = self.made_by(node, text or attr)
        if made is not None:
            return made
        guessed = self.guess(attr) if attr not in ("eval", "train") else None
        if guessed is not None and guessed.kind in ("model", "criterion"):
            return self.call_object(guessed, node)
        if _LOGS.match(text):
            return self.log_call(node, text)
        return self.unknown_call(node, text or attr)

    def _list_method(self, node: ast.Call, base: list[Any], attr: str) -> None:
        args, _ = self.arguments(node)
        if attr == "clear":
            base.clear()
        elif attr == "append" and args and len(base) < 400:
            base.append(args[0])

    def _library(self, node: ast.Call, text: str) -> Any:
        last = text.rsplit(".", 1)[-1]
        if CLIP_CALLS.match(last):
            return self.clip_call(node, text)
        if last == "empty_cache":
            self.trace.mark("empty_cache", node)
            return None
        if last == "synchronize":
            self.trace.mark("sync", node, "synchronize")
            return None
        if last in ("enable_grad", "no_grad", "autocast", "set_grad_enabled", "nullcontext", "inference_mode"):
            return Obj("context", last)
        made = self.made_by(node, text)
        if made is not None:
            return made
        if MEAN_LOSSES.search(text):
            return self.loss_call(node, "mean", text)
        if last in _PIECES:
            self.trace.mark("pieces", node, text)
        args, keywords = self.arguments(node)
        values = self.flat([*args, *keywords.values()])
        data = [v for v in values if isinstance(v, Data)]
        if last in ("isnan", "isinf", "isfinite", "allclose", "is_tensor"):
            if text.startswith("math.") and any(not v.number and v.kind != "batch" for v in data):
                self.trace.mark("sync", node, text)
            return Unknown(text_of(node), data=True)
        if last in ("mean", "nanmean", "sum") and data:
            return self.reduce(self.combine(data, node), "mean" if "mean" in last else "sum", len(data) if isinstance(args[0], list | tuple) else 0)
        if data:
            return replace(self.combine(data, node), source=node.lineno)
        if any(isinstance(v, Unknown) and v.data for v in values):
            return Unknown(text_of(node), data=True)
        return Unknown(text_of(node), tags=tags(*args))

    # ---- losses and forwards

    def this_microbatch(self) -> dict[int, Fraction]:
        return {self.trace.tick: Fraction(1)}

    def forward(self, node: ast.Call) -> Any:
        """A model's output, made by the microbatch at hand."""
        if self.trace.tick == 0:
            self.arguments(node)
            return Unknown(text_of(node))
        _, keywords = self.arguments(node)
        if any("label" in name or name in ("targets", "target") for name in keywords):
            self.trace.settings["labels"] = node
        labelled = any("label" in name for name in keywords)  # then the model computes the loss, a mean over the labels
        return Data(self.this_microbatch(), reduction="mean" if labelled else "", forward_synced=self.sync_off == 0, source=node.lineno)

    def loss_call(self, node: ast.Call, reduction: str, name: str, *, info: dict[str, Any] | None = None) -> Data:
        """A loss of this microbatch, with what its `reduction` says."""
        args, keywords = self.arguments(node)
        if isinstance(said := keywords.get("reduction"), str):
            reduction = said
        if keywords.get("size_average") is False:
            reduction = "sum"
        values = self.flat([*args, *keywords.values()])
        data = [v for v in values if isinstance(v, Data)]
        base = self.combine(data, node) if data else Data({})
        is_one_hot = any(isinstance(v, Unknown) and "arange" in v.key for v in values) or any("arange" in text_of(a) for a in node.args)
        coupled = node.lineno if COUPLED_LOSSES.search(name) or (base.coupled and is_one_hot) else 0
        ignore = (info or {}).get("ignore") or (node.lineno if "ignore_index" in keywords else 0)
        return replace(
            base,
            weights=base.weights if data and all(v.kind == "loss" for v in data) else self.this_microbatch(),
            kind="loss",
            reduction=reduction if reduction != "none" else "",
            number=False,
            opaque=tuple(o for v in data if v.kind == "loss" for o in v.opaque) if reduction else base.opaque,
            coupled=coupled,
            tokens=ignore if reduction == "mean" else 0,
            source=node.lineno,
        )

    def reduce(self, data: Data, how: str, count: int = 0) -> Data:
        """A sum or a mean of data: over the rows of one microbatch, or over a list of microbatches."""
        if len(data.weights) > 1 and count > 1:
            return data.times(Fraction(1, count), data.divided) if how == "mean" else data
        if data.kind == "loss" and data.reduction in ("mean", "sum"):
            return data
        return replace(data, reduction=how, kind=data.kind if data.kind != "batch" else "tensor")

    def data_method(self, node: ast.Call, base: Data, func: ast.Attribute) -> Any:
        """A method of a tensor."""
        attr = func.attr
        if attr in _SYNCS and base.kind != "batch":
            self.trace.mark("sync", node, attr)
            return replace(base, number=True)
        if attr == "detach":
            return replace(base, number=True) if base.kind == "loss" else base
        if attr in _SAME:
            return base
        if attr in ("mean", "sum"):
            self.arguments(node)
            if base.kind == "batch":
                return Data({}, kind="batch", reduction=attr)
            return self.reduce(base, attr)
        if attr.rstrip("_") in ("div", "mul", "true_divide", "divide", "multiply") and node.args:
            op = ast.Mult() if attr.startswith("mul") else ast.Div()
            value = self.operate(base, op, self.evaluate(node.args[0]), node)
            if attr.endswith("_") and isinstance(func.value, ast.Name | ast.Attribute):
                self.store(func.value, value)
            return value
        args, keywords = self.arguments(node)
        if attr in _PIECES:
            self.trace.mark("pieces", node, text_of(func))
        if attr in ("size", "dim", "numel", "__len__", "nelement"):
            return Unknown(text_of(node), data=True)
        data = [v for v in self.flat([*args, *keywords.values()]) if isinstance(v, Data)]
        if attr in ("matmul", "mm", "bmm") and data:
            return replace(self.combine([base, *data], node), coupled=node.lineno)
        made = [v for v in data if v.kind != "batch"]
        if any("n" in tags(v) for v in [*args, *keywords.values()]) and (made or base.kind == "loss"):
            value = self.combine(made, node) if made else base
            return replace(value, opaque=(*value.opaque, f"divided inside of `{text_of(func)}`"))
        if base.kind == "batch" and not base.weights and attr not in ("items", "get", "pop", "keys"):
            return self.combine(made, node) if made else base
        return self.combine([base, *made], node) if made else base

    def unknown_call(self, node: ast.Call, text: str) -> Any:
        """A function that the file does not show: what it is given may be used for anything."""
        args, keywords = self.arguments(node)
        values = self.flat([*args, *keywords.values()])
        last = text.rsplit(".", 1)[-1]
        self.launch(values)
        data = [v for v in values if isinstance(v, Data)]
        objects = {v.kind for v in values if isinstance(v, Obj)}
        if _LOGS.match(text) or re.search(r"(^|_)log(_|$|ging)", last):
            return self.log_call(node, text, evaluated=values)
        losses = [v for v in data if v.kind == "loss" and not v.number]
        if "optimizer" in objects and (losses or "scaler" in objects or re.search(r"step|update|optimi[sz]e", last)):
            if not re.search(r"lr|learning_rate|sched|warm|adjust|decay|save|checkpoint|state|resume|load", last):
                self.trace.opaque.setdefault(f"`{text}` gets the optimizer", node)
        if _RESCALES.search(last):
            self.trace.opaque.setdefault(f"`{text}` rescales the gradients", node)
        if MEAN_LOSSES.search(text):
            return self.loss_call(node, "mean", text)
        if COUPLED_LOSSES.search(text):
            return self.loss_call(node, "", text)
        if not data and not objects & {"model", "engine", "criterion"}:
            hangs = any(isinstance(v, Unknown) and v.data for v in values)
            return Unknown(text_of(node), data=hangs, tags=tags(*args, *keywords.values()))
        if self.trace.tick == 0:
            return Unknown(text_of(node))  # before the first microbatch: setup
        base = self.combine(data, node) if data else Data({})
        weights = dict(base.weights) if data and all(v.kind == "loss" for v in data) else self.this_microbatch()
        seen = objects & {"model", "engine"}
        numeric = bool(data) and all(v.number for v in data) and not seen
        return replace(
            base,
            weights=weights,
            kind="loss" if losses or "loss" in last.lower() else "tensor",
            reduction=base.reduction if losses else "",
            divided=base.divided,
            opaque=(*base.opaque, f"divided inside of `{text}`") if data and any("n" in tags(v) for v in values) else base.opaque if numeric or re.search(r"reduce|gather|average|sync|mean", last) else (*base.opaque, f"`{text}`"),
            forward_synced=self.sync_off == 0 if seen else base.forward_synced,
            number=numeric,
            source=node.lineno,
        )

    def launch(self, values: list[Any]) -> None:
        """A launcher runs what it is given: `mp.spawn(train, ...)`, `fabric.launch(main)`."""
        for value in values:
            facts = self.module.facts.get(self.module.key(value)) if isinstance(value, Function) else None
            if facts is None or not facts.backward:
                continue
            if facts.flat and not self.loop_depth and not self.trace.tick:
                self.drive(value, value.owner)
            else:
                self.call_function(value, [], {}, guess=True)

    def flat(self, values: Any, depth: int = 0) -> list[Any]:
        """Values with the contents of lists, tuples and dictionaries."""
        found: list[Any] = []
        for value in values:
            if isinstance(value, tuple | list) and depth < 4:
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
        for value in evaluated:
            if isinstance(value, Data) and value.kind == "loss" and value.weights:
                self.trace.mark("log", node, name, value)
            if isinstance(value, Data) and not value.number and value.kind != "batch":
                self.trace.mark("sync", node, name.rsplit(".", 1)[-1])
        return None


# ---- Python's own functions


def _len(machine: Any, node: ast.Call) -> Any:
    value = machine.evaluate(node.args[0]) if node.args else None
    if isinstance(value, Obj) and value.kind in ("loader", "enumerate", "zip", "model") or (
        isinstance(value, Unknown) and not value.data and value.key
    ):
        return Num(machine.run.length, frozenset({"len"}))
    if isinstance(value, list | tuple):
        losses = [v for v in value if isinstance(v, Data) and v.kind == "loss"]
        return Num(len(value), frozenset({"n"})) if losses else len(value)
    return Unknown(text_of(node), data=True)


def _range(machine: Any, node: ast.Call) -> Any:
    args, _ = machine.arguments(node)
    if args and all(is_number(a) for a in args):
        numbers = [int(number(a)) for a in args]
        machine.range_end = args[0] if len(args) == 1 else args[1]
        step = numbers[2] if len(numbers) > 2 else 1
        if step == 0:
            return Unknown(text_of(node))
        return range(*numbers[:2], step) if len(numbers) > 1 else range(numbers[0])
    if len(args) == 2 and is_number(args[1]) and "n" in tags(args[1]):
        machine.range_end = args[1]
        return range(int(number(args[1])))
    return Unknown(f"range({', '.join(text_of(a) for a in node.args)})", tags=tags(*args))


def _enumerate(machine: Any, node: ast.Call) -> Any:
    args, keywords = machine.arguments(node)
    start = args[1] if len(args) > 1 else keywords.get("start", 0)
    over = args[0] if args else Unknown("")
    if isinstance(over, list | tuple) and over:
        return [(number(start) + i if is_number(start) else i, item) for i, item in enumerate(over)]
    if isinstance(over, range):
        return [(i, item) for i, item in enumerate(over)][: machine.run.length + 2]
    return Obj("enumerate", "enumerate", {"over": over, "start": start if is_number(start) else 0})


def _zip(machine: Any, node: ast.Call) -> Any:
    args, _ = machine.arguments(node)
    return Obj("zip", "zip", {"over": args})


def _first(machine: Any, node: ast.Call) -> Any:
    args, _ = machine.arguments(node)
    return args[0] if args else Unknown(text_of(node))


def _next(machine: Any, node: ast.Call) -> Any:
    machine.arguments(node)
    return Data({}, kind="batch")


def _number_of(machine: Any, node: ast.Call) -> Any:
    args, _ = machine.arguments(node)
    value = args[0] if args else 0
    if isinstance(value, Data):
        if not value.number and value.kind != "batch":
            machine.trace.mark("sync", node, last_name(node.func))
        return replace(value, number=True)
    if is_number(value) and last_name(node.func) in ("int", "round"):
        rounded = int(number(value))
        return Num(rounded, tags(value)) if tags(value) else rounded
    return value


def _extreme(machine: Any, node: ast.Call) -> Any:
    args, _ = machine.arguments(node)
    if len(args) > 1 and all(is_number(a) for a in args):
        plain = [number(a) for a in args]
        value = max(plain) if last_name(node.func) == "max" else min(plain)
        origin = tags(args[plain.index(value)])
        return Num(value, origin) if origin else value
    data = [v for v in machine.flat(args) if isinstance(v, Data)]
    return data[0] if data else Unknown(text_of(node), tags=tags(*args))


def _sum(machine: Any, node: ast.Call) -> Any:
    args, _ = machine.arguments(node)
    data = [v for v in machine.flat(args) if isinstance(v, Data)]
    return machine.combine(data, node) if data else Unknown(text_of(node))


def _print(machine: Any, node: ast.Call) -> Any:
    return machine.log_call(node, "print")


def _truth(machine: Any, node: ast.Call) -> Any:
    args, _ = machine.arguments(node)
    known = machine.known_truth(args[0]) if args else False
    return Unknown(text_of(node), data=isinstance(args[0], Data)) if known is None else known


def _test(machine: Any, node: ast.Call) -> Any:
    machine.arguments(node)
    return Unknown(text_of(node))


def _getattr(machine: Any, node: ast.Call) -> Any:
    if len(node.args) >= 2 and isinstance(node.args[1], ast.Constant) and isinstance(node.args[1].value, str):
        attribute = ast.copy_location(ast.Attribute(node.args[0], node.args[1].value, ast.Load()), node)
        return machine.evaluate(attribute)
    return machine.unknown_call(node, "getattr")


_BUILTINS: dict[str, Any] = {
    "len": _len, "range": _range, "trange": _range, "enumerate": _enumerate, "zip": _zip, "tqdm": _first, "iter": _first, "list": _first,
    "tuple": _first, "reversed": _first, "islice": _first, "cycle": _first, "next": _next, "int": _number_of, "float": _number_of,
    "round": _number_of, "max": _extreme, "min": _extreme, "sum": _sum, "print": _print, "bool": _truth, "isinstance": _test, "hasattr": _test,
    "callable": _test, "getattr": _getattr,
}  # fmt: skip

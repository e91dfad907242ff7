"""Objects of the classes that a file defines: how they are made, and what their attributes are."""

import ast
import re
from collections.abc import Callable
from typing import Any

from microbatch.linting.guesses import kind_of_constructor
from microbatch.linting.simulated import Simulated
from microbatch.linting.syntax import last_name
from microbatch.linting.values import Function, Obj, Unknown

__all__ = ["OwnObjects"]

_LOSS_CLASSES = re.compile(r"loss|criterion", re.IGNORECASE)
# What a class of the file is by its name, if none of its methods runs a backward.
_KNOWN_BY_NAME = frozenset({"loader", "ema", "meter", "scheduler", "optimizer", "scaler", "native_scaler"})


class OwnObjects(Simulated):
    """The part of the machine that knows the classes of the file."""

    def construct(self, node: ast.Call, cls: Obj) -> Any:
        """An object of a class of the file."""
        name, find = cls.name, self.module.find_method
        guessed = kind_of_constructor(name)
        args, keywords = self.arguments(node)
        is_loss = _LOSS_CLASSES.search(name) is not None or guessed == "criterion"
        if not is_loss and find(name, "forward") and find(name, "__call__") is None:
            return Obj("model", name, {"class": name})
        methods = self.module.methods.get(name, {}).values()
        if guessed in _KNOWN_BY_NAME and not any(self.module.reaches(self.module.key(method)) for method in methods):
            return Obj(guessed, name, {"class": name})
        made = self.objects[name] = self.objects.get(name, 0) + 1
        holder = name if made == 1 else f"{name}#{made}"
        init = find(name, "__init__")
        if init is not None:
            self.call_function(init, args, keywords, owner=name, holder=holder)
        else:
            fields = [target for target, _ in self._class_values(name)]
            for field, value in {**dict(zip(fields, args, strict=False)), **keywords}.items():
                self.heap[f"{holder}::{field}"] = value
        return Obj("instance", name, {"class": name, "id": holder})

    def _class_values(self, name: str) -> list[tuple[str, ast.expr | None]]:
        """The attributes that a class gives to all its objects, or the fields of a dataclass, with their values."""
        return self.module.once(f"values of {name}", lambda: list(self._find_class_values(name)))

    def _find_class_values(self, name: str) -> list[tuple[str, ast.expr | None]]:
        found: list[tuple[str, ast.expr | None]] = []
        node = self.module.classes.get(name)
        for base in node.bases if node is not None else ():
            if last_name(base) in self.module.classes and last_name(base) != name:
                found += self._class_values(last_name(base))
        for statement in node.body if node is not None else ():
            if isinstance(statement, ast.AnnAssign):
                found.append((last_name(statement.target), statement.value))
            elif isinstance(statement, ast.Assign):
                found += [(last_name(target), statement.value) for target in statement.targets]
        return found

    def own_attribute(self, base: Obj, node: ast.Attribute) -> Any:
        """What an attribute of an object of the file is, where nothing was kept under it; `None` if it is not known."""
        cls, attr = base.info["class"], node.attr
        method = self.module.find_method(cls, attr)
        if method is not None and any(last_name(d) in _PROPERTIES for d in method.node.decorator_list):
            return self.call_function(method, [], {}, owner=cls, holder=base.info.get("id", ""))
        if method is None and attr in self.module.counted_attributes:
            for name, value in reversed(self._class_values(cls or "")):
                if name == attr and value is not None:
                    return self._default_of_field(value)
        return self.attribute_of_object(base, node)

    def _default_of_field(self, value: ast.expr) -> Any:
        if isinstance(value, ast.Call) and last_name(value.func) == "field":
            default = next((k.value for k in value.keywords if k.arg == "default"), None)
            return self.evaluate(default) if default is not None else Unknown("field")
        return self.evaluate(value)

    # ---- contexts

    def own_manager(self, node: ast.expr) -> Function | None:
        """The generator of the file that a `with` runs around its statements."""
        target = self.module.resolve(node.func, self.frame.owner) if isinstance(node, ast.Call) else None
        found = target is not None and any(last_name(d) == "contextmanager" for d in target.node.decorator_list)
        return target if found else None

    def run_around(self, manager: Function, item: ast.withitem, inside: Callable[[], Any]) -> Any:
        """Run a context manager of the file, and where it yields, what is inside of the `with`."""
        call = item.context_expr
        if not isinstance(call, ast.Call):
            return inside()
        args, keywords = self.arguments(call)
        outer, signals = self.frame, list[Any]()

        def at_yield(value: Any) -> None:
            if signals:
                return
            inner, self.frame = self.frame, outer
            if item.optional_vars is not None:
                self.store(item.optional_vars, value)
            signals.append(inside())
            self.frame = inner

        owner = self.frame.owner if manager.owner is not None else None
        held = self.frame.holder if manager.owner is not None else ""
        self.call_function(manager, args, keywords, owner=owner, holder=held, at_yield=at_yield)
        return signals[0] if signals else inside()

    def enter_object(self, base: Obj) -> tuple[Any, Callable[[], None]]:
        """Enter an object of the file as a context: what it gives, and how to leave it."""
        cls, holder = base.info["class"], base.info.get("id", "")
        begin, end = (self.module.find_method(cls, name) for name in ("__enter__", "__exit__"))
        given = base if begin is None else self.call_function(begin, [], {}, owner=cls, holder=holder)

        def leave() -> None:
            if end is not None:
                self.call_function(end, [None, None, None], {}, owner=cls, holder=holder)

        return (base if isinstance(given, Obj) and given.kind == "self" else given), leave


_PROPERTIES = frozenset({"property", "cached_property"})

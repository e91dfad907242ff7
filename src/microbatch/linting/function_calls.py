"""How the simulation runs the functions of a file."""

import ast
import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from microbatch.linting.guesses import SHARED
from microbatch.linting.module import Module
from microbatch.linting.simulated import Frame, Simulated
from microbatch.linting.syntax import FunctionNode, declared, is_gradient, last_name, text_of
from microbatch.linting.values import Function, Obj, Unknown, is_number, number

__all__ = ["FunctionCalls"]

_EVALUATES = re.compile(r"_?(eval|valid|test|val_|predict|infer|estimate_loss|validate)", re.IGNORECASE)
# Parameters of a function that is called once a microbatch: how many there were in the epoch, and in all.
_BATCH_INDEX = frozenset({"batch_idx", "batch_index", "batch_nb", "batch_i", "step", "idx", "i", "iteration", "index"})
_GLOBAL_STEP = frozenset({"global_step", "global_iter", "total_steps", "n_iter"})
# A multiplication or division in place, of a tensor or of a list of them.
_SCALES = re.compile(r"_?(?:foreach_)?(?:(mul|multiply)|div|divide|true_divide)_$")
DEPTH = 14  # calls inside of calls


@dataclass(frozen=True, slots=True, kw_only=True)
class _Given:
    """What a call gives to a function; `guess` says that the user's settings may differ from the defaults."""

    args: list[Any]
    keywords: dict[str, Any]
    guess: bool


class FunctionCalls(Simulated):
    """The part of the machine that calls functions of the file."""

    def call_function(
        self,
        function: Function,
        args: list[Any],
        keywords: dict[str, Any],
        *,
        guess: bool = False,
        owner: str | None = None,
        holder: str = "",
        at_yield: Callable[[Any], None] | None = None,
        feeds: Any = None,
    ) -> Any:
        """Run a function of the file with these values.

        Args:
            function: The function.
            args: The values of its arguments.
            keywords: Those that are given by name.
            guess: Whether the user's settings may differ from the defaults.
            owner: The class of the object whose method it is.
            holder: This object.
            at_yield: What is run where the function yields.
            feeds: The loop that it feeds, if it is run as a generator.

        Returns:
            What it returns; the generator that it makes, where nothing says what to run when it yields.
        """
        key = Module.key(function)
        if at_yield is None and self.is_generator(function):
            held = {"args": args, "keywords": keywords, "owner": owner, "holder": holder}
            return Obj("generator", function.name, {"function": function, **held})
        if self.depth >= DEPTH or self.active.count(key) >= 2:
            return Unknown(f"{function.name}()")
        self.begin_object(owner or function.owner, function.name)
        node: FunctionNode = function.node
        parent = function.scope if isinstance(function.scope, Frame) else self.globals
        frame = Frame(owner or function.owner, parent, holder=holder)
        frame.declared, frame.at_yield, frame.feeds = declared(node), at_yield, feeds
        self._bind(function, frame, _Given(args=args, keywords=keywords, guess=guess))
        outer, self.frame = self.frame, frame
        evaluates = bool(_EVALUATES.match(node.name)) and not self.module.reaches(key)
        self.depth += 1
        self.active.append(key)
        self.trace.evaluating += evaluates
        try:
            signal = self.block(node.body)
        finally:
            self.trace.evaluating -= evaluates
            self.active.pop()
            self.depth -= 1
            self.frame = outer
        return signal[1] if isinstance(signal, tuple) else None

    def hook(self, name: str, owner: str | None, *, index: int | None = None) -> None:
        """Call a method of Lightning's module that Lightning itself calls, if the file has it."""
        method = self.module.find_method(owner, name)
        if method is not None:
            self.call_function(method, [], {} if index is None else {"__index__": index}, owner=owner)

    def begin_object(self, owner: str | None, method: str) -> None:
        """Make the object of a method, where the file does not show how it was made."""
        if owner and owner not in self.begun:
            self.begun.add(owner)
            init = None if method == "__init__" else self.module.find_method(owner, "__init__")
            if init is not None:
                before, self.trace.tick, self.loop_depth = (self.trace.tick, self.loop_depth), 0, 0  # it is setup
                self.call_function(init, [], {}, guess=True, owner=owner)
                self.trace.tick, self.loop_depth = before

    def _bind(self, function: Function, frame: Frame, values: _Given) -> None:
        """Bind the parameters of a function: to what the call gives, to a default, or to a guess."""
        node: FunctionNode = function.node
        names = [arg.arg for arg in (*node.args.posonlyargs, *node.args.args)]
        static = any(last_name(d) == "staticmethod" for d in node.decorator_list)
        if function.owner is not None and not static and names:
            frame.locals[names[0]] = Obj("self", frame.owner or "", {"id": frame.holder, "class": frame.owner})
            names = names[1:]
        defaults = dict(zip(reversed(names), reversed(node.args.defaults), strict=False))
        for keyword, default in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True):
            names.append(keyword.arg)
            if default is not None:
                defaults[keyword.arg] = default
        given = dict(zip(names, values.args, strict=False))
        given |= {name: value for name, value in values.keywords.items() if name in names}
        index = values.keywords.get("__index__")
        for name in names:
            if name in given:
                frame.locals[name] = given[name]
            elif index is not None and name in _GLOBAL_STEP:
                frame.locals[name] = self.trace.tick - 1
            elif index is not None and name in _BATCH_INDEX:
                frame.locals[name] = index
            elif name in defaults:
                frame.locals[name] = self._default(name, defaults[name], guess=values.guess)
            else:
                frame.locals[name] = self.guess(name) or Unknown(name, data="batch" in name)

    def _default(self, name: str, default: ast.expr, *, guess: bool) -> Any:
        if not guess:
            return self.evaluate(default)
        value = self.evaluate(default)
        if value is None and (found := self.guess(name)):
            return Obj(found.kind, found.name, {**found.info, "maybe": True})
        return Unknown(name) if is_number(value) or value is None else value

    def scales_gradients(self, node: ast.Call, func: ast.Attribute) -> bool:
        """Whether a call multiplies gradients in place: `p.grad.div_(n)`, `torch._foreach_mul_(gradients, 1 / n)`."""
        way = _SCALES.match(func.attr) if func.attr.endswith("_") else None
        if way is None or not node.args:
            return False
        target, by = func.value, node.args[0]
        if len(node.args) == 2 and self._are_gradients(node.args[0]):
            target, by = node.args
        elif not is_gradient(target):
            base = self.evaluate(target)
            if not (isinstance(base, Unknown) and base.key.endswith(".grad")):
                return False
        self.scale_gradients(node, target, op=ast.Mult() if way[1] else ast.Div(), by=by)
        return True

    def _are_gradients(self, node: ast.expr) -> bool:
        """Whether an expression is a list of gradients, by its text or by what made it."""
        if "grad" in text_of(node):
            return True
        value = self.evaluate(node)
        return isinstance(value, Unknown) and ".grad" in value.key

    def scale_gradients(self, node: ast.AST, target: ast.expr, *, op: ast.operator, by: ast.expr) -> None:
        """`p.grad /= n`: every gradient is multiplied."""
        value = self.evaluate(by)
        if not isinstance(op, (ast.Div, ast.Mult)):
            return  # a term is added to the gradients: weight decay, noise
        if SHARED.search(text_of(target)):
            self.trace.settings["shared"] = node  # a scale that is in every loss, divided by itself
            return
        self.module.understood.add(node)
        if is_number(value) and number(value):
            factor = Fraction(number(value))
            self.trace.multiply(1 / factor if isinstance(op, ast.Div) else factor)
        else:
            self.trace.opaque.setdefault("gradients are rescaled", node)

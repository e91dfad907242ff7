"""The state of one simulation, which all parts of the machine share."""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING, Any

from microbatch.linting.module import Module
from microbatch.linting.slices import Slice
from microbatch.linting.trace import Trace
from microbatch.linting.values import Data, Function, Num, Obj

__all__ = ["Frame", "Run", "Simulated", "TooLongError"]


class TooLongError(Exception):
    """The run took more statements than it may."""


class Run:
    """One way to run: N, the length of the loader, and what unknown conditions come out as."""

    def __init__(
        self,
        microbatches: int,
        length: int,
        decisions: dict[str, bool] | None = None,
        *,
        skip: int = 0,
        epochs: int = 2,
    ) -> None:
        self.microbatches = microbatches
        self.length = length
        self.decisions = dict(decisions or {})
        self.asked: dict[str, ast.AST] = {}
        self.skip = skip  # the microbatch that is skipped where the loop may skip one; 0 for none
        self.epochs = epochs


class Frame:
    """The names of one call."""

    __slots__ = ("function", "locals", "owner", "parent")

    def __init__(self, function: str, owner: str | None, parent: Frame | None = None) -> None:
        self.locals: dict[str, Any] = {}
        self.function = function
        self.owner = owner
        self.parent = parent


class Simulated:
    """What every part of the machine works on.

    Args:
        module: The file.
        run: How to run it.
        relevant: What matters in the file; `None` runs all.
    """

    def __init__(self, module: Module, run: Run, relevant: Slice | None = None) -> None:
        self.module = module
        self.run = run
        self.relevant = relevant.statements if relevant is not None else None
        self.deciding = relevant.deciding if relevant is not None else None
        self.trace = Trace()
        self.heap: dict[str, Any] = {}
        self.rooted: set[str] = set()  # the first words of what the heap holds
        self.globals = Frame("", None)
        self.frame = self.globals
        self.depth = 0
        self.active: list[str] = []
        self.spent = 0
        self.sync_off = 0
        self.loop_depth = 0
        self.used_window = False
        self.at_last = False
        self.now_and_then = False
        self.made = 0
        self.range_end: Any = None
        self.moved: set[tuple[int, str]] = set()  # names for N that the loop itself sets
        self.window_names, self.window_literals = module.windows

    if TYPE_CHECKING:  # what the parts of the machine give to one another

        def evaluate(self, node: ast.expr) -> Any: ...
        def operate(self, left: Any, op: ast.operator, right: Any, node: ast.AST) -> Any: ...
        def combine(self, values: list[Data], node: ast.AST) -> Data: ...
        def guess(self, name: str) -> Obj | None: ...
        def window(self) -> Num: ...
        def names_window(self, node: ast.AST) -> bool: ...
        def heap_key(self, node: ast.AST) -> str: ...
        def as_loss(self, value: Data) -> Data: ...
        def known_truth(self, value: Any) -> bool | None: ...
        def truth(self, value: Any, node: ast.AST) -> bool: ...
        def decide(self, key: str, node: ast.AST) -> bool: ...
        def choose(self, test: ast.expr, body: list[ast.stmt], orelse: list[ast.stmt], node: ast.AST) -> bool: ...
        def arguments(self, node: ast.Call) -> tuple[list[Any], dict[str, Any]]: ...
        def flat(self, values: Any, depth: int = 0) -> list[Any]: ...
        def this_microbatch(self) -> dict[int, Any]: ...
        def forward(self, node: ast.Call) -> Any: ...
        def loss_call(
            self, node: ast.Call, reduction: str, name: str, *, info: dict[str, Any] | None = None
        ) -> Data: ...
        def log_call(self, node: ast.Call, name: str, evaluated: list[Any] | None = None) -> Any: ...
        def opaque_loss(self, what: str) -> Data: ...
        def launch(self, values: list[Any]) -> None: ...
        def store(self, target: ast.AST, value: Any) -> None: ...
        def block(self, body: list[ast.stmt]) -> Any: ...
        def item_of(self, value: Any) -> Any: ...
        def call_function(
            self,
            function: Function,
            args: list[Any],
            keywords: dict[str, Any],
            *,
            guess: bool = False,
            owner: str | None = None,
        ) -> Any: ...
        def drive(self, function: Function, owner: str | None) -> None: ...
        def begin_epoch(self) -> None: ...
        def begin_microbatch(self, *, last: bool = False) -> None: ...

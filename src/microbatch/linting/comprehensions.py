"""Read a comprehension that trains as the loop that it stands for: `losses = [step(x, y) for x, y in loader]`."""

import ast

from microbatch.linting.syntax import FunctionNode

__all__ = ["Comprehension", "is_written_out", "write_out"]

Comprehension = ast.ListComp | ast.GeneratorExp | ast.SetComp


def is_written_out(node: ast.AST) -> bool:
    """Whether a loop is a comprehension in the source."""
    return getattr(node, "_comprehension", False)


def write_out(tree: ast.Module, wanted: set[ast.AST]) -> None:
    """Put a loop before each statement that holds one of these comprehensions, and its list in their place.

    Args:
        tree: The file, which is changed.
        wanted: The comprehensions.
    """
    for holder in list(ast.walk(tree)):
        for name in ("body", "orelse", "finalbody"):
            block = getattr(holder, name, None)
            if not isinstance(block, list):
                continue
            for statement in list(block):
                writer = _Writer(wanted)
                if not isinstance(statement, ast.If | ast.For | ast.AsyncFor | ast.While | ast.With | ast.Try):
                    writer.visit(statement)
                at = block.index(statement)
                block[at:at] = writer.loops


class _Writer(ast.NodeTransformer):
    """Takes comprehensions out of one statement."""

    def __init__(self, wanted: set[ast.AST]) -> None:
        self.wanted = wanted
        self.loops: list[ast.stmt] = []

    def visit(self, node: ast.AST) -> ast.AST:
        """Replace a comprehension by the name of its list."""
        if isinstance(node, FunctionNode | ast.Lambda | ast.ClassDef):
            return node
        if node in self.wanted and isinstance(node, Comprehension):
            return self._out(node)
        return self.generic_visit(node)

    def _out(self, node: Comprehension) -> ast.AST:
        name = f"list {node.lineno} {node.col_offset}"  # no name that a file can have
        generator = node.generators[0]
        keep = ast.Call(ast.Attribute(ast.Name(name, ast.Load()), "append", ast.Load()), [node.elt], [])
        body: list[ast.stmt] = [ast.Expr(keep)]
        for test in generator.ifs:
            body = [ast.If(test, body, [])]
        loop = ast.For(generator.target, generator.iter, body, [])
        loop._comprehension = True  # type: ignore[attr-defined]
        empty = ast.Assign([ast.Name(name, ast.Store())], ast.List([], ast.Load()))
        for new in (empty, loop):
            for inner in ast.walk(new):
                if "lineno" in inner._attributes and not hasattr(inner, "lineno"):
                    ast.copy_location(inner, node)
        self.loops += [empty, loop]
        return ast.copy_location(ast.Name(name, ast.Load()), node)

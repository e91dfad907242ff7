"""Changes to a source by the nodes of its syntax tree: the user's own lines, cut and put together anew."""

from __future__ import annotations

import ast
from difflib import SequenceMatcher

from microbatch.linting.finding import Edit
from microbatch.linting.sources import Source

__all__ = ["Draft", "edits_between", "indented", "long_string_rows"]


class Draft:
    """Collects changes to one source. Nothing happens to the source itself.

    Args:
        source: The source.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.changes: list[tuple[int, int, str]] = []
        self._starts = [0]
        for line in source.lines:
            self._starts.append(self._starts[-1] + len(line) + 1)

    # ---- what stands in the source

    def span(self, node: ast.AST) -> tuple[int, int]:
        """Return where a node begins and ends in the text, in characters."""
        ends = node.end_lineno, node.end_col_offset  # type: ignore[attr-defined]
        return self._offset(node.lineno, node.col_offset), self._offset(*ends)  # type: ignore[attr-defined]

    def text(self, node: ast.AST) -> str:
        """Return the source of a node as it stands in the file."""
        first, last = self.span(node)
        return self.source.text[first:last]

    def is_exact(self, node: ast.expr) -> bool:
        """Return whether the place of an expression is right. Before Python 3.12, it is not inside of f-strings."""
        try:
            found = ast.parse(f"({self.text(node)}\n)", mode="eval").body
        except (SyntaxError, ValueError):
            return False
        return ast.dump(found) == ast.dump(node).replace("ctx=Store()", "ctx=Load()")

    def indent(self, statement: ast.stmt) -> str:
        """Return the white space in front of a statement."""
        line = self.source.lines[statement.lineno - 1]
        return line[: len(line) - len(line.lstrip())]

    def is_alone(self, statement: ast.stmt) -> bool:
        """Return whether the lines of a statement hold nothing else, and can be moved to another indentation."""
        first, last = self.span(statement)
        before = self.source.text[self._starts[statement.lineno - 1] : first]
        after = self.source.text[last : self._starts[statement.end_lineno or 0] - 1].strip()
        return not before.strip() and (not after or after.startswith("#")) and not long_string_rows(statement)

    def rows(self, statement: ast.stmt, *, comments: bool = False) -> tuple[int, int]:
        """Return the first and the last line of a statement; with the comments right above it, if wanted."""
        first, last = statement.lineno, statement.end_lineno or statement.lineno
        indent = self.indent(statement)
        while comments and first > 1 and self.source.lines[first - 2].startswith(f"{indent}#"):
            first -= 1
        return first, last

    def lines(self, first: int, last: int) -> list[str]:
        """Return lines of the source, both ends included."""
        return self.source.lines[first - 1 : last]

    # ---- changes

    def replace(self, node: ast.AST, new: str) -> None:
        """Put other text in the place of a node."""
        self.changes.append((*self.span(node), new))

    def replace_rows(self, first: int, last: int, new: list[str]) -> None:
        """Put other lines in the place of lines; `last = first - 1` inserts before the first."""
        text = "".join(f"{line}\n" for line in new)
        self.changes.append((self._starts[first - 1], self._starts[last], text))

    def move(self, statement: ast.stmt, row: int, indent: str) -> None:
        """Move a statement, with the comments right above it, to before a line of the source."""
        first, last = self.rows(statement, comments=True)
        lines = indented(self.lines(first, last), self.indent(statement), indent)
        self.replace_rows(first, last, [])
        self.replace_rows(row, row - 1, lines)

    def result(self) -> str:
        """Return the source with all changes made. Insertions at one place keep their order."""
        text = self.source.text + "\n"
        ordered = sorted(enumerate(self.changes), key=lambda pair: (pair[1][:2], pair[0]), reverse=True)
        for _, (first, last, new) in ordered:
            text = text[:first] + new + text[last:]
        return text[:-1]

    def _offset(self, line: int, column: int) -> int:
        text = self.source.lines[line - 1]
        if not text.isascii():
            column = len(text.encode("utf-8", "surrogatepass")[:column].decode("utf-8", "replace"))
        return self._starts[line - 1] + column


def indented(lines: list[str], old: str, new: str) -> list[str]:
    """Return lines with another indentation. Lines that do not begin with the old one, such as empty ones, stay."""
    return [new + line[len(old) :] if line.startswith(old) and line.strip() else line for line in lines]


def edits_between(old: str, new: str) -> tuple[Edit, ...]:
    """Return the edits that make one text of another, each as few lines as it takes."""
    before, after = old.split("\n"), new.split("\n")
    same = next(
        (i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), min(len(before), len(after))
    )
    matcher = SequenceMatcher(None, before[same:], after[same:], autojunk=False)
    return tuple(
        Edit(first + same + 1, last + same, "".join(f"{line}\n" for line in after[same + begin : same + end]))
        for kind, first, last, begin, end in matcher.get_opcodes()
        if kind != "equal"
    )


def long_string_rows(tree: ast.AST) -> set[int]:
    """Return the lines that begin inside of a string, where white space is part of it."""
    return {
        row
        for node in ast.walk(tree)
        if isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str | bytes))
        for row in range(node.lineno + 1, (node.end_lineno or node.lineno) + 1)
    }

"""Write a file anew with statements left out, moved and put into blocks. All other lines stay exactly as they are."""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import dataclass, field

from microbatch.linting.draft import Draft, indented, long_string_rows
from microbatch.linting.sources import Source

__all__ = ["Cannot", "Renderer"]


class Cannot(Exception):  # noqa: N818 - it is caught in this room, and says why a loop has no sketch
    """A loop cannot be rewritten; the text says why.

    Args:
        reason: Why, as a part of a sentence.
        node: Where.
    """

    def __init__(self, reason: str, node: ast.AST | None = None) -> None:
        super().__init__(reason)
        self.node = node


_ELSE = ("else", "finally")


@dataclass
class Renderer:
    """Writes the lines of a file. What is to change is told beforehand.

    Attributes:
        source: The source.
        dropped: Statements that are left out, with the comment right above each.
        elsewhere: Statements that a function of `custom` writes.
        opened: `with` statements whose blocks stay, without their first lines.
        swaps: Expressions and what stands in their place.
        before: Lines that come before a statement, without indentation.
        after: Likewise, behind it.
        custom: Statements that are written by a function of this renderer and their indentation.
    """

    source: Source
    dropped: set[ast.stmt] = field(default_factory=set)
    elsewhere: set[ast.stmt] = field(default_factory=set)
    opened: set[ast.stmt] = field(default_factory=set)
    swaps: dict[ast.expr | ast.stmt, str] = field(default_factory=dict)
    before: dict[ast.stmt, list[str]] = field(default_factory=dict)
    after: dict[ast.stmt, list[str]] = field(default_factory=dict)
    custom: dict[ast.stmt, Callable[[Renderer, str], list[str]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Read the places of the source."""
        self.draft = Draft(self.source)
        self._strings = long_string_rows(self.source.tree) if isinstance(self.source.tree, ast.Module) else set[int]()

    def file(self, tree: ast.Module) -> str:
        """Return the whole text."""
        if not tree.body:
            return self.source.text
        lines = self.block(tree.body, "", 0)
        return "\n".join(lines + self.source.lines[tree.body[-1].end_lineno or 0 :])

    def block(self, statements: list[ast.stmt], indent: str, floor: int, *, moved: bool = False) -> list[str]:
        """Return the lines of statements that follow one another.

        Args:
            statements: The statements.
            indent: Where they stand in the new text.
            floor: The last line of the source before them; comments behind it are theirs.
            moved: Whether they are those of `elsewhere`.

        Returns:
            The lines.

        Raises:
            Cannot: Lines that hold two statements change.
        """
        found, cut = list[str](), False
        for statement in statements:
            first, last = _first_row(statement), statement.end_lineno or statement.lineno
            if first <= floor:  # behind a `;`
                if self._changes(statement) or any(
                    self._changes(each) for each in statements if each.end_lineno == first
                ):
                    raise Cannot("two statements stand on one line", statement)
                continue
            if statement in self.elsewhere and not moved:
                floor = last
                continue
            old = self.draft.indent(statement)
            above = self._moved((floor + 1, first - 1), old, indent)
            floor = last
            if statement in self.dropped:
                cut = True
                while above and (above[-1].strip().startswith("#") or not above[-1].strip()):
                    above.pop()
                found += above + [f"{indent}{line}" for line in self.before.get(statement, [])]
                continue
            lines = self.statement(statement, indent)
            while above and not found and cut and not above[0].strip():
                above.pop(0)
            found += above + [f"{indent}{line}" for line in self.before.get(statement, [])] + lines
            found += [f"{indent}{line}" for line in self.after.get(statement, [])]
        return found

    def statement(self, statement: ast.stmt, indent: str) -> list[str]:
        """Return the lines of one statement at an indentation; none if nothing is left of it."""
        if statement in self.custom:
            return self.custom[statement](self, indent)
        return self.plain(statement, indent)

    def plain(self, statement: ast.stmt, indent: str) -> list[str]:
        """Return the lines of a statement with what changes inside of it."""
        first, last = _first_row(statement), statement.end_lineno or statement.lineno
        body = getattr(statement, "body", None)
        swapped = body and body[0].lineno > statement.lineno and any(node in self.swaps for node in ast.walk(statement))
        if not self._changes_below(statement) and not swapped:
            return self._moved((first, last), self.draft.indent(statement), indent)
        sections = self._sections(statement)
        if sections[0][2][0].lineno <= sections[0][1]:
            raise Cannot("a block is on the line of its condition", statement)
        unit = self.draft.indent(sections[0][2][0])[len(self.draft.indent(statement)) :]
        if statement in self.opened:
            return self.block(sections[0][2], indent, sections[0][1])
        parts = [self.block(body, indent + unit, end) for _, end, body in sections]
        if not any(_is_code(part) for part in parts):
            return []
        if isinstance(statement, ast.If) and len(parts) == 2 and parts[0] == parts[1]:
            return indented(parts[0], indent + unit, indent)
        found, floor = list[str](), first - 1
        for (begin, end, body), part in zip(sections, parts, strict=True):
            is_else = self.source.lines[begin - 1].strip().startswith("else")
            if is_else and not _is_code(part):
                continue
            head = self._moved((floor + 1, end), self.draft.indent(statement), indent)
            found += head + part + ([] if _is_code(part) else [f"{indent}{unit}pass"])
            floor = body[-1].end_lineno or floor
        return found

    def _sections(self, statement: ast.stmt) -> list[tuple[int, int, list[ast.stmt]]]:
        """Return the blocks of a statement: the first and last line of each head, and its statements."""
        held = [(_first_row(statement), getattr(statement, "body", []))]
        held += [(each.lineno, each.body) for each in getattr(statement, "handlers", [])]
        end = statement
        while isinstance(end, ast.If) and len(end.orelse) == 1 and self._begins(end.orelse[0], "elif"):
            end = end.orelse[0]
            held.append((end.lineno, getattr(end, "body", [])))
        held += [(0, body) for name in ("orelse", "finalbody") if (body := getattr(end, name, []))]
        if isinstance(statement, ast.Match) or not held[0][1]:
            raise Cannot("it is written with a statement that is not rewritten", statement)
        found = list[tuple[int, int, list[ast.stmt]]]()
        for known, body in held:
            last = _first_row(body[0]) - 1
            begin = known or (found[-1][2][-1].end_lineno or 0) + 1
            while not known and begin < last and not self.source.lines[begin - 1].strip().startswith(_ELSE):
                begin += 1
            row = begin
            while row < last and not self.source.lines[row - 1].split("#")[0].rstrip().endswith(":"):
                row += 1
            found.append((begin, max(row, begin), body))
        return found

    def _begins(self, statement: ast.stmt, word: str) -> bool:
        return self.source.lines[statement.lineno - 1].strip().startswith(word)

    def _moved(self, rows: tuple[int, int], old: str, new: str) -> list[str]:
        """Return lines of the source, with what is swapped in them, at another indentation."""
        first, last = rows
        if last < first:
            return []
        return [
            line if row in self._strings or not (line.startswith(old) and line.strip()) else new + line[len(old) :]
            for row, line in self._swapped(first, last)
        ]

    def _swapped(self, first: int, last: int) -> list[tuple[int | None, str]]:
        draft, changed = Draft(self.source), False
        for node, new in self.swaps.items():
            if first <= node.lineno and (node.end_lineno or 0) <= last:
                draft.replace(node, new)
                changed = True
        lines = self.draft.lines(first, last)
        if not changed:
            return list(enumerate(lines, first))
        count = len(self.source.lines) - last
        text = draft.result().split("\n")
        return [(None, line) for line in text[first - 1 : len(text) - count]]

    def _changes(self, statement: ast.stmt) -> bool:
        return statement in self.dropped or statement in self.before or self._changes_below(statement, itself=True)

    def _changes_below(self, statement: ast.stmt, *, itself: bool = False) -> bool:
        """Return whether a block of the statement changes; with `itself`, also whether a line of its own does."""
        for node in ast.walk(statement):
            if itself and node in self.swaps:
                return True
            if not isinstance(node, ast.stmt):
                continue
            if node in self.opened or (node in self.custom and node is not statement):
                return True
            changed = (self.dropped, self.elsewhere, self.before, self.after)
            if node is not statement and any(node in each for each in changed):
                return True
        return False


def _is_code(lines: list[str]) -> bool:
    return any(line.strip() and not line.strip().startswith("#") for line in lines)


def _first_row(statement: ast.stmt) -> int:
    decorators = getattr(statement, "decorator_list", [])
    return min([statement.lineno, *(each.lineno for each in decorators)])

"""Comments that silence findings: `# microbatch: ignore[MB105] reason`, and `# microbatch: ignore-file[MB105]`."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from microbatch.linting.finding import Finding
from microbatch.linting.rules.table import BY_NAME, RULES
from microbatch.linting.sources import Source

__all__ = ["has_comments", "suppress"]

_COMMENT = re.compile(r"#\s*microbatch:\s*ignore(?P<file>-file)?\b(?P<codes>\s*\[[^\]]*\]?)?", re.IGNORECASE)
_OF_THE_FILE = {"MB000", "MB001"}  # which no line has


@dataclass(frozen=True)
class _Suppression:
    line: int
    column: int
    lines: range | None  # of the statement that the comment stands on; all where there are none
    codes: tuple[str, ...]  # none: all
    alone: bool  # on a line without code

    def covers(self, code: str) -> bool:
        return code not in _OF_THE_FILE and (not self.codes or code in self.codes)


def has_comments(source: Source) -> bool:
    """Return whether the text may have comments that silence findings."""
    return _COMMENT.search(source.text) is not None


def suppress(source: Source, findings: Sequence[Finding]) -> list[Finding]:
    """Leave out the findings that comments silence, and report the comments that silence none.

    A comment holds for the statement on whose lines it stands; in the head of a loop or a branch it holds for the head.
    `ignore-file` holds everywhere. Text in strings is no comment.

    Args:
        source: The file; it can be parsed.
        findings: What was found in it, in lines of the source's text.

    Returns:
        The other findings, and a note MB003 for each unused comment or code.
    """
    suppressions = list(_suppressions(source))
    everywhere = [one for one in suppressions if one.lines is None]
    at_line: defaultdict[int, list[_Suppression]] = defaultdict(list)
    for one in suppressions:
        for line in one.lines or ():
            at_line[line].append(one)
    silenced: dict[_Suppression, set[str]] = {one: set() for one in suppressions}
    kept = list[Finding]()
    for finding in findings:
        silent = [one for one in (*everywhere, *at_line[finding.line]) if one.covers(finding.rule)]
        for one in silent:
            silenced[one].add(finding.rule)
        if not silent:
            kept.append(finding)
    for one, found in silenced.items():
        message = _unused(one, found)
        if message:
            kept.append(
                Finding(
                    rule="MB003",
                    path=source.path,
                    line=one.line,
                    column=one.column,
                    confidence="note",
                    message=message,
                    fix="Remove the comment.",
                )
            )
    return kept


def _unused(one: _Suppression, found: Collection[str]) -> str:
    unknown = [code for code in one.codes if code not in RULES]
    unused = [code for code in one.codes if code not in found and code not in unknown]
    where = "; it is alone on its line: write it at the end of the statement's line" if one.alone else ""
    if unknown:
        return f"this comment names {', '.join(unknown)}, which is no rule"
    if unused:
        return f"this comment ignores {', '.join(unused)}, which is not found here{where}"
    if not one.codes and not found:
        return f"this comment ignores all rules, and no rule finds anything here{where}"
    return ""


def _suppressions(source: Source) -> Iterator[_Suppression]:
    if not has_comments(source):
        return
    spans: dict[int, range] | None = None
    try:
        for token in tokenize.generate_tokens(io.StringIO(source.text).readline):
            match = _COMMENT.search(token.string) if token.type == tokenize.COMMENT else None
            if match is None:
                continue
            line, column = token.start
            alone = not source.lines[line - 1][:column].strip()
            lines = None
            if match["file"]:
                alone = False
            else:
                spans = _statements(source.tree) if spans is None else spans
                lines = spans.get(line, range(line, line + 1))
                alone = alone and len(lines) == 1
            names = re.findall(r"[\w-]+", match["codes"] or "")
            codes = (BY_NAME[name].code if name in BY_NAME else name.upper() for name in names)
            yield _Suppression(line, column + match.start() + 1, lines, tuple(dict.fromkeys(codes)), alone)
    except (tokenize.TokenError, SyntaxError):  # text that can be parsed, and still not be tokenised to its end
        return


def _statements(tree: object) -> dict[int, range]:
    """Return, for each line, the lines of the innermost statement on it; of a loop or a branch, those of its head."""
    spans = dict[int, range]()
    for node in ast.walk(tree) if isinstance(tree, ast.Module) else ():
        if isinstance(node, ast.stmt):
            body = getattr(node, "body", None) or getattr(node, "cases", None)
            decorators: list[ast.expr] = getattr(node, "decorator_list", [])
            first = min([node.lineno, *(each.lineno for each in decorators)])
            span = range(first, (_head_end(node) if body else node.end_lineno or node.lineno) + 1)
            for line in span:
                if line not in spans or len(span) <= len(spans[line]):
                    spans[line] = span
    return spans


def _head_end(node: ast.stmt) -> int:
    """Return the last line of a head: where its last expression ends."""
    ends = [node.lineno]
    for name, value in ast.iter_fields(node):
        if name not in {"body", "orelse", "finalbody", "handlers", "cases"}:
            for each in value if isinstance(value, list) else [value]:
                ends += [inner.end_lineno or 0 for inner in _expressions(each)]
    return max(ends)


def _expressions(value: object) -> Iterator[ast.expr]:
    """Yield the outermost expressions of a field of a statement."""
    if isinstance(value, ast.expr):
        yield value
    elif isinstance(value, ast.arguments | ast.withitem | ast.keyword | ast.arg):
        for child in ast.iter_child_nodes(value):
            yield from _expressions(child)

"""One word per idea: what others call chunks, mini-batches or accumulation steps has another name here."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "src" / "microbatch"
FOREIGN = re.compile(r"chunk|mini[ _-]?batch|accumulat(?:e|ion|ing)[ _-]?steps?\b|micro[ _-]batch", re.IGNORECASE)
# Where one of them may stand, and why: {("room/file.py", "the word as written"): "reason"}.
ALLOWED: dict[tuple[str, str], str] = {}


def names(source: str) -> Iterator[str]:
    """Yield the names that source gives: what it defines, takes and assigns, not what it calls of others."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.alias) and node.asname:
            yield node.asname
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr


def prose(source: str) -> Iterator[str]:
    """Yield what source says in words: its comments, docstrings and texts, flags of the command line among them."""
    kinds = {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in kinds:
            yield token.string


def foreign(source: str) -> set[str]:
    """Return the foreign words in the names and the prose of source, as they are written."""
    return {match.group() for text in (*names(source), *prose(source)) for match in FOREIGN.finditer(text)}


def found() -> set[tuple[str, str]]:
    files = sorted(PACKAGE.rglob("*.py"))
    assert files
    return {
        (file.relative_to(PACKAGE).as_posix(), word)
        for file in files
        for word in foreign(file.read_text(encoding="utf-8")) | {m.group() for m in FOREIGN.finditer(file.stem)}
    }


def test_our_own_words_are_used() -> None:
    assert found() - set(ALLOWED) == set()


def test_no_exception_outlives_its_use() -> None:
    assert set(ALLOWED) - found() == set()


@pytest.mark.parametrize(
    ("source", "word"),
    [
        ("def split(x, chunks): ...", "chunk"),
        ("class MiniBatch: ...", "MiniBatch"),
        ("for minibatch in batch: ...", "minibatch"),
        ("self.accumulation_steps = 4", "accumulation_steps"),
        ("import rows as micro_batch", "micro_batch"),
        ("flag = '--accumulation-steps'", "accumulation-steps"),
        ("x = 1  # one mini-batch", "mini-batch"),
        ("def f():\n    '''Take gradient accumulation steps.'''", "accumulation steps"),
        ("f'{size} chunks'", "chunk"),
    ],
)
def test_a_foreign_word_is_seen(source: str, word: str) -> None:
    assert word in foreign(source)


@pytest.mark.parametrize("source", ["first, second = x.chunk(2)", "microbatches = cut(batch, microbatch_size)"])
def test_what_others_call_theirs_is_theirs(source: str) -> None:
    assert foreign(source) == set()

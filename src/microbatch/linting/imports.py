"""Functions and classes that a file imports from its own project, read where they stand."""

import ast
from pathlib import Path

from microbatch.linting.module import Module
from microbatch.linting.syntax import FunctionNode

__all__ = ["with_imports"]

FILES = 12  # files that one file's imports are looked up in
LARGEST = 400_000


def with_imports(module: Module, path: Path, folder: Path) -> None:
    """Add to a module what it imports by name from files of the folder.

    A name that the file itself defines wins. Nothing is run; a file that cannot be read or parsed is passed over.
    """
    trees: dict[Path, ast.Module | None] = {}
    before = len(module.facts)
    for statement in module.nodes:
        if not isinstance(statement, ast.ImportFrom):
            continue
        file = _file_of(statement, path, folder)
        if file is None or (file not in trees and len(trees) >= FILES):
            continue
        if file not in trees:
            trees[file] = _parse(file)
        tree = trees[file]
        if tree is None:
            continue
        wanted = {alias.name: alias.asname or alias.name for alias in statement.names}
        for node in tree.body:
            if isinstance(node, FunctionNode | ast.ClassDef) and node.name in wanted and wanted[node.name] == node.name:
                module.add(node, _shown(file, folder))
    if len(module.facts) > before:
        module.read_anew()
        module.write_out_comprehensions()


def _file_of(statement: ast.ImportFrom, path: Path, folder: Path) -> Path | None:
    """The file of the folder that a `from ... import` reads, or `None`."""
    parts = (statement.module or "").split(".") if statement.module else []
    bases = [path.parent, folder] if statement.level == 0 else [path.parent]
    for _ in range(max(statement.level - 1, 0)):
        bases = [base.parent for base in bases]
    for base in bases:
        target = base.joinpath(*parts) if parts else base
        for file in (target.with_suffix(".py"), target / "__init__.py"):
            try:
                if parts and file.is_file() and file.resolve() != path.resolve():
                    return file
            except (OSError, ValueError):
                continue
    return None


def _parse(file: Path) -> ast.Module | None:
    try:
        if file.stat().st_size > LARGEST:
            return None
        return ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _shown(file: Path, folder: Path) -> str:
    """The name of an imported file, as short as the working directory and the folder allow."""
    for base in (Path(), folder):
        try:
            return file.resolve().relative_to(base.resolve()).as_posix()
        except ValueError:
            continue
    return file.as_posix()

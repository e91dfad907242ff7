"""Find a job: a built-in name, or a function in a file of the user's own."""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from microbatch.errors import ConfigError
from microbatch.kind_words import kind_of
from microbatch.train.job import Job
from microbatch.train.jobs import BUILT_IN


def find_job(name: str) -> Callable[..., Any]:
    """Import the function that makes a job.

    Args:
        name: Built-in name, or ``path/to/file.py:function``.

    Returns:
        The function, not yet called.

    Raises:
        ConfigError: There is no such job, file or function, or it is not a function, or the file is not valid Python.

    Cost:
        Runs the file's top level; whatever that raises reaches the caller unchanged.
    """
    if name in BUILT_IN:
        module, _, function = BUILT_IN[name].partition(":")
        return getattr(importlib.import_module(module), function)
    path, colon, function = name.rpartition(":")
    if not colon:
        path, function = name, ""
    if not path.endswith(".py"):
        if name.endswith(".toml"):
            raise ConfigError(
                f"{name} is a file of settings, not a job: write --config {name}, and name the job in the file or "
                "before it"
            )
        near = difflib.get_close_matches(name, BUILT_IN, n=1)
        hint = f"did you mean {near[0]!r}? The" if near else "the"
        raise ConfigError(
            f"there is no job {name!r}; {hint} built-in jobs are {_listed(BUILT_IN)}, and a job of your own is written "
            "path/to/file.py:function"
        )
    return _from_file(Path(path), function)


def call_job(make: Callable[..., Any], offered: Mapping[str, Any], *, name: str) -> Job:
    """Call a job's function with the keyword arguments that it accepts.

    Args:
        make: What `find_job` returned.
        offered: Values by keyword; `None` means that the user said nothing, so the function's own default holds.
        name: How the user named the job, for errors.

    Returns:
        The job.

    Raises:
        ConfigError: The function does not take something that the user gave, needs something that cannot be given, or
            does not return a `Job`.

    Example:
        >>> call_job(lambda seed: seed, {"seed": 1, "data": None}, name="x.py:f")
        Traceback (most recent call last):
            ...
        microbatch.errors.ConfigError: x.py:f returned an int, not a Job; end it with `return mb.Job(...)`
    """
    parameters = inspect.signature(make).parameters.values()
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    by_keyword = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    for parameter in parameters:
        unnamed = parameter.kind is parameter.POSITIONAL_ONLY
        if parameter.default is parameter.empty and (unnamed or parameter.name not in offered):
            if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
                continue
            raise ConfigError(
                f"{name} needs the argument {parameter.name!r}, which is not among those that a job is called with: "
                f"{_listed(offered)}, by keyword; give it a default"
            )
    arguments: dict[str, Any] = {}
    for key, value in offered.items():
        if key not in by_keyword and not takes_any:
            if value is not None and key == "data":
                raise ConfigError(f"{name} takes no data: its function has no parameter {key!r}, so leave out --{key}")
            continue
        if value is not None or (key in by_keyword and by_keyword[key].default is inspect.Parameter.empty):
            arguments[key] = value
    job = make(**arguments)
    if not isinstance(job, Job):
        found = "nothing" if job is None else f"{kind_of(job)}"
        raise ConfigError(f"{name} returned {found}, not a Job; end it with `return mb.Job(...)`")
    return job


def _from_file(path: Path, function: str) -> Callable[..., Any]:
    path = path.expanduser()
    if not path.is_file():
        nearby = [entry.name for entry in path.parent.glob("*.py")] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, nearby, n=1)
        hint = f"; did you mean {path.with_name(near[0])}?" if near else f"; the current folder is {Path.cwd()}"
        raise ConfigError(f"there is no file {path}{hint}")
    if not function:
        raise ConfigError(f"name the function of {path} that makes the job: {path}:function, {_functions_in(path)}")
    module = _import(path.resolve())
    made = getattr(module, function, None)
    if made is None:
        raise ConfigError(f"{path} has no function {function!r}; {_functions_in(path)}")
    if not callable(made):
        raise ConfigError(f"{function!r} in {path} is {kind_of(made)}, not a function that returns a Job")
    return made


def _import(path: Path) -> Any:
    """Import a file as `python file.py` would: with its own folder first on the path."""
    folder = str(path.parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    name = path.stem
    if name in sys.modules and getattr(sys.modules[name], "__file__", None) != str(path):
        # A file called random.py or torch.py must not take the place of the module of that name.
        name = f"microbatch_job_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path} cannot be imported as a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        del sys.modules[name]
        if error.filename != str(path):  # in what it imports, whose traceback says from where
            raise
        line = f": {error.text.strip()}" if error.text else ""
        raise ConfigError(f"{path}, line {error.lineno} is not valid Python: {error.msg}{line}") from error
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _functions_in(path: Path) -> str:
    """List a file's public functions without running it."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError, RecursionError, OSError):
        return "but the file is not valid Python"
    names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")]
    return f"its functions are {_listed(names)}" if names else "it has no functions"


def _listed(names: Any) -> str:
    return ", ".join(str(name) for name in names) or "none"

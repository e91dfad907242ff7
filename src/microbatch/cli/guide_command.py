"""The command ``guide``: the page, the live view of runs, and a copy of both for hosting."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from rich.console import Console

from microbatch.cli.error_report import report_error
from microbatch.errors import ConfigError, MicrobatchError, MissingDependencyError

BAD_INPUT = 2


def run_guide(runs: Sequence[Path], *, port: float | str | None, browser: bool, export: Path | None) -> int:
    """Serve the guide until Ctrl-C, or write a copy of it.

    Args:
        runs: Run directories to look at; none for the guide itself.
        port: 0 for any that is free; `None` for the usual one, or any if it is taken.
        browser: Whether to open a browser.
        export: Folder that a copy is written to, instead of serving.

    Returns:
        The exit code: 0 ended as asked, 2 bad input.
    """
    shown, errors = Console(highlight=False, soft_wrap=True), Console(stderr=True, highlight=False, soft_wrap=True)
    try:
        number = _port(port)
        if export is not None:
            _check_export(runs, port=number)
            return _export(export, shown)
        return _serve(runs, port=number, browser=browser, shown=shown)
    except MicrobatchError as error:
        report_error(error, errors)
        return BAD_INPUT


def _port(given: float | str | None) -> int | None:
    if given is None or (isinstance(given, int) and 0 <= given < 1 << 16):
        return given
    raise ConfigError(f"--port is {json.dumps(given)}: it must be a whole number from 0 to 65535")


def _serve(runs: Sequence[Path], *, port: int | None, browser: bool, shown: Console) -> int:
    try:
        from microbatch.guide.live import open_runs
        from microbatch.guide.serve import serve
        from microbatch.guide.server import Guide
    except ModuleNotFoundError as error:
        raise _missing(error) from error
    guide = Guide(open_runs(runs))

    def show(address: str) -> None:
        what = "run" if len(runs) == 1 else "runs" if runs else "guide"
        shown.print(f"the {what}: [bold cyan]{address}[/]  [dim]Ctrl-C ends it[/]")

    with suppress(KeyboardInterrupt):  # which is how one ends it
        serve(guide, port=port, path="/run" if runs else "/", show=show, browser=browser)
    return 0


def _check_export(runs: Sequence[Path], *, port: int | None) -> None:
    """Refuse what a copy of the guide cannot take into account."""
    if runs:
        raise ConfigError(f"--export writes a copy of the guide alone, without {runs[0]}; leave the run out")
    if port is not None:
        raise ConfigError(f"--export serves nothing, so --port {port} has no effect; leave one of them out")


def _export(folder: Path, shown: Console) -> int:
    from microbatch.guide.export import export

    def tell(text: str) -> None:
        shown.print(f"  {text}", style="dim", markup=False)

    export(folder, tell=tell)
    shown.print(f"the guide is in {folder}; any web server can host it, and guide.html opens by itself", markup=False)
    return 0


def _missing(error: ModuleNotFoundError) -> Exception:
    if error.name is None or error.name.partition(".")[0] not in ("starlette", "uvicorn", "anyio"):
        return error
    return MissingDependencyError(
        f'the guide needs the package "{error.name}"; install it with: pip install "microbatch[guide]"'
    )

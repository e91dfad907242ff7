"""Read the arguments of ``microbatch new`` and write the file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def new(
    file: Annotated[Path, typer.Argument(metavar="FILE.py", help="Where the job is written.", show_default=False)],
) -> None:
    """Write a job of your own that runs as it is.

    Args:
        file: The file; it must not exist yet.

    Raises:
        Exit: With code 2 where the file cannot be written.
    """
    template = (Path(__file__).parent / "templates" / "own_job.py").read_text(encoding="utf-8")
    problem = _problem(file)
    if not problem:
        try:
            with file.open("x", encoding="utf-8") as opened:
                opened.write(template.replace("FILE:job", f"{file}:job", 1))
        except FileExistsError:
            problem = f"{file} is there already, and is not written over; choose another name"
        except OSError as error:
            problem = f"{file} cannot be written: {error.strerror or error}"
    if problem:
        typer.secho(f"error: {problem}", err=True)
        raise typer.Exit(2)
    typer.echo(f"wrote {file}. Train it, ask which microbatch fits, or check its gradient:")
    for command in ("train", "plan", "check"):
        typer.echo(f"  microbatch {command} {file}:job")


def _problem(file: Path) -> str:
    if file.suffix != ".py":
        return f"{file} is no name of a Python file; write {file.with_suffix('.py')}"
    if not file.parent.is_dir():
        return f"there is no folder {file.parent}"
    return ""

"""How a command reports an error: a line on standard error, and a JSON object for programs that read its output."""

from __future__ import annotations

import json
import sys

from rich.console import Console

from microbatch.cli.flag_words import in_flags


def report_error(error: Exception, errors: Console, *, as_json: bool = False) -> None:
    """Report an error that the user can mend, without a traceback.

    Args:
        error: The error.
        errors: The console on standard error.
        as_json: Whether to write a JSON object to standard output too.
    """
    message = in_flags(str(error))
    if as_json:
        sys.stdout.write(json.dumps({"event": "error", "kind": type(error).__name__, "message": message}) + "\n")
    errors.print("error:", style="bold red", end=" ")
    errors.print(message, markup=False)

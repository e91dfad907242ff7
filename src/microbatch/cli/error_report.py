"""How a command reports an error: a line on standard error, and a JSON object for programs that read its output."""

from __future__ import annotations

import json
import sys

from rich.console import Console
from rich.text import Text

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
    print_error(errors, message)


def print_error(errors: Console, message: str, *, label: str = "error:") -> None:
    """Print a message between words of a terminal; a command in it stays on one line, to be copied.

    Args:
        errors: The console on standard error.
        message: The message; lines that begin with spaces are commands.
        label: What stands before it.
    """
    for index, line in enumerate(message.splitlines()):
        head = (f"{label} ", "bold red") if index == 0 else ""
        errors.print(Text.assemble(head, line), soft_wrap=errors.soft_wrap or line.startswith("  "))

"""Run the work of a command, and turn its errors into messages and exit codes."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable
from typing import TypeVar

import torch

from microbatch.cli.error_report import report_error
from microbatch.cli.waiting import Waiting
from microbatch.errors import ConfigError, MicrobatchError
from microbatch.train.config import flag_name

FAILED, BAD_INPUT = 1, 2

_Found = TypeVar("_Found")


def reported(work: Callable[[], _Found], line: Waiting, *, as_json: bool) -> tuple[_Found | None, int]:
    """Run the work of a command, and report an error.

    Args:
        work: Does the work, and returns what is shown.
        line: The line that shows how far the work is; it ends with it.
        as_json: Whether to write an error to standard output too, as a JSON object.

    Returns:
        What the work returned, and 0. After an error, `None` and the exit code: 1 failed, 2 bad input.
    """
    try:
        with line:
            return work(), 0
    except (MicrobatchError, OSError) as error:
        report_error(error, line.console, as_json=as_json)
        return None, FAILED if isinstance(error, torch.OutOfMemoryError | OSError) else BAD_INPUT
    except Exception:  # noqa: BLE001 - whatever the user's own code raises is shown as Python shows it
        traceback.print_exc()
        return None, FAILED


def refuse_word(name: str, value: object, kind: str) -> None:
    """Refuse a word where an option has to be a number.

    Args:
        name: Name of the option's setting, such as ``"batch_size"``.
        value: What `number_or_word` returned.
        kind: What is needed, such as ``"a whole number"``.

    Raises:
        ConfigError: The value is a word.
    """
    if isinstance(value, str):
        raise ConfigError(f"{flag_name(name)} is {json.dumps(value)}: it must be {kind}")

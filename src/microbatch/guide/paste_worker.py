"""The process in which the doctor reads a pasted loop: JSON text comes in, its findings go out as JSON.

A text can be made so that it takes minutes to read, or more stack than there is. A process can be ended then.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from contextlib import suppress
from importlib import import_module
from typing import Any

from microbatch.linting.doctor import judge
from microbatch.linting.examine import examine
from microbatch.linting.formats.json_form import json_form
from microbatch.linting.report import Report
from microbatch.linting.rules.table import RULES
from microbatch.linting.sources import Source, read_text

MOST_SECONDS = 30.0
"""After which the process ends by itself: the server, which ends it earlier, may be gone."""

MOST_MEMORY = 2 << 30
"""Bytes of address space."""


def findings_json(text: str) -> str:
    """Judge a text. It is never taken for the name of a file, and nothing that it imports is looked up.

    Args:
        text: Any text.

    Returns:
        What ``microbatch doctor --output-format json`` prints, in ASCII.
    """
    source = read_text(text)
    sources = {source.path: source} if isinstance(source, Source) else {}
    return "".join(json_form(Report(examine(source, judge), sources, RULES, 1)))


def main() -> None:
    """Judge the text that standard input holds."""
    text = json.loads(sys.stdin.buffer.read())
    ending = threading.Timer(MOST_SECONDS, os._exit, [1])
    ending.daemon = True
    ending.start()
    with suppress(ImportError, OSError, ValueError):  # where the system has no such limit
        resource: Any = import_module("resource")
        resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
    sys.stdout.write(findings_json(text))


if __name__ == "__main__":
    main()

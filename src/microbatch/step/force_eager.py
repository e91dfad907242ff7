"""Keep the compiler away from what a mode has to see operator by operator."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from threading import Lock

import torch


class _Users:
    """Who asks for it now: the process has one stance, and windows need not end in the reverse of their order."""

    lock = Lock()
    count = 0
    stack = ExitStack()


@contextmanager
def uncompiled() -> Generator[None]:
    """Run what was compiled as it was written, and compile nothing, until the last of those who asked for it is done.

    Yields:
        Nothing.

    Cost:
        Imports the compiler, about a second where nothing has yet.
    """
    with _Users.lock:
        if not _Users.count:
            _Users.stack.enter_context(torch.compiler.set_stance("force_eager"))
        _Users.count += 1
    try:
        yield
    finally:
        with _Users.lock:
            _Users.count -= 1
            if not _Users.count:
                _Users.stack.close()

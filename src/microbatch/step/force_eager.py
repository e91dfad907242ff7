"""Turn off compiled code while a dispatch mode has to see every operator."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from threading import RLock

import torch


class _Users:
    """The number of blocks inside `force_eager`: the process has one stance, and blocks may end in any order."""

    lock = RLock()
    count = 0
    stack = ExitStack()


@contextmanager
def force_eager() -> Generator[None]:
    """Run compiled functions eagerly, and compile nothing, until the last such block in the process ends.

    Yields:
        Nothing.

    Cost:
        Imports the compiler, about a second if it is not imported yet.
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

"""Items for the tests of `benchmarks.gpu`: one that passes, and each way to go wrong."""

import os
import signal
import time
from typing import Any

from benchmarks.gpu.outcome import NotHereError, require
from benchmarks.gpu.schedule import PROOFS, Item


def passes(_here: Any, _say: Any) -> dict[str, int]:
    return {"answer": 42}


def crashes(_here: Any, _say: Any) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def hangs(_here: Any, say: Any) -> None:
    say(row="one")
    time.sleep(600)


def not_held(_here: Any, _say: Any) -> None:
    require(held=False, words="2 + 2 is 5")


def raises(_here: Any, _say: Any) -> None:
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def not_here(here: Any, _say: Any) -> None:
    here.need_cuda("this")
    raise NotHereError("that")


ITEMS = tuple(
    Item(PROOFS, name, f"tests.benchmarks.gpu_items:{function}", 1.0 if name == "hangs" else 60.0)
    for name, function in [
        ("crashes", "crashes"),
        ("first", "passes"),
        ("not held", "not_held"),
        ("not here", "not_here"),
        ("raises", "raises"),
        ("last", "passes"),
        ("hangs", "hangs"),
    ]
)

"""The process in which the playground trains: settings come in on a line, events go out, a line each.

Nothing of the page is run here: settings are read by the table, and name lessons of a fixed list.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from typing import Any, TextIO

import torch

from microbatch.errors import MicrobatchError
from microbatch.guide.playground_settings import read_settings
from microbatch.guide.training import Training
from microbatch.train.rundir import jsonable


class Lines:
    """Write events as lines of JSON.

    Args:
        stream: Where to.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __call__(self, kind: str, values: Mapping[str, Any]) -> None:
        """Write one event.

        Args:
            kind: Its kind.
            values: Plain values.
        """
        self._stream.write(json.dumps(jsonable({"kind": kind, **values}), ensure_ascii=False) + "\n")
        self._stream.flush()


def main() -> None:
    """Train the run whose settings are the first line of standard input."""
    # Whatever a library prints must not be taken for an event.
    tell = Lines(os.fdopen(os.dup(1), "w", encoding="utf-8"))
    os.dup2(2, 1)
    first = sys.stdin.readline()
    if not first:
        return  # it was kept ready, and nobody needed it
    threading.Thread(target=_end_with_input, daemon=True).start()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) - 1))  # one core is left to who looks at it
    try:
        settings = read_settings(json.loads(first))
        pace = float(settings.pace)
        Training(settings, tell, rest=lambda: time.sleep(pace) if pace else None).run()
    except MicrobatchError as error:
        tell("failed", {"error": str(error)})
    except Exception as error:  # noqa: BLE001 -- whatever it was, who looks at the page is told
        traceback.print_exc()
        tell("failed", {"error": f"{type(error).__name__}: {error}"})


def _end_with_input() -> None:
    """Leave when the server has gone: nobody would stop this process any more."""
    while sys.stdin.readline():
        pass
    os._exit(1)


if __name__ == "__main__":
    main()

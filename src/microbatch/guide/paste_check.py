"""Check a loop that a reader pasted: the server's side of the process in which the doctor reads it."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from microbatch.errors import ConfigError, MicrobatchError

MOST_SOURCE = 200_000
"""Characters of a pasted text."""

MOST_PASTED = 4 * MOST_SOURCE
"""Bytes of the request: JSON writes a line's end as two, and other alphabets take more than one."""

MOST_SECONDS = 10.0
"""For which the doctor may read one text, the wait for another one included."""


WORKER = "microbatch.guide.paste_worker"


class PasteError(MicrobatchError, RuntimeError):
    """The doctor did not come to an end with a text."""


def read_pasted(value: Any) -> str:
    """Read what the page sends.

    Args:
        value: Parsed JSON.

    Returns:
        The pasted text.

    Raises:
        ConfigError: It is not an object with a text of a bounded size.
    """
    if not isinstance(value, dict) or set(value) != {"source"} or not isinstance(value["source"], str):
        raise ConfigError('a loop is sent as an object with one key, "source", that holds its text')
    source: str = value["source"]
    if len(source) > MOST_SOURCE:
        raise ConfigError(
            f"the text has {len(source):,} characters, and {MOST_SOURCE:,} are read at most; "
            "paste the loop alone, with the functions that it calls"
        )
    return source


class PasteCheck:
    """Have one text after the other judged."""

    def __init__(self) -> None:
        """Start nothing yet."""
        self._one = asyncio.Lock()

    async def findings(self, source: str) -> bytes:
        """Judge a text.

        Args:
            source: Any text.

        Returns:
            The findings, as JSON in ASCII.

        Raises:
            PasteError: The doctor took too long, or its process was ended.
        """
        try:
            async with asyncio.timeout(MOST_SECONDS), self._one:
                code, told = await _judge(source)
        except TimeoutError as error:
            raise PasteError(
                f"the doctor did not finish within {MOST_SECONDS:.0f} seconds; "
                "paste the loop alone, with the functions that it calls"
            ) from error
        if code != 0:
            how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
            raise PasteError(f"the doctor's process ended {how}; paste a smaller part of the text")
        return told


async def _judge(source: str) -> tuple[int, bytes]:
    """Start a process, and return its exit code and what it wrote."""
    pipe, nothing = asyncio.subprocess.PIPE, asyncio.subprocess.DEVNULL
    command = (sys.executable, "-m", WORKER)
    process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, stderr=nothing)
    try:
        # In ASCII: a lone half of a surrogate pair has no other encoding.
        told, _ = await process.communicate(json.dumps(source).encode())
        return await process.wait(), told
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()

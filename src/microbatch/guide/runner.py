"""The playground's side of the training process: it is started, listened to, stopped, and outlived."""

from __future__ import annotations

import asyncio
import json
import secrets
import sys
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

from microbatch.errors import MicrobatchError
from microbatch.guide.playground_settings import Settings

LINE_LIMIT = 1 << 20
ENDS = ("done", "overflow", "failed", "stopped")
"""Kinds of events after which a run has ended."""


class BusyError(MicrobatchError, RuntimeError):
    """A run is under way, and there is one at a time."""


class Run:
    """Hold one run: its process and everything that it has told.

    Attributes:
        name: Of the run; unguessable, so that one page does not stop another one's.
        settings: What it was started with.
        events: Everything so far; each has a ``"kind"`` and an ``"id"``, counted from 1.
    """

    def __init__(self, settings: Settings) -> None:
        """Name the run; nothing is started yet.

        Args:
            settings: What is trained.
        """
        self.name = secrets.token_hex(8)
        self.settings = settings
        self.events: list[dict[str, Any]] = []
        self._news = asyncio.Event()
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self._stopping = False

    @property
    def running(self) -> bool:
        """Whether it has not ended yet."""
        return not (self.events and self.events[-1]["kind"] in ENDS)

    @property
    def pid(self) -> int | None:
        """The number of its process; `None` before there is one."""
        return None if self._process is None else self._process.pid

    async def start(self, process: asyncio.subprocess.Process) -> None:
        """Give a process its settings, and begin to listen.

        Args:
            process: What `spawn` returned.
        """
        self._process = process
        if process.stdin is not None:
            with suppress(ConnectionError):  # one that is dead already is told by what it did not say
                process.stdin.write((json.dumps(self.settings.as_dict()) + "\n").encode())
                await process.stdin.drain()
        self._reader = asyncio.create_task(self._listen(process))

    async def stop(self) -> None:
        """End the process, and wait until it is gone. A run that has ended stays as it is."""
        self._stopping = True
        if self._process is not None and self._process.returncode is None:
            self._process.kill()  # it has nothing to put in order, and a step may last longer than patience
        if self._reader is not None:
            await self._reader

    async def wait(self) -> None:
        """Wait until it has ended."""
        if self._reader is not None:
            await self._reader

    async def since(self, last: int) -> AsyncIterator[list[dict[str, Any]]]:
        """Hand out what is told after an event, as it comes.

        Args:
            last: Number of the last event that is known; 0 for none.

        Yields:
            Events, one or more at once; ends when the run has ended.
        """
        while True:
            self._news.clear()
            fresh, running = self.events[last:], self.running
            if fresh:
                last += len(fresh)
                yield fresh
            elif not running:
                return
            else:
                await self._news.wait()

    async def _listen(self, process: asyncio.subprocess.Process) -> None:
        errors = asyncio.create_task(_tail(process.stderr))
        if process.stdout is not None:
            async for line in process.stdout:
                with suppress(ValueError):  # the last line of one that was killed while it wrote is torn
                    self._tell(json.loads(line))
        code = await process.wait()
        words = await errors
        if not self.running:
            return
        if self._stopping:
            self._tell({"kind": "stopped"})
        else:
            how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
            last = f": {words}" if words and code > 0 else ""
            self._tell({"kind": "failed", "error": f"the training process ended {how}{last}; run it again"})

    def _tell(self, event: dict[str, Any]) -> None:
        self.events.append({"id": len(self.events) + 1, **event})
        self._news.set()


async def spawn() -> asyncio.subprocess.Process:
    """Start a training process, which loads the library and then waits for its settings.

    Returns:
        The process.
    """
    pipe = asyncio.subprocess.PIPE
    command = (sys.executable, "-m", "microbatch.guide.worker")
    return await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, stderr=pipe, limit=LINE_LIMIT)


async def _tail(stream: asyncio.StreamReader | None) -> str:
    """Read a stream to its end, and keep its last line."""
    last = b""
    while stream is not None and (piece := await stream.read(1 << 16)):
        last = (last + piece)[-4096:]
    lines = last.decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else ""


class Playground:
    """Run one training at a time, and keep a process ready for the next one, so that it begins at once.

    Attributes:
        run: The newest run, or `None`.
    """

    def __init__(self) -> None:
        """Begin without a run."""
        self.run: Run | None = None
        self._starting = asyncio.Lock()
        self._ready: asyncio.subprocess.Process | None = None
        self._keeping: asyncio.Task[None] | None = None
        self._closed = False

    async def make_ready(self) -> None:
        """Start a process for the next run, if there is none."""
        if self._closed or (self._ready is not None and self._ready.returncode is None):
            return
        self._ready = await spawn()

    async def prepare(self) -> None:
        """Make ready for the first run: somebody looks at the page. Who looks at the live view alone needs no torch."""
        async with self._starting:
            if self.run is None:
                await self.make_ready()

    async def start(self, settings: Settings) -> Run:
        """Start a run.

        Args:
            settings: What is trained.

        Returns:
            The run.

        Raises:
            BusyError: Another one is under way.
        """
        async with self._starting:
            if self.run is not None and self.run.running:
                raise BusyError("a run is under way on this machine; stop it, or wait until it has ended")
            await self.make_ready()
            process, self._ready = self._ready, None
            if process is None:
                raise BusyError("the server is about to end")
            self.run = Run(settings)
            await self.run.start(process)
            self._keeping = asyncio.create_task(self._keep_ready(self.run))
            return self.run

    async def close(self) -> None:
        """Stop what is under way, and what waits."""
        self._closed = True
        async with self._starting:
            if self.run is not None:
                await self.run.stop()
            if self._keeping is not None:
                await self._keeping
            if self._ready is not None and self._ready.returncode is None:
                self._ready.kill()
                await self._ready.communicate()

    async def _keep_ready(self, run: Run) -> None:
        """Make ready for the next run when this one has ended: while it trains, the machine is its own."""
        await run.wait()
        await self.make_ready()

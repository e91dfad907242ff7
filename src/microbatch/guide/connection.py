"""Connections that end: requests that never come, answers that nobody reads, and streams when the server closes."""

from __future__ import annotations

import asyncio
import math
import socket

from uvicorn.protocols.http.h11_impl import H11Protocol

REQUEST_SECONDS = 10.0
"""Within which the head of a request must arrive, counted from the connection or from its first byte."""

WRITE_SECONDS = 20.0
"""For which a reader may take nothing of what is sent to it."""

SEND_BUFFER = 1 << 16
"""Bytes that the system holds for a reader."""

CLOSING_SECONDS = 0.5
"""After which an answer that is under way is cut off when the server ends."""


class Connection(H11Protocol):
    """Speak HTTP as uvicorn does, with an end to every wait.

    uvicorn itself waits without an end for the head of a request and for a reader that takes nothing.
    """

    _waiting: asyncio.TimerHandle | None = None
    _writing: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Begin to wait for a request.

        Args:
            transport: Of the connection.
        """
        super().connection_made(transport)
        connected = transport.get_extra_info("socket")
        if connected is not None:
            # In a larger buffer of the system, a slow reader looks like one that takes nothing.
            connected.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
            if hasattr(socket, "TCP_USER_TIMEOUT"):
                # A peer that is gone without a word is given up as early as one that reads nothing.
                connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * WRITE_SECONDS))
        self._waiting = self.loop.call_later(REQUEST_SECONDS, transport.abort)

    def data_received(self, data: bytes) -> None:
        """Take in a piece of a request, and begin or end the wait for its head.

        Args:
            data: The piece.
        """
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:  # pyright: ignore[reportUnnecessaryComparison]
            self._stop_waiting()
        elif self._waiting is None:
            self._waiting = self.loop.call_later(REQUEST_SECONDS, self.transport.abort)

    def pause_writing(self) -> None:
        """Begin to wait for a reader."""
        super().pause_writing()
        self._wait_for_reader()

    def resume_writing(self) -> None:
        """End the wait for a reader."""
        super().resume_writing()
        self._stop_writing()

    def shutdown(self) -> None:
        """End an answer that is under way, within a short time."""
        super().shutdown()
        self.loop.call_later(CLOSING_SECONDS, self.transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        """End every wait.

        Args:
            exc: Why it was lost; `None` where it was closed.
        """
        self._stop_waiting()
        self._stop_writing()
        super().connection_lost(exc)

    def _wait_for_reader(self, before: float = math.inf) -> None:
        """Go on waiting as long as anything was taken since the last look."""
        left = self.transport.get_write_buffer_size()
        if left >= before:
            self.transport.abort()
        else:
            self._writing = self.loop.call_later(WRITE_SECONDS, self._wait_for_reader, left)

    def _stop_waiting(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None

    def _stop_writing(self) -> None:
        if self._writing is not None:
            self._writing.cancel()
            self._writing = None

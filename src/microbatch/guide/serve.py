"""Serve the guide on this machine until Ctrl-C."""

from __future__ import annotations

import socket
import threading
import webbrowser
from collections.abc import Callable
from types import FrameType

import uvicorn

from microbatch.errors import ConfigError
from microbatch.guide.connection import Connection
from microbatch.guide.server import Guide

HOST = "127.0.0.1"
USUAL = 8765
"""Port that is tried when none is asked for, so that a link to an event leads there again tomorrow."""

LAST_PORT = 65535


class Server(uvicorn.Server):
    """Serve the guide; when it is to end, streams end first, so that nobody waits for them."""

    def __init__(self, guide: Guide) -> None:
        """Prepare a server.

        Args:
            guide: What is served.
        """
        config = uvicorn.Config(
            guide.app,
            http=Connection,
            ws="none",
            log_level="error",
            timeout_graceful_shutdown=1,
            server_header=False,
        )
        super().__init__(config)
        self._guide = guide

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to end.

        Args:
            sig: The signal.
            frame: Where it came.
        """
        self._guide.close()
        super().handle_exit(sig, frame)


def listen(port: int | None) -> socket.socket:
    """Take a port of this machine; nothing outside it can reach it.

    Args:
        port: 0 for any that is free; `None` for `USUAL`, or any if that is taken.

    Returns:
        The socket.

    Raises:
        ConfigError: The port is taken or may not be used.
    """
    if port is None:
        try:
            return listen(USUAL)
        except ConfigError:
            return listen(0)
    if not 0 <= port <= LAST_PORT:
        why = f"ports go from 0 to {LAST_PORT}"
        raise ConfigError(f"port {port} cannot be used ({why}); pass another --port, or 0 for any")
    taken = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        taken.bind((HOST, port))
        taken.listen()  # so that its address may be opened at once, and nobody else can take the same port
    except OSError as error:
        taken.close()
        why = (error.strerror or str(error)).lower()
        raise ConfigError(f"port {port} cannot be used ({why}); pass another --port, or 0 for any") from error
    return taken


def serve(guide: Guide, *, port: int | None, path: str, show: Callable[[str], object], browser: bool) -> None:
    """Serve until Ctrl-C.

    Args:
        guide: What is served.
        port: As for `listen`.
        path: Of the page that is opened.
        show: Called with its address.
        browser: Whether to open a browser on it.

    Raises:
        ConfigError: The port cannot be used.
    """
    with listen(port) as taken:
        address = f"http://{HOST}:{taken.getsockname()[1]}{path}"
        show(address)
        if browser:
            threading.Timer(0.5, webbrowser.open, [address]).start()
        Server(guide).run(sockets=[taken])

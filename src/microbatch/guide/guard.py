"""Who may ask the server for anything: pages of this machine's own, and nobody else."""

from __future__ import annotations

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from microbatch.guide.page import POLICY

HOSTS = frozenset({"127.0.0.1", "localhost"})

HEADERS = {
    "content-security-policy": f"{POLICY}; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


class Guard:
    """Refuse requests of foreign pages, and tell the browser what the own page may do.

    A name that an attacker lets point to 127.0.0.1 arrives as the request's Host; a foreign page's own origin arrives
    as its Origin. Ports do not matter, so that a tunnel may end at any of them.

    Args:
        app: What is guarded.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it.

        Args:
            scope: Of the request.
            receive: Its messages.
            send: Takes the answer's.
        """
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        refusal = self._refusal(Headers(scope=scope), method=scope["method"])
        if refusal is not None:
            await JSONResponse({"error": refusal}, status_code=403)(scope, receive, send_with_headers)
            return
        await self._app(scope, receive, send_with_headers)

    def _refusal(self, headers: Headers, *, method: str) -> str | None:
        host = headers.get("host", "")
        if host.rpartition(":")[0 if ":" in host else 2] not in HOSTS:
            return "this server answers to 127.0.0.1 and localhost only"
        origin = headers.get("origin")
        if origin is not None and origin != f"http://{host}":
            return "this server answers to its own page only"
        if method not in ("GET", "HEAD") and headers.get("sec-fetch-site", "same-origin") != "same-origin":
            return "this server takes orders from its own page only"
        return None

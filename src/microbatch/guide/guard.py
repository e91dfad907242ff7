"""Who may ask the server for anything: pages of this machine's own, and nobody else."""

from __future__ import annotations

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from microbatch.guide.page import POLICY

HOSTS = ("127.0.0.1", "localhost", "[::1]")
"""Names of this machine to itself. The last one arrives through a tunnel only: the server listens on 127.0.0.1."""

HTTP_PORT = 80
"""Which a browser leaves out of the Host."""

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
    as its Origin. Both must be this server's, name and port, letter by letter; so a tunnel ends at the port where it
    begins.

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

        _, port = scope.get("server") or (None, None)
        refusal = _refusal(Headers(scope=scope), method=scope["method"], port=port)
        if refusal is not None:
            await JSONResponse({"error": refusal}, status_code=403)(scope, receive, send_with_headers)
            return
        await self._app(scope, receive, send_with_headers)


def _refusal(headers: Headers, *, method: str, port: int | None) -> str | None:
    """Return why a request is refused, or `None`."""
    own = {f"{host}:{port}" for host in HOSTS} | ({*HOSTS} if port == HTTP_PORT else set())
    hosts = [host.lower() for host in headers.getlist("host")]
    if len(hosts) != 1 or hosts[0] not in own:
        return f"this server answers to 127.0.0.1:{port} and localhost:{port} only; end a tunnel at port {port} too"
    if any(origin != f"http://{hosts[0]}" for origin in headers.getlist("origin")):
        return "this server answers to its own page only"
    if method not in ("GET", "HEAD") and headers.get("sec-fetch-site", "same-origin") != "same-origin":
        return "this server takes orders from its own page only"
    return None

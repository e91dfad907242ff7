"""The server of the guide: its page, its playground, its live view; for this machine alone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from microbatch.errors import ConfigError
from microbatch.guide.guard import Guard
from microbatch.guide.live import WatchedRun, follow_runs
from microbatch.guide.page import STATIC, live_page, load_drawn, load_measured, page
from microbatch.guide.paste_check import MOST_PASTED, PasteCheck, PasteError, read_pasted
from microbatch.guide.playground_settings import read_settings
from microbatch.guide.python_code import program
from microbatch.guide.runner import BusyError, Playground, Run
from microbatch.train.rundir import jsonable

MOST_BODY = 16 * 1024
"""Bytes of a request's body."""

BODY_SECONDS = 10.0
"""Within which a request's body must arrive."""

KEEP_ALIVE = 15.0
"""Seconds after which a stream without news sends a comment: only what is written to shows that it is still there."""

PER_SECOND = 25
"""Messages of a stream a second, at most; each carries all that has happened since the one before."""

TYPES = {".css": "text/css", ".js": "text/javascript", ".json": "application/json", ".svg": "image/svg+xml"}


class Guide:
    """Answer the page's requests.

    Attributes:
        playground: Runs the trainings.
        app: What a server serves.
    """

    def __init__(self, runs: Sequence[WatchedRun] = ()) -> None:
        """Read what is served; nothing is started.

        Args:
            runs: Runs to look at.
        """
        self._page, self._live = page(load_measured(), load_drawn()), live_page()
        self._runs = runs
        # Read once, by name: no path that anyone asks for is ever opened.
        self._static = {file.name: file.read_bytes() for file in STATIC.iterdir() if file.suffix in TYPES}
        self._closing = asyncio.Event()
        self.playground = Playground()
        self._paste = PasteCheck()
        self.app = Starlette(
            routes=[
                Route("/", self._home),
                Route("/static/{name}", self._file),
                Route("/api/run", self._state),
                Route("/api/program", self._program),
                Route("/api/doctor", self._doctor, methods=["POST"]),
                Route("/run", self._live_home),
                Route("/api/live", self._live_state),
                Route("/api/live/events", self._live_events),
                Route("/api/runs", self._start, methods=["POST"]),
                Route("/api/runs/{name}/stop", self._stop, methods=["POST"]),
                Route("/api/runs/{name}/events", self._events),
            ],
            middleware=[Middleware(Guard)],
            exception_handlers={HTTPException: _explain, ConfigError: _refuse, BusyError: _refuse, PasteError: _refuse},
            lifespan=self._life,
        )

    def close(self) -> None:
        """End every stream, so that the server can end."""
        self._closing.set()

    @asynccontextmanager
    async def _life(self, _: Starlette) -> AsyncGenerator[None, None]:
        yield
        await self.playground.close()

    async def _home(self, _: Request) -> Response:
        return HTMLResponse(self._page, background=BackgroundTask(self.playground.prepare))

    async def _file(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in self._static:
            raise HTTPException(404, f"there is no file {name!r}")
        return Response(self._static[name], media_type=TYPES[Path(name).suffix])

    async def _state(self, _: Request) -> Response:
        return JSONResponse({"run": _described(self.playground.run)})

    async def _program(self, request: Request) -> Response:
        return JSONResponse({"program": program(read_settings(dict(request.query_params)))})

    async def _doctor(self, request: Request) -> Response:
        source = read_pasted(await _body(request, what="loops", most=MOST_PASTED))
        return Response(await self._paste.findings(source), media_type="application/json")

    async def _start(self, request: Request) -> Response:
        settings = read_settings(await _body(request))
        return JSONResponse({"run": _described(await self.playground.start(settings))}, status_code=201)

    async def _stop(self, request: Request) -> Response:
        run = self._run(request)
        await run.stop()
        return JSONResponse({"run": _described(run)})

    async def _events(self, request: Request) -> Response:
        run = self._run(request)
        last = _event_number(request)
        if last > len(run.events):
            raise HTTPException(400, f"there is no event {last} to go on from")
        return StreamingResponse(stream(run.since(last), self._closing), media_type="text/event-stream")

    async def _live_home(self, _: Request) -> Response:
        return HTMLResponse(self._live)

    async def _live_state(self, _: Request) -> Response:
        described = [asyncio.to_thread(run.described) for run in self._runs]
        return JSONResponse({"runs": await asyncio.gather(*described)})

    async def _live_events(self, _: Request) -> Response:
        # From the beginning each time, whatever event the reader knows: a thinned run is small.
        if not self._runs:
            raise HTTPException(404, "no run was named; look at one with: microbatch guide path/to/run")
        return StreamingResponse(stream(follow_runs(self._runs), self._closing), media_type="text/event-stream")

    def _run(self, request: Request) -> Run:
        run = self.playground.run
        if run is None or run.name != request.path_params["name"]:
            raise HTTPException(404, "there is no such run; another one may have been started since")
        return run


async def stream(source: AsyncIterator[Sequence[Mapping[str, Any]]], closing: asyncio.Event) -> AsyncIterator[str]:
    """Write events as a server-sent stream.

    Args:
        source: Lists of events, each with an ``"id"``.
        closing: Set when the server ends.

    Yields:
        Messages; the last one, of the type ``end``, says that there is nothing to wait for.
    """
    ended = asyncio.create_task(closing.wait())
    following: asyncio.Task[Sequence[Mapping[str, Any]] | None] | None = None
    try:
        while True:
            following = following or asyncio.create_task(anext(source, None))
            await asyncio.wait({following, ended}, timeout=KEEP_ALIVE, return_when=asyncio.FIRST_COMPLETED)
            if ended.done():
                return
            if not following.done():
                yield ": still here\n\n"
                continue
            events, following = following.result(), None
            if events is None:
                yield "event: end\ndata: {}\n\n"
                return
            yield f"id: {events[-1]['id']}\ndata: {_json(events)}\n\n"
            await asyncio.sleep(1 / PER_SECOND)
    finally:
        # Also when whoever looked on has gone: nobody waits for what comes next.
        ended.cancel()
        if following is not None:
            following.cancel()


def _json(events: Sequence[Mapping[str, Any]]) -> str:
    """Write events as strict JSON, in ASCII: what a browser cannot read would end its stream."""
    try:
        return json.dumps(events, allow_nan=False)
    except ValueError:
        return json.dumps(jsonable(events), allow_nan=False)


def _event_number(request: Request) -> int:
    """Read the number of the last event that a stream's reader knows."""
    text = request.headers.get("last-event-id", "0")
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise HTTPException(400, f"there is no event {text[:20]!r} to go on from")
    return int(text)


def _described(run: Run | None) -> dict[str, Any] | None:
    if run is None:
        return None
    return {"name": run.name, "settings": run.settings.as_dict(), "running": run.running, "events": len(run.events)}


async def _body(request: Request, *, what: str = "settings", most: int = MOST_BODY) -> Any:
    """Read a request's JSON, of a bounded size."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip()
    if kind != "application/json":
        raise HTTPException(415, f"{what} are sent as application/json, not {kind[:40]!r}")
    body = b""
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for piece in request.stream():
                body += piece
                if len(body) > most:
                    raise HTTPException(413, f"{what} take at most {most:,} bytes")
    except TimeoutError as error:
        raise HTTPException(408, f"the {what} did not arrive within {BODY_SECONDS:.0f} seconds") from error
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, f"the {what} are not valid JSON") from error


async def _explain(_: Request, error: Exception) -> Response:
    code = error.status_code if isinstance(error, HTTPException) else 500
    return JSONResponse({"error": error.detail if isinstance(error, HTTPException) else str(error)}, status_code=code)


async def _refuse(_: Request, error: Exception) -> Response:
    code = 409 if isinstance(error, BusyError) else 503 if isinstance(error, PasteError) else 400
    return JSONResponse({"error": str(error)}, status_code=code)

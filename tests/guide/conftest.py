"""A real server on a free port of this machine, in a thread, with a client that can send what no browser would."""

import http.client
import json
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from typing import Any

import pytest

pytest.importorskip("starlette", reason="the guide's server comes with the extra: pip install 'microbatch[guide]'")
pytest.importorskip("uvicorn", reason="the guide's server comes with the extra: pip install 'microbatch[guide]'")

from microbatch.guide.serve import Server, listen
from microbatch.guide.server import Guide


def within_a_second(attempt: Callable[[], float]) -> bool:
    """Tell whether what takes a second at most does, once in three times: another job can only make it slower."""
    return any(attempt() <= 1 for _ in range(3))


class Client:
    """Ask a server, header by header."""

    def __init__(self, guide: Guide, port: int, server: Server) -> None:
        self.guide = guide
        self.port = port
        self.server = server
        self.url = f"http://127.0.0.1:{port}/"

    @contextmanager
    def open(
        self, method: str, path: str, *, headers: dict[str, str] | None = None, body: Any = None
    ) -> Generator[http.client.HTTPResponse, None, None]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body=body, headers=headers or {})
            with connection.getresponse() as answer:
                yield answer
        finally:
            connection.close()

    def ask(self, method: str, path: str, *, headers: dict[str, str] | None = None, body: Any = None) -> Any:
        with self.open(method, path, headers=headers, body=body) as answer:
            text = answer.read().decode()
            return answer.status, json.loads(text) if answer.headers["content-type"] == "application/json" else text

    def get(self, path: str, **headers: str) -> tuple[int, Any]:
        return self.ask("GET", path, headers={name.replace("_", "-"): value for name, value in headers.items()})

    def post(self, path: str, value: Any = None, **headers: str) -> tuple[int, Any]:
        sent = {"content-type": "application/json"} | {name.replace("_", "-"): text for name, text in headers.items()}
        return self.ask("POST", path, headers=sent, body=value if isinstance(value, bytes) else json.dumps(value))

    def start(self, **settings: Any) -> str:
        status, told = self.post("/api/runs", settings)
        assert status == 201, told
        return told["run"]["name"]

    def messages(self, path: str, **headers: str) -> Generator[tuple[int, list[dict[str, Any]]], None, None]:
        """Yield the messages of a stream, until it says that it has ended."""
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        with self.open("GET", path, headers=sent) as answer:
            assert answer.status == 200, answer.read()
            fields: dict[str, str] = {}
            for line in answer:
                name, _, value = line.decode().rstrip("\n").partition(": ")
                if name:
                    fields[name] = value
                elif fields:
                    if fields.get("event") == "end":
                        return
                    yield int(fields["id"]), json.loads(fields["data"])
                    fields = {}

    def events(self, run: str, **headers: str) -> list[dict[str, Any]]:
        """Return everything that a run tells, to its end."""
        return [event for _, events in self.messages(f"/api/runs/{run}/events", **headers) for event in events]

    def wait_for(self, run: str, kind: str) -> None:
        with closing(self.messages(f"/api/runs/{run}/events")) as messages:
            for _, events in messages:
                if any(event["kind"] == kind for event in events):
                    return
        pytest.fail(f"the run ended without {kind!r}")


def serving(guide: Guide) -> Iterator[Client]:
    """Serve until the generator is closed."""
    with listen(0) as taken:
        server = Server(guide)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [taken]})
        thread.start()
        while not server.started:
            time.sleep(0.005)
        try:
            yield Client(guide, taken.getsockname()[1], server)
        finally:
            guide.close()
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    yield from serving(Guide())


@pytest.fixture
def idle(client: Client) -> Iterator[Client]:
    """The same, with nothing under way before and after."""
    _stop(client)
    yield client
    _stop(client)


def _stop(client: Client) -> None:
    run = client.get("/api/run")[1]["run"]
    if run is not None and run["running"]:
        client.post(f"/api/runs/{run['name']}/stop", {})

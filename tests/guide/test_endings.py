"""Everything ends: the server, within two seconds of SIGTERM; a request that never comes; an answer nobody reads."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from tests.guide.browser import launched, opened, until
from tests.guide.conftest import Client, serving

from microbatch.guide import connection, live, server
from microbatch.guide.live import open_runs
from microbatch.guide.server import Guide

PATIENCE = 10.0
"""Seconds for what takes far less: a busy machine may need them."""


def becomes(true: Callable[[], bool]) -> bool:
    ends = time.monotonic() + PATIENCE
    while not true():
        if time.monotonic() > ends:
            return False
        time.sleep(0.01)
    return True


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    """A server of one run, with short time-outs."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n', encoding="utf-8")
    monkeypatch.setattr(live, "EVERY", 0.01)
    monkeypatch.setattr(connection, "REQUEST_SECONDS", 0.3)
    monkeypatch.setattr(connection, "WRITE_SECONDS", 0.3)
    monkeypatch.setattr(server, "BODY_SECONDS", 0.3)
    monkeypatch.setattr(server, "KEEP_ALIVE", 0.05)
    yield from serving(Guide(open_runs([tmp_path])))


def connected(client: Client, text: str = "") -> socket.socket:
    made = socket.socket()
    made.settimeout(PATIENCE)
    made.connect(("127.0.0.1", client.port))
    made.sendall(text.replace("HOST", f"127.0.0.1:{client.port}").encode())
    return made


def rest(of: socket.socket) -> bytes:
    """Read until the other side ends the connection; a TimeoutError where it does not."""
    found = b""
    with suppress(ConnectionError):
        while piece := of.recv(1 << 16):
            found += piece
    return found


HEAD = "GET /api/live HTTP/1.1\r\nHost: HOST\r\n"


@pytest.mark.parametrize("text", ["", "GET /", HEAD], ids=["none", "word", "head"])
def test_a_request_that_never_comes_is_not_waited_for(client: Client, text: str) -> None:
    with connected(client, text) as half:
        assert rest(half) == b""
    assert becomes(lambda: not client.server.server_state.connections)


def test_a_second_request_that_never_comes_is_not_waited_for(client: Client) -> None:
    """What has begun to come takes away the end that the server sets to an idle connection."""
    with connected(client, f"{HEAD}\r\n") as half:
        assert half.recv(1 << 16).startswith(b"HTTP/1.1 200")
        half.sendall(b"GET /")
        half.settimeout(3)  # an idle connection ends after five
        rest(half)


def test_a_request_that_comes_byte_by_byte_is_not_waited_for(client: Client) -> None:
    with connected(client) as half, pytest.raises(ConnectionError):
        trickle(half)


def trickle(into: socket.socket) -> None:
    ends = time.monotonic() + PATIENCE
    while time.monotonic() < ends:
        into.sendall(b"G")
        time.sleep(0.02)


def test_a_body_that_never_comes_is_not_waited_for(client: Client) -> None:
    head = "POST /api/runs HTTP/1.1\r\nHost: HOST\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{"
    with connected(client, head) as half:
        assert half.recv(12) == b"HTTP/1.1 408"


def test_an_answer_that_nobody_reads_is_given_up(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the server itself: not every system has a time-out of its own for that."""
    monkeypatch.delattr(socket, "TCP_USER_TIMEOUT", raising=False)
    with connected(client, long_answer(client, monkeypatch)) as stuck:
        assert becomes(lambda: len(client.server.server_state.connections) == 1)
        assert becomes(lambda: not client.server.server_state.connections)
        assert len(rest(stuck)) < LONG


def test_who_reads_slowly_gets_all_of_an_answer(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "WRITE_SECONDS", 0.8)
    with connected(client, long_answer(client, monkeypatch)) as slow:
        found, ends = 0, time.monotonic() + 2
        while piece := slow.recv(1 << 16):
            found += len(piece)
            if time.monotonic() < ends:
                time.sleep(0.02)
    assert found > LONG


LONG = 20_000_000


def long_answer(client: Client, monkeypatch: pytest.MonkeyPatch) -> str:
    """Let the page be longer than any buffer, and return the request for it."""
    guide: Any = client.guide
    monkeypatch.setattr(guide, "_page", "x" * LONG)
    return "GET / HTTP/1.1\r\nHost: HOST\r\nConnection: close\r\n\r\n"


def test_a_stream_without_news_says_that_it_is_there_and_ends_with_its_reader(client: Client) -> None:
    with connected(client, "GET /api/live/events HTTP/1.1\r\nHost: HOST\r\n\r\n") as reader:
        found = b""
        while found.count(b": still here\n\n") < 3:
            found += reader.recv(1 << 16)
    assert found.startswith(b"HTTP/1.1 200")
    assert becomes(lambda: not client.server.server_state.tasks)


def test_a_page_that_is_not_seen_holds_no_stream_and_one_without_a_server_says_so(client: Client) -> None:
    """Six streams are all that a browser opens to one server; a tab in the background must not hold one."""

    def show(hidden: str) -> str:
        return (
            f"Object.defineProperty(document, 'hidden', {{value: {hidden}, configurable: true}});"
            "document.dispatchEvent(new Event('visibilitychange'))"
        )

    lost = ("ERR_CONNECTION_REFUSED", "ERR_INCOMPLETE_CHUNKED_ENCODING")
    with launched() as browser, opened(browser, f"{client.url}run", expected=lost) as page:
        until(page, "document.querySelector('[data-runs]').textContent.includes('step 1, loss 0.5')")
        assert len(client.server.server_state.tasks) == 1
        page.evaluate(show("true"))
        assert becomes(lambda: not client.server.server_state.tasks)
        page.evaluate(show("false"))
        assert becomes(lambda: len(client.server.server_state.tasks) == 1)
        assert not page.locator("[data-notice]").is_visible()
        guide: Any = client.guide
        guide.close()
        client.server.should_exit = True
        until(page, "document.querySelector('[data-notice]').textContent.includes('does not answer any more')")


def test_sigterm_is_obeyed_within_two_seconds_under_load(tmp_path: Path) -> None:
    """While a long run is read, streams are open, one of them is not read, and half a request hangs."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text(
        "".join(f'{{"step": {step}, "loss": 0.5}}\n' for step in range(1, 300_001)), encoding="utf-8"
    )
    # A busy machine can only make it slower.
    assert any(seconds_to_end(run) < 2 for _ in range(3))


def seconds_to_end(run: Path) -> float:
    command = [sys.executable, "-m", "microbatch", "guide", "--no-browser", "--port", "0", str(run)]
    with ExitStack() as stack:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        stack.callback(process.communicate)
        stack.callback(process.kill)
        assert process.stdout is not None
        port = int(process.stdout.readline().partition("127.0.0.1:")[2].partition("/")[0])
        opened_ones: list[socket.socket] = []
        for text in ["", "GET / HT", *["GET /api/live/events HTTP/1.1\r\nHost: HOST\r\n\r\n"] * 6]:
            opened_ones.append(stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=60)))
            opened_ones[-1].sendall(text.replace("HOST", f"127.0.0.1:{port}").encode())
        assert opened_ones[-1].recv(1)  # the last stream has begun
        reader = threading.Thread(target=rest, args=(opened_ones[-1],))
        reader.start()
        began = time.monotonic()
        os.kill(process.pid, signal.SIGTERM)
        process.wait(60)
        took = time.monotonic() - began
        reader.join(60)
        assert process.returncode == -signal.SIGTERM
        assert process.stderr is not None
        assert process.stderr.read() == ""
    return took

"""The server answers its own page and nobody else, says what is wrong, and outlives its trainer."""

import asyncio
import os
import signal
import socket
import time
from typing import Any

import pytest
from tests.guide.conftest import serving, within_a_second

from microbatch.guide.playground_settings import FIELDS, read_settings
from microbatch.guide.runner import Run
from microbatch.guide.server import MOST_BODY, PER_SECOND, Guide

SLOW = {"model": "mlp", "steps": 400, "pace": "0.6"}


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


# -- who may ask ------------------------------------------------------------------------------------------------------


def test_nothing_outside_this_machine_reaches_it(client: Any) -> None:
    # Of another address of the loopback network, all of which a server on 0.0.0.0 would answer.
    with pytest.raises(ConnectionError), socket.create_connection(("127.0.0.2", client.port), timeout=5):
        pass


FOREIGN = [
    *("", "evil.example", "evil.example:PORT", "127.0.0.1.evil.example", "localhost.evil.example:PORT", "[::1]"),
    # The name is right; what stands behind it is not the server's port.
    *("127.0.0.1", "localhost", "127.0.0.1:1", "localhost:", "localhost:PORT0", "localhost:PORT:PORT"),
    *("127.0.0.1:PORT.evil.example", "127.0.0.1:evil.example", "localhost:PORT@evil.example", "localhost:+PORT"),
    # Other spellings of this machine.
    *("localhost.:PORT", "127.1:PORT", "0.0.0.0:PORT", "[::ffff:127.0.0.1]:PORT", "[::1%lo]:PORT", "::1:PORT"),
    *("evil.example@127.0.0.1:PORT", "127.0.0.1:PORT, evil.example", "127.0.0.1:PORT/"),
]


@pytest.mark.parametrize("host", FOREIGN)
def test_another_host_is_refused(client: Any, host: str) -> None:
    status, told = client.get("/", host=host.replace("PORT", str(client.port)))
    assert status == 403
    assert f"127.0.0.1:{client.port}" in told["error"]


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "https://127.0.0.1:PORT", "null", "http://127.0.0.1:1", "http://127.0.0.1:PORT.e"]
)
@pytest.mark.parametrize("path", ["/api/run", "/"])
def test_another_origin_is_refused(client: Any, origin: str, path: str) -> None:
    origin = origin.replace("PORT", str(client.port))
    assert client.get(path, origin=origin)[0] == 403
    assert client.post("/api/runs", {}, origin=origin)[0] == 403


def test_of_two_origins_none_may_be_foreign(client: Any) -> None:
    """A client that sends both cannot hide the one behind the other."""
    own = f"127.0.0.1:{client.port}"
    with socket.create_connection(("127.0.0.1", client.port), timeout=20) as connection:
        origins = f"Origin: http://{own}\r\nOrigin: http://evil.example\r\n"
        connection.sendall(f"GET / HTTP/1.1\r\nHost: {own}\r\n{origins}\r\n".encode())
        assert connection.recv(12) == b"HTTP/1.1 403"


def test_a_form_of_a_foreign_page_is_refused_even_without_an_origin(client: Any) -> None:
    assert client.post("/api/runs", {}, sec_fetch_site="cross-site")[0] == 403
    assert client.post("/api/runs", b"model=mlp", content_type="application/x-www-form-urlencoded")[0] == 415


def test_its_own_page_and_a_tunnel_are_answered(client: Any) -> None:
    assert client.get("/", host=f"localhost:{client.port}")[0] == 200
    assert client.get("/", host=f"LocalHost:{client.port}", origin=f"http://localhost:{client.port}")[0] == 200
    assert client.get("/", host=f"[::1]:{client.port}", origin=f"http://[::1]:{client.port}")[0] == 200


@pytest.mark.parametrize("path", ["/", "/static/main.js", "/api/run", "/nothing"])
def test_every_answer_says_what_the_page_may_do(client: Any, path: str) -> None:
    with client.open("GET", path) as answer:
        headers = answer.headers
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'self';" in policy
    assert "unsafe" not in policy
    assert headers["x-content-type-options"] == "nosniff"


# -- what may be asked for --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        "/static/../server.py",
        "/static/..%2fserver.py",
        "/static/%2e%2e/server.py",
        "/static/..%5cserver.py",
        "/static//etc/passwd",
        "/static/%00",
        "/static/server.py",
        "/server.py",
        "/static/",
    ],
)
def test_no_path_leads_out(client: Any, path: str) -> None:
    status, told = client.get(path)
    assert status == 404
    assert "def " not in str(told)
    assert "root:" not in str(told)


def test_every_file_of_the_page_is_there_and_they_are_small(client: Any) -> None:
    guide: Any = client.guide
    sizes = {name: len(content) for name, content in guide._static.items()}
    assert {"main.js", "guide.css", "measured.json", "icon.svg"} <= set(sizes)
    # The live view is another page, and the numbers are in the page itself.
    loaded = sum(size for name, size in sizes.items() if not name.startswith(("live", "measured")))
    assert loaded + len(guide._page.encode()) <= 250 * 1024
    for name in sizes:
        assert client.get(f"/static/{name}")[0] == 200


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"batch": 0}, "Effective batch must be a whole number from 1 to 256, not 0"),
        ({"batch": 10**400}, "Effective batch"),
        ({"batch": 2.5}, "Effective batch"),
        ({"batch": True}, "Effective batch"),
        ({"batch": None}, "Effective batch"),
        ({"batch": [1]}, "Effective batch"),
        ({"microbatch": "some"}, 'or "auto"'),
        ({"batch": 8, "microbatch": 9}, "larger than the effective batch of 8"),
        ({"steps": 501}, "Steps must be"),
        ({"batch": 256, "microbatch": 1, "steps": 500}, "take fewer steps"),
        ({"tank": 0}, 'or "none"'),
        ({"tank": 1e9}, "Tank"),
        ({"lr": "nan"}, "Learning rate"),
        ({"lr": "1e999"}, "Learning rate"),
        ({"seed": -1}, "Seed"),
        ({"model": "__import__('os')"}, "Model must be one of transformer"),
        ({"model": "../../etc/passwd"}, "Model must be one of"),
        ({"norm": "batch"}, "convolutional network's"),
        ({"model": "conv", "norm": "exact", "recover": "no"}, "exact BatchNorm"),
        ({"coupling": "coupled"}, "pair encoder's"),
        ({"model": "pairs", "coupling": "coupled", "divide": "means"}, "the batch's own count"),
        ({"pace": "9"}, "Slow motion"),
        ({"code": "print()"}, "there is no setting 'code'"),
        ([], "must be an object"),
        ("model", "must be an object"),
        (None, "must be an object"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_in_words(idle: Any, settings: Any, words: str) -> None:
    status, told = idle.post("/api/runs", settings)
    assert status == 400
    assert words in told["error"]
    assert len(told["error"]) < 400
    assert idle.get("/api/run")[1]["run"] is None or not idle.get("/api/run")[1]["run"]["running"]


@pytest.mark.parametrize("field", [field for field in FIELDS if field.choices is None], ids=lambda field: field.name)
def test_every_bound_is_held_at_both_ends(idle: Any, field: Any) -> None:
    for beyond in (field.low - 1, field.high * 2):
        status, told = idle.post("/api/runs", {field.name: beyond})
        assert status == 400
        assert field.label in told["error"]


@pytest.mark.parametrize(
    "body", [b"", b"{", b"{'a': 1}", b"\xff\xfe", b"[" * 8000, b'{"lr": NaN}', b'{"lr": Infinity}']
)
def test_a_body_that_is_no_json_is_refused(idle: Any, body: bytes) -> None:
    status, told = idle.post("/api/runs", body)
    assert status == 400
    assert "Traceback" not in str(told)


def test_a_body_that_is_too_large_is_refused_before_it_is_read(idle: Any) -> None:
    status, told = idle.post("/api/runs", b" " * (MOST_BODY + 1))
    assert status == 413
    assert "at most" in told["error"]


@pytest.mark.parametrize("path", ["/api/runs/deadbeef/stop", "/api/runs/../stop"])
def test_a_run_that_is_unknown_is_not_stopped(client: Any, path: str) -> None:
    assert client.post(path, {})[0] in (404, 405)


def test_a_run_that_is_unknown_tells_nothing(client: Any) -> None:
    assert client.get("/api/runs/deadbeef/events")[0] == 404
    assert client.get("/api/live/events")[0] == 404
    assert client.ask("DELETE", "/api/runs")[0] == 405


def test_an_address_that_cannot_be_is_refused(client: Any) -> None:
    assert client.get("/api/program?batch=0")[0] == 400
    assert client.get("/api/program?nonsense=1")[0] == 400
    assert "lesson(" in client.get("/api/program?batch=64")[1]["program"]


# -- a run ------------------------------------------------------------------------------------------------------------


def test_five_steps_of_32_by_8_are_20_microbatches_and_5_steps(idle: Any) -> None:
    started = time.monotonic()
    run = idle.start(model="mlp", batch=32, microbatch=8, steps=5)
    messages = list(idle.messages(f"/api/runs/{run}/events"))
    took = time.monotonic() - started
    events = [event for _, each in messages for event in each]
    kinds = [event["kind"] for event in events]
    assert (kinds.count("microbatch"), kinds.count("forward"), kinds.count("step")) == (20, 20, 5)
    assert [event["id"] for event in events] == list(range(1, len(events) + 1))
    assert [last for last, _ in messages] == [each[-1]["id"] for _, each in messages]
    assert kinds[0] == "ready"
    assert kinds[-1] == "done"
    assert all(event["error"] <= event["tolerance"] for event in events if event["kind"] == "step")
    assert len(messages) <= took * PER_SECOND + 1

    # Whoever lost the stream goes on where they were: nothing twice, nothing left out.
    middle = len(events) // 2
    assert idle.events(run, last_event_id=str(middle)) == events[middle:]
    assert idle.events(run, last_event_id=str(len(events))) == []
    for wrong in ("-1", "x", "1e3", str(len(events) + 1), "9" * 30, "\u0661"):
        text = wrong.encode().decode("latin-1")
        assert idle.ask("GET", f"/api/runs/{run}/events", headers={"last-event-id": text})[0] == 400


def test_a_second_run_is_refused_and_a_trainer_that_is_killed_is_told_in_words(idle: Any) -> None:
    run = idle.start(**SLOW)
    status, told = idle.post("/api/runs", {"model": "mlp"})
    assert status == 409
    assert "under way" in told["error"]
    idle.wait_for(run, "microbatch")
    assert alive(idle.guide.playground.run.pid)  # the first goes on
    os.kill(idle.guide.playground.run.pid, signal.SIGKILL)
    last = idle.events(run)[-1]
    assert last["kind"] == "failed"
    assert "the training process ended by signal 9" in last["error"]
    assert idle.get("/")[0] == 200
    assert idle.get("/api/run")[1]["run"]["running"] is False


@pytest.mark.parametrize("loading", [True, False])
def test_stop_ends_it_within_a_second_and_its_process(idle: Any, *, loading: bool) -> None:
    """While it trains, and while the library is still being loaded."""

    def stop() -> float:
        run = idle.start(**SLOW)
        if not loading:
            idle.wait_for(run, "microbatch")
        pid, began = idle.guide.playground.run.pid, time.monotonic()
        assert idle.post(f"/api/runs/{run}/stop", {})[1]["run"]["running"] is False
        took = time.monotonic() - began
        assert not alive(pid)
        assert idle.events(run)[-1]["kind"] == "stopped"
        return took

    assert within_a_second(stop)


def test_an_event_that_its_trainer_did_not_live_to_end_is_left_out() -> None:
    script = r"""read settings; printf '{"kind": "ready"}\n{"kind": "mic'; kill -9 $$"""

    async def listen() -> list[tuple[str, str]]:
        pipe = asyncio.subprocess.PIPE
        run = Run(read_settings({}))
        await run.start(await asyncio.create_subprocess_exec("sh", "-c", script, stdin=pipe, stdout=pipe, stderr=pipe))
        await asyncio.wait_for(run.wait(), 20)
        assert not run.running
        return [(event["kind"], event.get("error", "")) for event in run.events]

    ready, failed = asyncio.run(listen())
    assert ready == ("ready", "")
    assert failed == ("failed", "the training process ended by signal 9; run it again")


def test_the_overflow_and_the_recovery_are_the_librarys(idle: Any) -> None:
    settings = {"model": "conv", "batch": 32, "microbatch": 32, "tank": 0.3, "steps": 1}
    error = idle.events(idle.start(**settings, recover="no"))[-1]
    assert error["kind"] == "overflow"
    assert "the memory budget of 307 KiB was exceeded" in error["error"]
    assert sum(error["memory"].values()) == error["peak_bytes"] > error["budget"]
    events = idle.events(idle.start(**settings))
    retries = [event for event in events if event["kind"] == "retry"]
    step = next(event for event in events if event["kind"] == "step")
    assert retries[0]["before"] == 32
    assert retries[-1]["after"] == step["microbatch_size"]
    assert step["retries"] == len(retries)
    assert step["error"] <= step["tolerance"]
    assert step["peak_bytes"] <= 0.3 * 2**20 < retries[0]["peak_bytes"]


def test_a_training_process_is_made_ready_when_the_page_is_first_opened() -> None:
    for client in serving(Guide()):
        ready = client.guide.playground
        assert client.ask("GET", "/run")[0] == 200
        assert ready._ready is None  # the live view needs none
        assert client.get("/")[0] == 200
        until = time.monotonic() + 10
        while ready._ready is None and time.monotonic() < until:
            time.sleep(0.01)
        first = ready._ready
        assert first is not None
        assert client.get("/")[0] == 200
        assert ready._ready is first

"""The command ``guide``, as people run it."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Generator
from contextlib import closing, contextmanager, suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
from tests.guide.browser import launched, opened, violations
from tests.guide.conftest import within_a_second
from typer.testing import CliRunner

from microbatch.cli.main import app
from microbatch.guide import export

if not Path("/proc/self/task").is_dir():
    pytest.skip("who was started is told by /proc, which this system does not have", allow_module_level=True)
pytest.importorskip("uvicorn", reason="the guide's server comes with the extra: pip install 'microbatch[guide]'")


@contextmanager
def guided() -> Generator[tuple[subprocess.Popen[str], str], None, None]:
    """Start the command in a process of its own, and tell its address."""
    command = [sys.executable, "-W", "error", "-m", "microbatch", "guide", "--port", "0", "--no-browser"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "NO_COLOR": "1"}
    )
    try:
        assert process.stdout is not None
        found = re.search(r"http://[\d.]+:\d+/", process.stdout.readline())
        assert found is not None, process.stderr.read() if process.stderr else ""
        yield process, found.group()
    finally:
        process.kill()
        process.communicate()


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8").split()]


def answers(address: str) -> bool:
    host, _, port = address.removeprefix("http://").rstrip("/").partition(":")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except ConnectionError:
        return False
    return True


def ask(address: str, method: str, path: str, *, body: str | None = None) -> Any:
    connection = http.client.HTTPConnection(address.removeprefix("http://").rstrip("/"), timeout=30)
    try:
        connection.request(method, path, body=body, headers={"content-type": "application/json"})
        with connection.getresponse() as answer:
            return json.loads(answer.read())
    finally:
        connection.close()


def test_ctrl_c_ends_it_within_a_second_and_leaves_no_one_behind() -> None:
    assert within_a_second(interrupt)


def interrupt() -> float:
    """Press Ctrl-C while it trains and somebody looks on; return when neither trainer nor server was there any more."""
    with guided() as (process, address):
        ends = time.monotonic() + 60
        while True:  # the address is told before the first answer
            try:
                run = ask(address, "POST", "/api/runs", body='{"model": "mlp", "steps": 400, "pace": "0.6"}')["run"]
                break
            except ConnectionError:
                assert time.monotonic() < ends
                time.sleep(0.05)
        below = children(process.pid)
        assert below
        watching = http.client.HTTPConnection(address.removeprefix("http://").rstrip("/"), timeout=30)
        with closing(watching):
            watching.request("GET", f"/api/runs/{run['name']}/events")
            with watching.getresponse():
                began = time.monotonic()
                process.send_signal(signal.SIGINT)
                while any(Path(f"/proc/{pid}").exists() for pid in below) or answers(address):
                    time.sleep(0.01)
                took = time.monotonic() - began
        # The interpreter's own end is not the server's: a busy machine takes its time to unload torch.
        assert process.wait(30) == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""
        return took


def test_a_server_that_is_killed_leaves_no_trainer_behind() -> None:
    with guided() as (process, address):
        ends = time.monotonic() + 60
        while not (below := children(process.pid)):  # one is started when the page is first opened
            assert time.monotonic() < ends
            with suppress(OSError), urlopen(address):  # noqa: S310 - its own address
                time.sleep(0.02)
        process.kill()
        process.wait(10)
        for pid in below:
            while Path(f"/proc/{pid}").exists():
                assert time.monotonic() < ends
                time.sleep(0.02)


def test_what_cannot_be_is_refused_in_words(tmp_path: Path) -> None:
    for arguments, words in (
        ([str(tmp_path / "none")], "there is no run directory"),
        (["--port", "70000"], "error: --port is 70000: it must be a whole number from 0 to 65535"),
        (["--port", "-1"], "error: --port is -1: it must be a whole number from 0 to 65535"),
        (["--export", str(tmp_path.parent)], "is not empty"),
        (["--export", str(tmp_path / "copy"), "a-run"], "without a-run; leave the run out"),
        (["--export", str(tmp_path / "copy"), "--port", "8765"], "--port 8765 has no effect"),
    ):
        result = CliRunner().invoke(app, ["guide", "--no-browser", *arguments])
        assert result.exit_code == 2
        assert words in result.stderr
        assert "Traceback" not in result.stderr


def test_a_port_that_is_taken_is_refused() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        result = CliRunner().invoke(app, ["guide", "--no-browser", "--port", str(taken.getsockname()[1])])
    assert result.exit_code == 2
    assert "--port" in result.stderr


def test_a_training_is_watched_while_it_runs(tmp_path: Path) -> None:
    job = Path(__file__).parents[1] / "train" / "small_job.py"
    command = [sys.executable, "-m", "microbatch", "train", f"{job}:small", "--run", str(tmp_path / "run"), "--watch"]
    # The browser that is opened on it is a program that does nothing.
    quiet = {**os.environ, "NO_COLOR": "1", "BROWSER": "true", "COLUMNS": "200"}
    process = subprocess.Popen(
        [*command, "--steps", "1000000", "--no-compare"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=quiet,
    )
    try:
        assert process.stderr is not None
        lines = iter(process.stderr.readline, "")
        address = next(found.group(1) for line in lines if (found := re.search(r"(http://[\d.]+:\d+/)run", line)))
        ends = time.monotonic() + 60
        while True:
            try:
                runs = ask(address, "GET", "/api/live")["runs"]
                break
            except ConnectionError:
                assert time.monotonic() < ends
                time.sleep(0.05)
        assert [run["name"] for run in runs] == ["run"]
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 128 + signal.SIGINT
        with pytest.raises(ConnectionError):
            ask(address, "GET", "/api/live")
    finally:
        process.kill()
        process.communicate()


class Quiet(SimpleHTTPRequestHandler):
    """Any web server, without its log."""

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - its own name for it
        pass


def test_a_copy_plays_recorded_runs_on_any_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = {name: export.PRESETS[name] for name in ("fits", "drift", "pairs")}
    monkeypatch.setattr(export, "PRESETS", chosen)
    monkeypatch.setattr(export, "MOST_STEPS", 3)
    folder = tmp_path / "copy"
    assert CliRunner().invoke(app, ["guide", "--export", str(folder)]).exit_code == 0
    recorded = json.loads((folder / "recorded" / "drift.json").read_text(encoding="utf-8"))
    assert [event["kind"] for event in recorded["events"]].count("step") == 3
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with launched() as browser, opened(browser, f"http://127.0.0.1:{server.server_port}/") as page:
            assert "recorded" in str(page.locator(".notice.recorded").text_content())
            assert page.locator("[data-run]:visible").count() == 0
            page.get_by_role("button", name="BatchNorm drifts").click()
            page.wait_for_selector('#playground[data-kind="done"]', timeout=30_000)
            assert page.get_attribute("#playground", "data-steps") == "3"
            assert "✗" in str(page.locator("[data-badge]").text_content())
            page.goto(f"http://127.0.0.1:{server.server_port}/?preset=pairs")
            page.wait_for_selector('#playground[data-kind="done"]', timeout=30_000)
            assert violations(page, "html") == []
            assert 'lesson("pairs"' in str(page.locator("[data-copy-text=program]").text_content())
        server.shutdown()
    # The one file, from the disk: the whole guide by a double click.
    address = (folder / export.SINGLE).as_uri()
    with launched() as browser, opened(browser, address, reduced_motion="no-preference") as page:
        page.wait_for_selector('[data-figure="hero"][data-playing="true"]', timeout=30_000)
        page.get_by_role("button", name="BatchNorm drifts").click()
        page.wait_for_selector('#playground[data-kind="done"]', timeout=30_000)
        assert str(page.locator("[data-shown]").text_content()).startswith("BatchNorm drifts")
        assert "✗" in str(page.locator("[data-badge]").text_content())

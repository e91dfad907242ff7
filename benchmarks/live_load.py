"""The live view of a run of a million steps: when it answers, what it sends, what it holds, and when it ends.

A run is written in a temporary folder, looked at by a server of its own, and, where there is a Chromium, by a browser,
which takes a picture.
"""

from __future__ import annotations

import argparse
import http.client
import io
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import hardware, versions

OUT = Path(__file__).parent / "results" / "live-load"
WIDTH, HEIGHT = 1280, 900
COLOURS = 128
"""Of the picture: enough for the page, and a third of the bytes."""

SETTLED = 5.0
"""Seconds in which the process of the playground loads the library, as it does beside every server."""

WHOLE = 100
"""Percent."""

TRIES = 3
"""Servers that are asked for a first answer: another job on the machine can only make it later."""

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
PATIENCE = 600.0
GOALS = {"first_answer_seconds": 1.0, "first_message_bytes": 600_000, "sigterm_seconds": 2.0}


def write_run(folder: Path, steps: int) -> int:
    """Write what `microbatch train` would have written: a curve with a plateau, spikes, retries and a dropped window.

    Args:
        folder: Of the run; made.
        steps: At least 1.

    Returns:
        Bytes of the metrics.
    """
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(
        f'job = "language"\nsteps = {steps}\nbatch_size = 64\nmicrobatch_size = 16\nmemory = 1073741824\n',
        encoding="utf-8",
    )
    drawn = random.Random(0)  # noqa: S311 -- no secret
    with (folder / "metrics.jsonl").open("w", encoding="utf-8") as file:
        for step in range(1, steps + 1):
            file.write(json.dumps(_line(step, steps, drawn)) + "\n")
    (folder / "summary.json").write_text(json.dumps({"step": steps, "finished": True}) + "\n", encoding="utf-8")
    return (folder / "metrics.jsonl").stat().st_size


def measure(run: Path, picture: Path | None) -> dict[str, float]:
    """Open the live view of a run, and measure its time and memory.

    Args:
        run: Its directory.
        picture: Where a picture of the page goes; `None` for none.

    Returns:
        Seconds from the request of the page to its first numbers, the least of `TRIES` servers, and to those of every
        step; bytes of both messages; the longest wait for another answer meanwhile; the most bytes that the server has
        held, when it starts and at the end; and seconds from SIGTERM, with a stream open, to its end.
    """
    tries = [_look(run, None, whole=False) for _ in range(TRIES - 1)]
    found = _look(run, picture, whole=True)
    found["first_answer_seconds"] = min(each["first_answer_seconds"] for each in [*tries, found])
    return found


def _look(run: Path, picture: Path | None, *, whole: bool) -> dict[str, float]:
    command = [sys.executable, "-m", "microbatch", "guide", "--no-browser", "--port", "0", str(run)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:  # noqa: S603 -- our own
        try:
            assert process.stdout is not None  # noqa: S101 -- it is a pipe
            port = int(process.stdout.readline().partition("127.0.0.1:")[2].partition("/")[0])
            _ask(port, "/static/icon.svg")  # which waits until the server has started
            time.sleep(SETTLED)
            found = {"resident_bytes_at_start": _resident(process.pid), **_answers(port, whole=whole)}
            found["resident_bytes"] = _resident(process.pid)
            if picture is not None:
                take_picture(f"http://127.0.0.1:{port}/run", picture)
            stream, _ = _open(port, "/api/live/events")
            began = time.monotonic()
            os.kill(process.pid, signal.SIGTERM)
            process.wait(PATIENCE)
            found["sigterm_seconds"] = time.monotonic() - began
            stream.close()
        finally:
            process.kill()
    return found


def take_picture(address: str, path: Path) -> None:
    """Take a picture of the live view once it has read every step.

    Args:
        address: Of the page.
        path: Of the picture, a PNG.
    """
    from PIL import Image
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        program = next(each for each in map(shutil.which, BROWSERS) if each is not None)
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        page = browser.new_page(
            viewport={"width": WIDTH, "height": HEIGHT}, reduced_motion="reduce", color_scheme="light"
        )
        page.goto(address)
        ends = time.monotonic() + PATIENCE
        while not page.evaluate("document.querySelector('[data-runs]').textContent.includes('skipped window')"):
            if time.monotonic() > ends:
                raise TimeoutError("the page never showed the whole run")
            page.wait_for_timeout(100)
        taken = page.screenshot(full_page=True)
        browser.close()
    Image.open(io.BytesIO(taken)).convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write.

    Args:
        arguments: Of the command line; `None` for this process's own.

    Returns:
        0; 1 if ``--strict`` was given and a goal was missed.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.live_load", description=__doc__)
    parser.add_argument("--steps", type=int, default=1_000_000, help="lines of the run")
    parser.add_argument("--out", type=Path, default=OUT, help="without an ending: .json and .png are written")
    parser.add_argument("--no-picture", action="store_true", help="take no picture of the page")
    parser.add_argument("--strict", action="store_true", help="fail if a goal is missed")
    flags = parser.parse_args(arguments)
    flags.out.parent.mkdir(parents=True, exist_ok=True)
    seen = not flags.no_picture and any(map(shutil.which, BROWSERS))
    with tempfile.TemporaryDirectory() as folder:
        size = write_run(Path(folder) / "run", flags.steps)
        found = measure(Path(folder) / "run", flags.out.with_suffix(".png") if seen else None)
    missed = [name for name, goal in GOALS.items() if found[name] > goal]
    record: dict[str, Any] = {
        "hardware": hardware("cpu"),
        "versions": versions(),
        "load_average": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,  # of other jobs as well
        "steps": flags.steps,
        "file_bytes": size,
        **{name: round(value, 3) for name, value in found.items()},
        "goals": GOALS,
        "met": not missed,
    }
    flags.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for name, value in found.items():
        print(f"{name}: {value:,.3f}" if name.endswith("seconds") else f"{name}: {value:,.0f}")
    print(f"goals: {'missed: ' + ', '.join(missed) if missed else 'met'}")
    return int(flags.strict and bool(missed))


def _line(step: int, steps: int, drawn: random.Random) -> dict[str, Any]:
    share = step / steps
    noise = drawn.gauss(0, 0.04)
    spike = 6.0 if step in (steps // 3, steps // 2 + 1) else 0.0
    seconds = 0.08 + 0.004 * abs(noise)
    line: dict[str, Any] = {
        "step": step,
        "epoch": int(20 * share),
        "loss": 1.4 + 3.2 * math.exp(-9 * share) + noise + spike,
        "lr": 3e-4 * min(1.0, 50 * share) * (0.55 + 0.45 * math.cos(math.pi * share)),
        "grad_norm": 0.8 + abs(noise) + 10 * spike,
        "count": 16384.0,
        "samples": 64,
        "microbatches": 4,
        "microbatch_size": 16 if share < 0.6 else 8,
        "retries": int(step == math.ceil(0.6 * steps)),
        "applied": step != steps // 3,
        "seconds": seconds,
        "per_second": 16384 / seconds,
        "peak_bytes": 805306368,
        "timeline": {
            "wait": 0.002,
            "forward": [0.006] * 4,
            "backward": [0.0115] * 4,
            "finish": 0.003,
            "optimizer": 0.005,
        },
    }
    if step % 20 == 0:
        line["noise_scale"] = 60 + 400 * share + 300 * abs(noise)
        memory = (("parameters", 120), ("optimizer state", 240), ("gradients", 120), ("activations", 280), ("other", 8))
        line["memory"] = {name: size << 20 for name, size in memory}
    if step % max(1, steps // 40) == 0:
        line["validation"] = {"loss": 1.5 + 3.2 * math.exp(-9 * share)}
    return line


def _answers(port: int, *, whole: bool) -> dict[str, float]:
    """Ask as the page does: for the page, the runs, and the stream, of which two messages are pictures of the run."""
    found: dict[str, float] = {}
    began = time.monotonic()
    _ask(port, "/run")
    _ask(port, "/api/live")
    connection, stream = _open(port, "/api/live/events")
    for line in stream:
        if not line.startswith(b"data: "):
            continue
        now = time.monotonic() - began
        if not found:
            found |= {"first_answer_seconds": now, "first_message_bytes": len(line), "longest_wait_seconds": 0.0}
            if not whole:
                break
        elif any(each.get("percent") == WHOLE for each in json.loads(line[6:])[0]["events"]):
            found |= {"every_step_seconds": now, "every_step_bytes": len(line)}
            break
        found["longest_wait_seconds"] = max(found["longest_wait_seconds"], _ask(port, "/api/live"))
    connection.close()
    return found


def _ask(port: int, path: str) -> float:
    """Return the seconds that an answer took."""
    began = time.monotonic()
    connection, answer = _open(port, path)
    answer.read()
    connection.close()
    return time.monotonic() - began


def _open(port: int, path: str) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    connection.request("GET", path)
    return connection, connection.getresponse()


def _resident(process: int) -> float:
    """Return the most memory that a process has held so far, in bytes; 0 off Linux."""
    try:
        status = Path(f"/proc/{process}/status").read_text(encoding="ascii")
    except OSError:
        return 0.0
    return 1024.0 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))


if __name__ == "__main__":
    sys.exit(main())

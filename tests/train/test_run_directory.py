"""One run, one directory: claimed before anything is written, held while it trains, missed as soon as it is gone."""

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from microbatch.errors import CheckpointError, ConfigError
from microbatch.train import run_lock, start
from microbatch.train.run_events import Notice, RunEvent
from microbatch.train.run_lock import LOCK, Claim
from microbatch.train.rundir import MetricsLog, RunDirectory
from microbatch.train.start import PreparedRun, prepare

JOB = f"{Path(__file__).with_name('small_job.py')}:small"
FLAGS: dict[str, Any] = {"job": JOB, "steps": 4, "compare": False, "checkpoint_every": 1, "device": "cpu"}
HOLD = """
import sys, time
from pathlib import Path
from microbatch.train.run_lock import Claim
claim = Claim()
claim.take(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def prepared(
    run: Path | None, *, told: list[RunEvent] | None = None, resume: bool = False, **flags: Any
) -> PreparedRun:
    given = {**FLAGS, **flags}
    return prepare(given, run=run, resume=resume, listeners=[(told if told is not None else []).append])


def hold(folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def test_a_directory_is_refused_while_a_run_holds_it_and_free_afterwards(tmp_path: Path) -> None:
    first = prepared(tmp_path / "run")
    for resume in (False, True):
        with pytest.raises((ConfigError, CheckpointError)) as refused:
            prepared(tmp_path / "run", resume=resume)
        if not resume:  # there is no checkpoint to resume from yet
            assert f"in use by process {os.getpid()} on host {platform.node()}" in str(refused.value)
    first.train()
    assert not (tmp_path / "run" / LOCK).exists()
    with pytest.raises(ConfigError, match="already holds a run"):
        prepared(tmp_path / "run")
    told: list[RunEvent] = []
    again = prepared(tmp_path / "run", resume=True, steps=6, told=told)
    with pytest.raises(ConfigError, match=f"in use by process {os.getpid()}"):
        prepared(tmp_path / "run", resume=True)
    assert again.train()["step"] == 6
    assert not any("lock" in event.text for event in told if isinstance(event, Notice))


def test_another_process_is_named_and_a_dead_one_is_taken_over_with_a_word(tmp_path: Path) -> None:
    process = hold(tmp_path / "run")
    with pytest.raises(ConfigError, match=rf"in use by process {process.pid} on host {platform.node()}.*--run"):
        prepared(tmp_path / "run")
    end(process)
    told: list[RunEvent] = []
    prepared(tmp_path / "run", told=told).train()
    notices = [event.text for event in told if isinstance(event, Notice)]
    assert [text for text in notices if f"process {process.pid}" in text and "taken over" in text]


def test_a_lock_of_another_host_is_refused_with_how_to_remove_it(tmp_path: Path) -> None:
    held = {"process": 12, "host": "another-host", "started": "yesterday"}
    (tmp_path / LOCK).write_text(json.dumps(held))
    with pytest.raises(ConfigError, match=rf"process 12 on host another-host.*remove {tmp_path / LOCK}"):
        Claim().take(tmp_path)
    assert json.loads((tmp_path / LOCK).read_text()) == held
    claim = Claim()
    claim.take(tmp_path, restarted=True)  # the launcher has ended those processes itself
    assert "another-host" in claim.notices()[0]
    claim.release()
    assert not (tmp_path / LOCK).exists()


@pytest.mark.parametrize("content", ["", "[1]", "{", '{"process": "x"}', "[" * 5000, "\udcff"])
def test_a_lock_file_with_anything_in_it_is_never_a_raw_error(tmp_path: Path, content: str) -> None:
    (tmp_path / LOCK).write_text(content, errors="surrogateescape")
    claim = Claim()
    if content:
        with pytest.raises(ConfigError, match="held by another process"):
            claim.take(tmp_path)
    else:
        claim.take(tmp_path)


def test_without_locks_of_the_file_system_the_file_alone_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock, "fcntl", None)
    first, second = Claim(), Claim()
    first.take(tmp_path)
    with pytest.raises(ConfigError, match=f"held by process {os.getpid()}.*remove"):
        second.take(tmp_path)
    first.release()
    second.take(tmp_path)
    second.release()


def test_a_forked_child_neither_holds_nor_removes_it(tmp_path: Path) -> None:
    script = HOLD.replace(
        'print("held", flush=True)\ntime.sleep(60)',
        "import os\n"
        "child = os.fork()\n"
        "if child: os.waitpid(child, 0); print(os.listdir(sys.argv[1]), flush=True); child = os.fork()\n"
        "if not child and not Path(sys.argv[1], 'go').exists(): Path(sys.argv[1], 'go').touch(); sys.exit()\n"
        "if not child: Path(sys.argv[1], 'alive').touch(); time.sleep(60)\n"
        "print(child, flush=True)\n"
        "os.kill(os.getpid(), 9)",
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert LOCK in process.stdout.readline()  # the first child ended as a process ends, and the file is still there
    child = int(process.stdout.readline())
    process.wait()
    while not (tmp_path / "alive").exists():  # a child that has not run yet has not let go yet either
        time.sleep(0.01)
    try:
        claim = Claim()
        claim.take(tmp_path)  # the second child still lives
        assert f"process {process.pid}" in claim.notices()[0]
        claim.release()
    finally:
        os.kill(child, signal.SIGKILL)
        process.stdout.close()


def together(number: int, work: Any) -> list[Any]:
    """Call a function in several threads at the same moment, and return what each returned."""
    barrier, found = threading.Barrier(number), list[Any]()

    def one() -> None:
        barrier.wait()
        found.append(work())

    threads = [threading.Thread(target=one) for _ in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_runs_that_begin_at_the_same_moment_have_directories_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(start.time, "strftime", lambda *_: "20260101-000000")
    claims = [Claim() for _ in range(8)]
    waiting = list(claims)
    names = together(8, lambda: waiting.pop().take_new(start._run_names("images")))
    assert len(set(names)) == 8
    for claim in claims:
        claim.give_up()
    assert list(tmp_path.glob("runs/*")) == []

    pause = threading.Barrier(8)

    def looked_at_first() -> Path:
        """The usual recipe, and the control: look for a free name, and make it later."""
        path = next(each for each in start._run_names("images") if not each.exists())
        pause.wait()
        path.mkdir(parents=True, exist_ok=True)
        return path

    assert len(set(together(8, looked_at_first))) == 1


def test_of_several_on_one_directory_one_has_it(tmp_path: Path) -> None:
    claims = [Claim() for _ in range(8)]
    waiting = list(claims)

    def take() -> str:
        try:
            waiting.pop().take(tmp_path / "run")
        except ConfigError as error:
            return str(error)
        return ""

    refused = sorted(together(8, take))
    assert refused[0] == ""
    assert all(f"in use by process {os.getpid()} on host" in each for each in refused[1:])


def test_a_run_that_is_refused_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="cuda:77"):
        prepared(None, device="cuda:77")
    with pytest.raises(ConfigError, match="cuda:77"):
        prepared(tmp_path / "a" / "b", device="cuda:77")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").mkdir()
    with pytest.raises(ConfigError, match="cuda:77"):
        prepared(tmp_path / "mine", device="cuda:77")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("how", ["remove", "rename", "log alone"])
@pytest.mark.parametrize("every", [1, 100])
def test_a_directory_that_vanishes_ends_the_run_with_an_error(
    tmp_path: Path, how: str, every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"

    def gone() -> None:
        if how == "remove":
            shutil.rmtree(run)
        elif how == "rename":
            run.rename(tmp_path / "elsewhere")
        else:
            (run / "metrics.jsonl").unlink()

    ready = prepared(run, steps=30, checkpoint_every=every)
    calls, take = [], ready.loop._batches.take

    def vanishing(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            gone()
        return take(*arguments)

    monkeypatch.setattr(ready.loop._batches, "take", vanishing)
    with pytest.raises(CheckpointError, match=f"(?s){run}.* gone.*removed or renamed"):
        ready.train()
    assert len(calls) == 3
    assert run.exists() == (how == "log alone")  # it is not made again


def test_a_log_whose_file_is_gone_would_go_on_in_silence(tmp_path: Path) -> None:
    """The control: the file that was removed takes lines as before."""
    log = MetricsLog(tmp_path / "metrics.jsonl", after_step=0)
    log.write({"step": 1})
    (tmp_path / "metrics.jsonl").unlink()
    log._file.write(b"{}\n")
    log._file.flush()
    with pytest.raises(CheckpointError, match="is gone"):
        log.write({"step": 2})
    log.close()


def test_a_full_disk_is_an_error_of_ours(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs a device that is always full")
    log = MetricsLog(tmp_path / "metrics.jsonl", after_step=0)
    log._file.close()
    log._path = Path("/dev/full")
    log._file = log._path.open("a+b")
    with pytest.raises(CheckpointError, match="could not be written: No space left on device"):
        log.write({"step": 1})
    log.close()  # says nothing of what is still in its buffer
    with pytest.raises(CheckpointError, match="gone"):
        RunDirectory(tmp_path / "none").write_summary("{}")


def modes(folder: Path) -> set[int]:
    return {path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_file()}


def test_all_files_of_a_run_have_the_mode_of_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        prepared(tmp_path / "run", steps=1).train()
    finally:
        os.umask(before)
    assert modes(tmp_path / "run") == {0o640}
    (tmp_path / "control").mkdir()
    from safetensors.torch import save_file

    save_file({"w": torch.zeros(1)}, tmp_path / "control" / "a")
    (tmp_path / "control" / "b").write_text("")
    assert len(modes(tmp_path / "control")) == 2  # the control: left alone, tensors have a mode of their own


SLOW_JOB = """
import dataclasses, sys, time
sys.path.insert(0, {folder!r})
import small_job
def slow(*, device):
    def loss_fn(model, microbatch):
        time.sleep(0.02)
        return small_job.loss_fn(model, microbatch)
    return dataclasses.replace(small_job.small(device=device), loss_fn=loss_fn, validation=None)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
@pytest.mark.parametrize("ignored", [False, True], ids=["heard", "nohup"])
def test_a_lost_terminal_writes_a_checkpoint_like_sigterm(tmp_path: Path, *, ignored: bool) -> None:
    import pty

    (tmp_path / "job.py").write_text(SLOW_JOB.format(folder=str(Path(__file__).parent)))
    main, child = pty.openpty()
    command = [sys.executable, "-m", "microbatch", "train", "job.py:slow", "--run", "run", "--no-compare"]
    process = subprocess.Popen(
        ["nohup", *command] if ignored else command,
        cwd=tmp_path, stdin=child, stdout=child, stderr=child, env={**os.environ, "OMP_NUM_THREADS": "1"},
        # These tests may run under nohup themselves.
        preexec_fn=partial(signal.signal, signal.SIGHUP, signal.SIG_DFL),  # noqa: PLW1509 - it starts nothing else
    )  # fmt: skip
    os.close(child)
    reader = threading.Thread(target=read_all, args=(main,), daemon=True)
    reader.start()
    metrics = tmp_path / "run" / "metrics.jsonl"
    end = time.monotonic() + 60
    while time.monotonic() < end and not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 3):
        time.sleep(0.01)
    if not ignored:
        os.close(main)  # whoever writes to it now gets an error
    process.send_signal(signal.SIGHUP)
    code = process.wait(timeout=60)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    steps = metrics.read_bytes().count(b"\n")
    assert (code, summary["stopped_by"]) == ((0, None) if ignored else (128 + signal.SIGHUP, "SIGHUP"))
    assert (steps == 40) == ignored
    assert (tmp_path / "run" / "checkpoints" / f"step-{steps:06d}").is_dir()
    assert not (tmp_path / "run" / LOCK).exists()


def read_all(descriptor: int) -> None:
    try:
        while os.read(descriptor, 65536):
            pass
    except OSError:
        pass

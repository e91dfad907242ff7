"""Freed memory that the process keeps: fewer page faults, and counted as available."""

import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from microbatch.memory import budget, kept_heap

GLIBC = platform.libc_ver()[0] == "glibc"
PROGRAM = """
import resource, sys
import torch
import microbatch as mb
from microbatch.memory.kept_heap import kept_bytes

if sys.argv[1] == "kept":
    assert mb.keep_heap() and mb.keep_heap()
for step in range(20):
    if step == 8:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    del_me = [torch.ones(12 << 20) for _ in range(2)]  # 48 MiB each
    del del_me
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, kept_bytes())
"""


def faults(how: str) -> tuple[int, int]:
    """Run the program in a process of its own; return its page faults and the bytes that its heap keeps."""
    ran = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True)
    first, second = map(int, ran.stdout.split())
    return first, second


@pytest.mark.skipif(not GLIBC, reason="the allocator is not glibc's")
def test_a_kept_heap_has_hardly_any_page_faults() -> None:
    plain, nothing = faults("plain")
    kept, free = faults("kept")
    assert kept < plain / 10
    assert nothing == 0
    assert free >= 2 * 48 * 1024**2


def test_the_free_part_counts_as_available(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemAvailable: 8388608 kB\n")
    cpu = torch.device("cpu")
    monkeypatch.setattr(budget, "kept_bytes", lambda: 0)  # another test may have kept the heap of this process
    before = budget.available_bytes(cpu, root=tmp_path)
    monkeypatch.setattr(budget, "kept_bytes", lambda: 1 << 30)
    after = budget.available_bytes(cpu, root=tmp_path)
    assert before is not None
    assert after is not None
    assert 0.9 * 2**30 < after - before <= 2**30


def test_another_allocator_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[Any] = []
    monkeypatch.setattr(kept_heap, "_done", done)
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert kept_heap.keep_heap() is False
    assert kept_heap.heap_is_kept() is False
    assert kept_heap.kept_bytes() == 0

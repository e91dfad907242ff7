"""Bytes as people write them, and as they read them."""

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from microbatch.errors import ConfigError
from microbatch.memory import budget
from microbatch.memory.budget import available_bytes, format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (1, 1),
        (4096, 4096),
        ("4096", 4096),
        ("1 B", 1),
        ("1KB", 1_000),
        ("1 KiB", 1_024),
        ("512MiB", 512 * 1024**2),
        ("512 MB", 512_000_000),
        ("1.5 GB", 1_500_000_000),
        ("1.5 GiB", 3 * 1024**3 // 2),
        ("2 TB", 2 * 1000**4),
        ("2 TiB", 2 * 1024**4),
        ("  6  gib ", 6 * 1024**3),
        ("6 GIB", 6 * 1024**3),
        ("0.5 KiB", 512),
    ],
)
def test_an_amount_is_read(text: int | str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "6 GiBs", "6 GB free", "six GB", "-6 GB", "1e9", "6,5 GB", "1 K", "6 Gi"])
def test_an_amount_that_cannot_be_read_is_shown_with_an_example(text: str) -> None:
    with pytest.raises(ConfigError, match='pass bytes, or a text such as "6 GiB"') as caught:
        parse_bytes(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize("amount", [0, -1, "0", "0 GiB", "0.4 B"])
def test_less_than_a_byte_is_refused_by_its_value(amount: int | str) -> None:
    with pytest.raises(ConfigError, match="at least 1 byte") as caught:
        parse_bytes(amount)
    assert repr(amount) in str(caught.value)


def test_a_truth_value_is_no_amount() -> None:
    with pytest.raises(ConfigError, match="True"):
        parse_bytes(cast("Any", True))


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (1536, "1.50 KiB"),
        (100 * 1024, "100 KiB"),
        (12.34 * 1024**2, "12.3 MiB"),
        (6 * 1024**3, "6.00 GiB"),
        (2000 * 1024**4, "2000 TiB"),
    ],
)
def test_an_amount_is_written(size: float, text: str) -> None:
    assert format_bytes(size) == text


@given(st.integers(1, 10**15))
def test_what_is_written_can_be_read_and_is_near(size: int) -> None:
    assert parse_bytes(format_bytes(size)) == pytest.approx(size, rel=0.006)


# -- what a device has left -------------------------------------------------------------------------------------------

GiB = 1024**3
CPU = torch.device("cpu")


def system(folder: Path, files: dict[str, str]) -> Path:
    """Write the files that a system tells its memory by, and return their root."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def machine(available: int) -> dict[str, str]:
    return {"proc/meminfo": f"MemTotal: 99999999 kB\nMemAvailable:   {available // 1024} kB\nSwapFree: 1 kB\n"}


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Count no freed memory as available: another test may have kept the heap of this process."""
    monkeypatch.setattr(budget, "kept_bytes", lambda: 0)


def test_less_than_the_machine_has_available_is_left_a_margin(tmp_path: Path) -> None:
    assert available_bytes(CPU, root=system(tmp_path, machine(100 * GiB))) == 95 * GiB
    assert available_bytes(CPU, root=system(tmp_path, machine(2 * GiB))) == 2 * GiB - 256 * 1024**2
    assert available_bytes(CPU, root=system(tmp_path, machine(1024**2))) == 512 * 1024  # never all of it
    assert available_bytes(CPU, root=system(tmp_path, machine(0))) == 0


V2 = {
    "proc/self/cgroup": "0::/user/job\n",
    "sys/fs/cgroup/user/job/memory.max": "max\n",
    "sys/fs/cgroup/user/job/memory.current": f"{9 * GiB}\n",
    "sys/fs/cgroup/user/memory.max": f"{30 * GiB}\n",
    "sys/fs/cgroup/user/memory.current": f"{12 * GiB}\n",
    "sys/fs/cgroup/user/memory.stat": f"anon 5\ninactive_file {2 * GiB}\nactive_file 7\n",
}
V1 = {
    "proc/self/cgroup": "7:cpu,cpuacct:/\n4:memory:/docker/0123\n1:name=systemd:/\n",
    # Inside a container the group's own folder is the mount.
    "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{30 * GiB}\n",
    "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{12 * GiB}\n",
    "sys/fs/cgroup/memory/memory.stat": f"inactive_file 5\ntotal_inactive_file {2 * GiB}\n",
}


@pytest.mark.parametrize("files", [V2, V1], ids=["version 2", "version 1"])
def test_a_control_groups_limit_less_its_use_counts_if_it_is_smaller(tmp_path: Path, files: dict[str, str]) -> None:
    assert available_bytes(CPU, root=system(tmp_path, machine(100 * GiB) | files)) == 19 * GiB  # of 20, less 5 %
    assert available_bytes(CPU, root=system(tmp_path, machine(10 * GiB))) == int(9.5 * GiB)


def test_a_group_that_has_used_up_its_limit_leaves_nothing(tmp_path: Path) -> None:
    files = V1 | {"sys/fs/cgroup/memory/memory.usage_in_bytes": f"{33 * GiB}"}
    assert available_bytes(CPU, root=system(tmp_path, machine(10 * GiB) | files)) == 0


def test_where_nothing_can_be_read_the_operating_system_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = available_bytes(CPU, root=tmp_path)
    assert told is None or told > 0
    monkeypatch.setattr("os.sysconf_names", {})
    assert available_bytes(CPU, root=tmp_path) is None


def test_this_machine_has_some() -> None:
    size = available_bytes(CPU)
    assert size is not None
    assert size > 1024**2


def test_other_devices_refuse_by_themselves() -> None:
    assert available_bytes(torch.device("meta")) is None


@pytest.mark.cuda
def test_what_this_process_holds_unused_is_available_on_cuda() -> None:
    device = torch.device("cuda")
    before = available_bytes(device)
    held = torch.empty(64 * 1024**2, dtype=torch.uint8, device=device)
    during = available_bytes(device)
    del held  # goes into the allocator's cache
    after = available_bytes(device)
    assert before is not None
    assert during is not None
    assert after is not None
    assert during <= before - 32 * 1024**2
    assert after >= during + 64 * 1024**2

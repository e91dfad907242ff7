"""Every path of a device, on the simulated one; and which devices this machine has."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from microbatch.devices import available_devices, backend, copy_streams, device_memory
from microbatch.errors import ConfigError
from microbatch.memory.out_of_memory import is_out_of_memory

HERE = Path(__file__).parent
CPU = torch.device("cpu")
KINDS = ("full", "small")


def named(kind: str) -> list[str]:
    """The scenarios of a backend, by their names in the program."""
    source = (HERE / f"{kind}_scenarios.py").read_text(encoding="utf-8")
    return re.findall(r"^@scenario\ndef (\w+)", source, re.MULTILINE)


@pytest.fixture(scope="module")
def ended() -> dict[str, dict[str, str]]:
    """How every scenario ended, by backend; a device cannot be unregistered, so each has a process of its own."""
    programs = {
        kind: subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", f"tests.devices.{kind}_scenarios"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=HERE.parents[1],
        )
        for kind in KINDS
    }
    found = dict[str, dict[str, str]]()
    for kind, program in programs.items():
        out, err = program.communicate(timeout=300)
        lines = [line for line in out.splitlines() if line.startswith("ENDED ")]
        assert lines, f"{kind} ended with {program.returncode}: {err[-2000:]}"
        found[kind] = json.loads(lines[0].removeprefix("ENDED "))
    return found


@pytest.mark.parametrize(("kind", "scenario"), [(kind, each) for kind in KINDS for each in named(kind)])
def test_on_the_simulated_device(kind: str, scenario: str, ended: dict[str, dict[str, str]]) -> None:
    assert ended[kind][scenario] == ""


def test_every_scenario_is_run(ended: dict[str, dict[str, str]]) -> None:
    assert {kind: sorted(found) for kind, found in ended.items()} == {kind: sorted(named(kind)) for kind in KINDS}
    assert min(map(len, ended.values())) > 10


# -- without a device --------------------------------------------------------------------------------------------------


def test_the_cpu_is_asked_nothing() -> None:
    assert device_memory.allocator_of(CPU) is None
    assert device_memory.bytes_in_use(CPU) is None
    assert backend.random_state(CPU) is None
    assert copy_streams.current_stream(CPU) is None
    assert not copy_streams.has_streams(CPU)  # although torch.cpu has classes of that name
    assert not copy_streams.can_pin(CPU)
    assert backend.wide_dtype(CPU) is torch.float64
    assert available_devices.lacking(CPU) == []
    backend.synchronize(CPU)
    backend.set_current(CPU)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="needs a machine without an accelerator")
def test_auto_is_the_cpu_where_there_is_nothing_else() -> None:
    assert available_devices.resolve_device("auto") == CPU
    assert available_devices.devices_here() == ["cpu"]
    for name in ("cuda", "mps", "xpu", "hpu", "meta", "cuda:3", "gpu", "npu"):
        with pytest.raises(ConfigError, match=f"{name}.*here is cpu; auto takes cpu"):
            available_devices.resolve_device(name)


def test_mps_has_no_float64_and_is_not_asked() -> None:
    assert backend.wide_dtype(torch.device("mps")) is torch.float32
    assert backend.wide_dtype(torch.device("cuda")) is torch.float64


@pytest.mark.parametrize(
    "text",
    [
        "CUDA out of memory. Tried to allocate 2.00 GiB",
        "HIP out of memory. Tried to allocate 2.00 GiB",
        "XPU out of memory. Tried to allocate 2.00 GiB",
        "MPS backend out of memory (MPS allocated: 9 GB, other allocations: 1 GB)",
        "NPU out of memory. Tried to allocate 2.00 GiB (NPU 0; 60.97 GiB total capacity)",
        "MLU out of memory. Tried to allocate 2.00 GiB",
        "MUSA out of memory. Tried to allocate 2.00 GiB",
        "HPU out of memory. Tried to allocate 2.00 GiB",
        "[Rank:0] FATAL ERROR :: MODULE:PT_DEVMEM Allocation failed for size::4294967296 (4096)MB",
    ],
)
def test_the_words_of_every_backend_are_known(text: str) -> None:
    assert is_out_of_memory(RuntimeError(text))


@pytest.mark.parametrize(
    "text",
    ["the pool is out of memory. Tried to allocate 3 beans", "Allocation failed for size 3", "no NPU out of memory"],
)
def test_a_text_of_the_users_is_not_one_of_them(text: str) -> None:
    assert not is_out_of_memory(RuntimeError(text))


def test_a_budget_of_the_cpu_is_not_the_devices() -> None:
    assert nn.Linear(2, 2).weight.device == CPU
    assert device_memory.total_bytes(CPU) is None

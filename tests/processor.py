"""What the processor of this machine can run: a test asks by trying an operator, and skips where it cannot."""

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import nn


@cache
def reason_against(operator: Callable[[], object]) -> str:
    """Run an operator of torch, once in this process, and return why it cannot run here; empty where it can."""
    try:
        operator()
    except RuntimeError as error:
        capability = torch.backends.cpu.get_cpu_capability()
        return f"this processor ({capability}) cannot run {operator.__name__}: {str(error).partition('. ')[0]}"
    return ""


def needs(operator: Callable[[], object]) -> None:
    """Skip the test, with the reason, where the processor cannot run an operator."""
    if reason := reason_against(operator):
        pytest.skip(reason)


def bfloat16_lstm() -> None:
    """Train an LSTM under autocast in bfloat16."""
    _lstm(torch.bfloat16)


def float16_lstm() -> None:
    """Train an LSTM under autocast in float16."""
    _lstm(torch.float16)


def _lstm(dtype: torch.dtype) -> None:
    with torch.autocast("cpu", dtype):
        found, _ = nn.LSTM(4, 4)(torch.zeros(2, 3, 4))
    found.float().sum().backward()

"""What the loops of this folder run under: float64, and one thread."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def float64_on_one_thread() -> Iterator[None]:
    """Several threads wait for one another longer than such small products take."""
    threads = torch.get_num_threads()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(torch.float32)

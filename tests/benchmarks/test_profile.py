"""The profile of a window: shares of the whole, and products counted as torch counts them."""

from contextlib import nullcontext

import pytest
import torch
from benchmarks.contenders import make_subject, microbatch
from benchmarks.machine import matmul_flops_per_second
from benchmarks.profile import CONTENDERS, shares, table
from torch.utils.flop_counter import FlopCounterMode

# The profiler says so of every build without a GPU, and of every run that it does not export.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch.*")


@pytest.mark.parametrize("contender", list(CONTENDERS))
def test_the_shares_are_of_the_whole_window(contender: str) -> None:
    found = shares("tiny", 2, contender)
    assert sum(each.share for each in found) == pytest.approx(1)
    assert [each.seconds for each in found] == sorted((each.seconds for each in found), reverse=True)
    assert {each.kind for each in found if each.of_matmul} == {"matrix products"}
    assert all(f"| {each.kind} |" in table(found) for each in found if each.share >= 0.005)


def test_products_are_counted_as_torch_counts_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.profile.matmul_flops_per_second", lambda *_: 1.0)  # so that shares are FLOPs
    window = microbatch(make_subject("tiny", 2, device="cpu"))
    window(nullcontext())
    with FlopCounterMode(display=False) as counter:
        window(nullcontext())
    attention = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "attention" in str(op))
    products = next(each for each in shares("tiny", 2, "microbatch") if each.kind == "matrix products")
    flops = products.of_matmul * products.seconds  # a quotient and a product of floats: exact but for their rounding
    assert flops == pytest.approx(counter.get_total_flops() - attention, rel=1e-12)


def test_a_large_product_has_a_speed() -> None:
    assert matmul_flops_per_second(torch.device("cpu"), torch.float32) > 1e9

"""Floating-point operations of an operator, from the shapes that go into it."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_ATTENTION_BACK = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def flops_of(operator: Any, args: Any, out: Any) -> int:
    """Count what an operator multiplies and adds: two for each product in a matrix product, a convolution, attention.

    Args:
        operator: The dispatcher's.
        args: What it was called with, by position.
        out: What it returned.

    Returns:
        Operations; 0 for everything else, which takes memory's time and not arithmetic's. Attention counts whole, also
        where half of it is masked.

    Example:
        >>> a, b = torch.ones(2, 3), torch.ones(3, 5)
        >>> flops_of(torch.ops.aten.mm.default, (a, b), a @ b)  # 2 * (2 * 3 * 5)
        60
    """
    packet = getattr(operator, "overloadpacket", None)
    # Of the CPU's own kernels, which fake tensors are sent to; the registry has those of other devices.
    if packet is _ATTENTION:
        return sdpa_flop_count(*(each.shape for each in args[:3]))
    if packet is _ATTENTION_BACK:
        return sdpa_backward_flop_count(*(each.shape for each in args[:4]))
    counted = flop_registry.get(packet)
    return 0 if counted is None else int(counted(*args, out_val=out))

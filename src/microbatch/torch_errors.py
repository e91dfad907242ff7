"""The error that is one of torch's too; it is not in `errors` because the other errors need no torch."""

from __future__ import annotations

import torch

from microbatch.errors import MicrobatchError


class OutOfMemoryError(MicrobatchError, torch.OutOfMemoryError):
    """An allocation exceeded the memory budget or the device's memory, and a smaller microbatch cannot help.

    An attribute is `None` if it is not known.

    Attributes:
        asked: Bytes of the allocation that failed.
        in_use: Bytes in use before the allocation.
        budget: Bytes that may be in use.
        operator: The operator that allocated, by its dispatcher name, for example ``"aten.addmm.default"``.
        module: Path of the module that ran the operator; empty for the model itself.
    """

    __module__ = "microbatch.errors"

    def __init__(
        self,
        message: str,
        *,
        asked: int | None = None,
        in_use: int | None = None,
        budget: int | None = None,
        operator: str | None = None,
        module: str | None = None,
    ) -> None:
        super().__init__(message)
        self.asked = asked
        self.in_use = in_use
        self.budget = budget
        self.operator = operator
        self.module = module

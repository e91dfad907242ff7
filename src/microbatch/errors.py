"""Every exception of the library.

::

    MicrobatchError
    ├── ConfigError             (ValueError)    an argument or a setting that cannot work
    ├── BatchError              (ValueError)    the batch cannot be cut
    │   ├── EmptyBatchError                     it has no rows
    │   └── RowsDisagreeError                   its tensors have different numbers of rows
    ├── LossError               (ValueError)    what the loss function returned cannot be used
    │   ├── LossShapeError                      not a 0-d tensor
    │   ├── NoGraphError                        nothing to differentiate
    │   ├── CountError                          a count that is negative, NaN, or not what was declared
    │   ├── MissingCountError                   a denominator that nobody gave
    │   └── UnknownTermError                    a term that the window does not have
    ├── WindowError             (RuntimeError)  the window was used in the wrong order
    │   ├── WindowClosedError                   used before it was opened or after it was closed
    │   ├── WindowOpenError                     another window, or the optimizer, was called inside it
    │   ├── GradientsTouchedError               something else wrote to the gradients inside it
    │   └── EmptyWindowError                    nothing contributed, so there is no mean to minimise
    ├── BatchStatisticsError    (RuntimeError)  microbatches cannot share the statistics of their batch
    ├── CheckError              (ValueError)    there is nothing that a gradient could be checked against
    ├── NonfiniteError          (ArithmeticError)           the loss or the gradient is infinite or NaN
    ├── OutOfMemoryError        (torch.OutOfMemoryError)    the memory budget, or the device's memory, was passed
    ├── SpillError              (OSError)       no room, or no way, to move tensors off the device
    ├── RankError               (RuntimeError)  another rank failed, died or did not come, or the ranks disagree
    │   └── RankAgainError                      another rank ran out of memory, and all have to run the batch again
    ├── DataError               (ValueError)    data that cannot be read or trained on
    ├── CheckpointError         (RuntimeError)  a checkpoint that is missing, damaged or of another run
    └── MissingDependencyError  (ImportError)   an optional package that is not installed
"""

from __future__ import annotations

import torch


class MicrobatchError(Exception):
    """Base of every error that this library raises on purpose."""


class ConfigError(MicrobatchError, ValueError):
    """An argument or a setting that cannot work."""


class BatchError(MicrobatchError, ValueError):
    """The batch cannot be cut into microbatches."""


class EmptyBatchError(BatchError):
    """The batch has no rows, so there is nothing to learn from."""


class RowsDisagreeError(BatchError):
    """The tensors of one batch have different numbers of rows."""


class LossError(MicrobatchError, ValueError):
    """What the loss function returned cannot be used."""


class LossShapeError(LossError):
    """The loss is not a 0-d floating-point tensor."""


class NoGraphError(LossError):
    """The loss is not attached to a graph, so it has no gradient."""


class CountError(LossError):
    """A count is negative, not finite, or not the one that was declared."""


class MissingCountError(LossError):
    """The number of samples or targets behind a loss is not known, and is never guessed."""


class UnknownTermError(LossError):
    """A microbatch returned a term that its window does not have."""


class WindowError(MicrobatchError, RuntimeError):
    """The window was used in the wrong order."""


class WindowClosedError(WindowError):
    """The window was used before it was opened or after it was closed."""


class WindowOpenError(WindowError):
    """A second window, or the optimizer, was called inside an open window."""


class GradientsTouchedError(WindowError):
    """Something other than the window wrote to the gradients while it was open."""


class EmptyWindowError(WindowError):
    """Nothing contributed to the window, so its mean does not exist."""


class BatchStatisticsError(MicrobatchError, RuntimeError):
    """The microbatches of a batch cannot share a statistic: they do not meet for it, or it cannot be seen."""


class CheckError(MicrobatchError, ValueError):
    """There is nothing that a gradient could be checked against: no loss, no gradient, or no step."""


class NonfiniteError(MicrobatchError, ArithmeticError):
    """The loss or the gradient of a window is infinite or NaN.

    Attributes:
        microbatch: Index, from 0, of the first microbatch at fault, or `None` if it could not be told.
        parameter: Name of the first parameter at fault, or `None` if every gradient is finite.
    """

    def __init__(self, *, microbatch: int | None = None, parameter: str | None = None) -> None:
        what = "the loss" if parameter is None else f"the gradient of {parameter!r}"
        where = "a microbatch" if microbatch is None else f"microbatch {microbatch}"
        super().__init__(
            f"{what} became infinite or NaN in {where} of this window; weights, gradients, random state and buffers "
            'are as before it; pass nonfinite="skip" to drop such windows and go on'
        )
        self.microbatch = microbatch
        self.parameter = parameter


class OutOfMemoryError(MicrobatchError, torch.OutOfMemoryError):
    """An allocation passed the memory budget, or what the device has, and a smaller microbatch cannot help.

    Attributes:
        asked: Bytes of the allocation that failed, or `None` if it could not be told, as for all the others.
        in_use: Bytes in use before it.
        budget: Bytes that may be in use.
        operator: The operator that asked, as the dispatcher names it, for example ``"aten.addmm.default"``.
        module: Path of the module that it ran in; empty for the model itself.
    """

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


class SpillError(MicrobatchError, OSError):
    """Tensors cannot be moved off the device: the disk is full, or the file cannot be made, written or read."""


class RankError(MicrobatchError, RuntimeError):
    """Another rank failed, died or did not come, or the ranks do not agree about a window."""


class RankAgainError(RankError):
    """Another rank ran out of memory, in the midst of a batch that all ranks have to run again together."""


class DataError(MicrobatchError, ValueError):
    """Data cannot be read or trained on."""


class CheckpointError(MicrobatchError, RuntimeError):
    """A checkpoint is missing, damaged, or belongs to another run."""


class MissingDependencyError(MicrobatchError, ImportError):
    """An optional package is needed and is not installed."""

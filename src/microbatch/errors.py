"""Every exception of the library.

::

    MicrobatchError
    ├── ConfigError             (ValueError)    an argument or an option cannot work
    ├── BatchError              (ValueError)    the batch cannot be cut
    │   ├── EmptyBatchError                     it has no rows
    │   └── RowsDisagreeError                   its tensors have different numbers of rows
    ├── LossError               (ValueError)    the loss function's result cannot be used
    │   ├── LossShapeError                      the loss is not a tensor of shape ()
    │   ├── NoGraphError                        the loss has no graph, so it has no gradient
    │   ├── CountError                          a count is negative, not finite, or not the declared one
    │   ├── MissingCountError                   a count is needed and was not given
    │   └── UnknownTermError                    the window does not have this term of the loss
    ├── WindowError             (RuntimeError)  the window was used in the wrong order
    │   ├── WindowClosedError                   it was used before it was opened or after it was closed
    │   ├── WindowOpenError                     another window, or the optimizer, was called inside it
    │   ├── GradientsTouchedError               other code wrote to the gradients inside it
    │   ├── WeightsMovedError                   other code wrote to the weights inside it
    │   └── EmptyWindowError                    no microbatch contributed, so there is no mean to minimise
    ├── BatchStatisticsError    (RuntimeError)  microbatches cannot share the statistics of their batch
    ├── CheckError              (ValueError)    there is no loss, gradient or step to check
    ├── LintError               (ValueError)    there is no such rule, or the doctor cannot use what it was given
    ├── NonfiniteError          (ArithmeticError)           the loss or the gradient is infinite or NaN
    ├── OutOfMemoryError        (torch.OutOfMemoryError)    the memory budget, or the device's memory, was exceeded
    ├── SpillError              (OSError)       tensors cannot be moved off the device
    ├── RankError               (RuntimeError)  another rank failed or did not answer, or the ranks disagree
    │   └── RankAgainError                      another rank ran out of memory, and all run the batch again
    ├── DataError               (ValueError)    data cannot be read or trained on
    ├── CheckpointError         (RuntimeError)  a checkpoint is missing, damaged, or from another run
    └── MissingDependencyError  (ImportError)   an optional package is not installed
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from microbatch.torch_errors import OutOfMemoryError as OutOfMemoryError  # noqa: PLC0414 - public here


def __getattr__(name: str) -> Any:
    """Import the one error that is an error of torch too when it is first used: the others need no torch."""
    if name != "OutOfMemoryError":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = import_module("microbatch.torch_errors").OutOfMemoryError
    return value


class MicrobatchError(Exception):
    """Base of every error that this library raises on purpose."""


class ConfigError(MicrobatchError, ValueError):
    """An argument or an option cannot work."""


class BatchError(MicrobatchError, ValueError):
    """The batch cannot be cut into microbatches."""


class EmptyBatchError(BatchError):
    """The batch has no rows."""


class RowsDisagreeError(BatchError):
    """The tensors of one batch have different numbers of rows."""


class LossError(MicrobatchError, ValueError):
    """The loss function's result cannot be used."""


class LossShapeError(LossError):
    """The loss is not a 0-d floating-point tensor."""


class NoGraphError(LossError):
    """The loss is not attached to a graph, so it has no gradient."""


class CountError(LossError):
    """A count is negative, not finite, or not the one that was declared."""


class MissingCountError(LossError):
    """The number of samples or targets of a loss is needed and was not given; it is never guessed."""


class UnknownTermError(LossError):
    """A microbatch returned a term that its window does not have."""


class WindowError(MicrobatchError, RuntimeError):
    """The window was used in the wrong order."""


class WindowClosedError(WindowError):
    """The window was used before it was opened or after it was closed."""


class WindowOpenError(WindowError):
    """A second window, or the optimizer, was called inside an open window."""


class GradientsTouchedError(WindowError):
    """Other code wrote to the gradients while the window was open."""


class WeightsMovedError(WindowError):
    """Other code wrote to the weights inside the window."""


class EmptyWindowError(WindowError):
    """No microbatch contributed to the window, so its mean does not exist."""


class BatchStatisticsError(MicrobatchError, RuntimeError):
    """The microbatches of a batch cannot share a statistic: not all of them compute it, or it cannot be intercepted."""


class CheckError(MicrobatchError, ValueError):
    """There is no loss, gradient or step to check."""


class LintError(MicrobatchError, ValueError):
    """There is no such rule, or the doctor cannot use what it was given."""


class NonfiniteError(MicrobatchError, ArithmeticError):
    """The loss or the gradient of a window is infinite or NaN.

    Attributes:
        microbatch: Index, from 0, of the first microbatch with an infinite or NaN value; `None` if it is not known.
        parameter: Name of the first parameter with an infinite or NaN gradient; `None` if every gradient is finite.
    """

    def __init__(self, *, microbatch: int | None = None, parameter: str | None = None) -> None:
        what = "the loss" if parameter is None else f"the gradient of {parameter!r}"
        where = "a microbatch" if microbatch is None else f"microbatch {microbatch}"
        super().__init__(
            f"{what} became infinite or NaN in {where} of this window; weights, gradients, random state and buffers "
            'are as before it. Pass nonfinite="skip" to drop such windows and go on'
        )
        self.microbatch = microbatch
        self.parameter = parameter


class SpillError(MicrobatchError, OSError):
    """Tensors cannot be moved off the device: the disk is full, or the file cannot be created, written or read."""


class RankError(MicrobatchError, RuntimeError):
    """Another rank failed or did not answer, or the ranks do not agree about a window."""


class RankAgainError(RankError):
    """Another rank ran out of memory, and all ranks have to run the batch again together."""


class DataError(MicrobatchError, ValueError):
    """Data cannot be read or trained on."""


class CheckpointError(MicrobatchError, RuntimeError):
    """A checkpoint is missing, damaged, or from another run."""


class MissingDependencyError(MicrobatchError, ImportError):
    """An optional package is needed and is not installed."""

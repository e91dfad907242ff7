"""What `training_step` logs and returns for each microbatch, joined to the values of the whole window."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from microbatch.loss.loss import Loss, wide_dtype

_REDUCTIONS = {"mean": "mean", "avg": "mean", "sum": "sum", "max": "amax", "min": "amin"}


@dataclass
class Record:
    """What one microbatch logged and returned.

    Attributes:
        logged: Names, values and further arguments of every call of `self.log`, in order.
        count: Count of the returned `Loss`; `None` for a mean over rows.
        extra: What the returned dict holds beside the loss.
        returned: Whether a loss was returned.
    """

    logged: list[tuple[str, Any, dict[str, Any]]] = field(default_factory=list[tuple[str, Any, dict[str, Any]]])
    count: Any = None
    extra: Mapping[str, Any] = field(default_factory=dict[str, Any])
    returned: bool = False

    def loss_of(self, output: Any) -> Any:
        """Take the loss out of the result of `training_step`, and keep the rest.

        Args:
            output: A loss, a dict with a loss, or `None`.

        Returns:
            The loss.
        """
        loss = output
        if isinstance(output, Mapping):
            loss = output.get("loss")
            self.extra = {name: _detached(value) for name, value in output.items() if name != "loss"}
        self.count = _detached(loss.count) if isinstance(loss, Loss) else None
        self.returned = loss is not None
        return loss


class WindowLogs:
    """Collect the logs of a window's microbatches.

    Args:
        log: The method `log` of the module.
    """

    def __init__(self, log: Callable[..., None]) -> None:
        self._log = log
        self._names = list(inspect.signature(log).parameters)[2:]
        self._records: list[Record] = []
        self._rows: list[float] = []
        # A context variable, because microbatches in lockstep run in threads or fibers of their own.
        self._now: ContextVar[Record | None] = ContextVar("microbatch_record", default=None)

    def begin(self) -> None:
        """Forget the microbatches so far: a window begins, or begins again."""
        self._records, self._rows = [], []

    @contextmanager
    def record(self, *, keep: bool) -> Generator[Record]:
        """Collect what is logged in the block.

        Args:
            keep: Whether the microbatch belongs to the window; a dry run's logs are dropped.

        Yields:
            The record of the microbatch.
        """
        record = Record()
        if keep:
            self._records.append(record)
        token = self._now.set(record)
        try:
            yield record
        finally:
            self._now.reset(token)

    def log(self, name: str, value: Any, *args: Any, **rest: Any) -> None:
        """Keep a value for the end of the window; outside of microbatches, log it at once."""
        record = self._now.get()
        if record is None:
            self._log(name, value, *args, **rest)
        else:
            record.logged.append((name, _detached(value), {**dict(zip(self._names, args, strict=False)), **rest}))

    def done(self, rows: float | None) -> None:
        """Note the rows of the next microbatch whose backward has run."""
        self._rows.append(rows or 0)

    @property
    def returned(self) -> bool:
        """Whether any microbatch returned a loss."""
        return any(record.returned for record in self._records)

    def send(self, values_of: Mapping[int, nn.Module]) -> None:
        """Log each name once, with the value of the whole window.

        Args:
            values_of: The metric objects that may be logged, by their id; they hold the window's value already.
        """
        calls: dict[str, list[tuple[Any, dict[str, Any], Record, float]]] = {}
        for record, rows in zip(self._records, self._rows, strict=False):
            for name, value, rest in record.logged:
                calls.setdefault(name, []).append((value, rest, record, rows))
        for name, entries in calls.items():
            value, rest = entries[-1][:2]
            if not isinstance(value, nn.Module) and id(value) not in values_of:
                value, batch_size = self._join(entries)
                rest = {**rest, "batch_size": batch_size}
            self._log(name, value, **rest)

    def extra(self) -> dict[str, Any]:
        """Return what the microbatches returned beside the loss, each name joined over the window.

        Returns:
            Tensors with a row for each row of the microbatch, one after the other; means of 0-d tensors; else a list.
        """
        found: dict[str, list[Any]] = {}
        for record in self._records[: len(self._rows)]:
            for name, value in record.extra.items():
                found.setdefault(name, []).append(value)
        return {name: _joined(values, self._rows) for name, values in found.items()}

    def _join(self, entries: Sequence[tuple[Any, dict[str, Any], Record, float]]) -> tuple[Any, int]:
        values = [value for value, _, _, _ in entries]
        sizes = [rest.get("batch_size") for _, rest, _, _ in entries]
        rows = [each for _, _, _, each in entries]
        if None in sizes:
            counts = [each if record.count is None else record.count for _, _, record, each in entries]
            sizes = rows
        else:
            counts = sizes
        how = entries[-1][1].get("reduce_fx", "mean")
        how = how.lower() if isinstance(how, str) else getattr(how, "__name__", "")
        return _reduced(values, counts, _REDUCTIONS.get(how, "")), int(sum(map(int, sizes)))  # type: ignore[arg-type]


def _reduced(values: Sequence[Any], counts: Sequence[Any], how: str) -> Any:
    """Reduce one value of each microbatch; the last value where the reduction is not known."""
    first = next((each for each in values if isinstance(each, Tensor)), None)
    if not how or any(isinstance(each, Tensor) and each.numel() != 1 for each in values):
        return values[-1]
    device = torch.device("cpu") if first is None else first.device
    wide = wide_dtype(device)
    stacked = torch.stack([torch.as_tensor(each, device=device).to(wide).reshape(()) for each in values])
    if how == "mean":
        weights = torch.stack([torch.as_tensor(each, device=device).to(wide) for each in counts])
        # A mean over nothing is NaN, and counts for nothing.
        reduced = torch.where(weights == 0, 0.0, stacked * weights).sum() / weights.sum()
    else:
        reduced = getattr(stacked, how)()
    dtype = first.dtype if first is not None and first.dtype.is_floating_point else torch.get_default_dtype()
    return reduced.to(torch.float32 if dtype.itemsize < 4 else dtype)


def _joined(values: Sequence[Any], rows: Sequence[float]) -> Any:
    if len(values) == len(rows) and all(isinstance(each, Tensor) for each in values):
        if all(each.ndim and len(each) == size for each, size in zip(values, rows, strict=True)):
            return torch.cat(list(values))
        if all(each.ndim == 0 for each in values):
            return _reduced(values, rows, "mean")
    return values


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


class WindowMetrics:
    """Keep torchmetrics objects right: count no microbatch twice, and give each window its own value.

    A metric is set to its empty state while the window runs, and its earlier state is merged in afterwards. Metrics
    whose states cannot be merged only get back their state when a window runs again.

    Args:
        module: The module that holds metrics as attributes.
    """

    def __init__(self, module: nn.Module) -> None:
        self._metrics: list[Any] = [each for each in module.modules() if hasattr(each, "_reductions")]
        self._before: list[dict[str, Any]] = []

    def by_id(self) -> dict[int, nn.Module]:
        """Return the metrics by their id."""
        return {id(each): each for each in self._metrics}

    def begin(self) -> None:
        """Set the metrics' states aside."""
        self._before = [_set_aside(each) for each in self._metrics]

    def again(self) -> None:
        """Drop what a failed attempt added."""
        for metric, before in zip(self._metrics, self._before, strict=True):
            _restore(metric, before)
        self.begin()

    def drop(self) -> None:
        """Restore the states: the window failed for good."""
        for metric, before in zip(self._metrics, self._before, strict=True):
            _restore(metric, before)
        self._before = []

    def finish(self) -> None:
        """Compute the window's values, and merge the earlier states in."""
        for metric, before in zip(self._metrics, self._before, strict=True):
            if _merges(metric):
                _merge(metric, before)
        self._before = []


_FIELDS = ("_update_count", "_computed", "_forward_cache")


def _merges(metric: Any) -> bool:
    known = ("dim_zero_sum", "dim_zero_max", "dim_zero_min", "dim_zero_cat")
    simple = all(getattr(each, "__name__", "") in known for each in metric._reductions.values())
    return bool(metric._reductions) and simple and not metric.full_state_update


def _set_aside(metric: Any) -> dict[str, Any]:
    fields = {name: getattr(metric, name) for name in _FIELDS}
    if not _merges(metric):
        return {"states": metric._copy_state_dict(), **fields}
    states = {name: getattr(metric, name) for name in metric._defaults}
    for name, value in states.items():
        if isinstance(value, list):
            setattr(metric, name, [])  # `reset` clears the list itself
    metric.reset()
    return {"states": states, **fields}


def _restore(metric: Any, before: Mapping[str, Any]) -> None:
    for name, value in before["states"].items():
        setattr(metric, name, value)
    for name in _FIELDS:
        setattr(metric, name, before[name])


def _merge(metric: Any, before: Mapping[str, Any]) -> None:
    value, count = metric._forward_cache, metric._update_count
    if not count:
        _restore(metric, before)
        return
    if value is not None:  # the metric was called, and its value may be logged on this step
        sync, unsync = metric._to_sync, metric._should_unsync
        metric._to_sync, metric._should_unsync, metric._computed = metric.dist_sync_on_step, False, None
        value = metric.compute()
        metric._to_sync, metric._should_unsync = sync, unsync
    with torch.no_grad():
        metric._update_count = before["_update_count"] + count
        metric._reduce_states(before["states"])
    metric._computed, metric._forward_cache, metric._is_synced = None, value, False

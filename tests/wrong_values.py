"""Fuzz the public calls with values of wrong kinds: what comes out is a result or an error of the library.

A script as well: it prints each raw error, and JSON at its end, for a process in which no checker of types comes first.
"""

# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import json
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import microbatch as mb

OURS = str(Path(mb.__file__).parent)


class Hostile:
    """Compares to nothing, has no length, and has no truth value."""

    def __eq__(self, other: object) -> bool:
        """Refuse."""
        message = "not comparable"
        raise TypeError(message)

    def __bool__(self) -> bool:
        """Refuse."""
        message = "no truth value"
        raise TypeError(message)

    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def __repr__(self) -> str:
        """Name it."""
        return "Hostile()"


class Refusing:
    """Raises an error of its own for every attribute that it does not have."""

    def __getattr__(self, name: str) -> Any:
        """Refuse."""
        raise RuntimeError(name)

    def __repr__(self) -> str:
        """Name it."""
        return "Refusing()"


class Entries(dict[str, Any]):
    """A dict whose entries are attributes; one that is not there raises KeyError, also in `hasattr`."""

    __getattr__ = dict.__getitem__


class Unreadable(dict[str, Any]):
    """A dict that cannot be iterated over."""

    def __iter__(self) -> Any:
        """Refuse."""
        raise RuntimeError


class Output:
    """What a Transformers model returns, as an object."""

    def __init__(self, loss: Any, logits: Any) -> None:
        self.loss, self.logits = loss, logits


WRONG: dict[str, Any] = {
    "None": None,
    "True": True,
    "0": 0,
    "-1": -1,
    "10**400": 10**400,
    "2.5": 2.5,
    "nan": float("nan"),
    "''": "",
    "'auto'": "auto",
    "'\\ud800'": "\ud800",
    "b'x'": b"x",
    "[]": [],
    "[None]": [None],
    "{}": {},
    "{'x': 1}": {"x": 1},
    "(1, 2)": (1, 2),
    "object()": object(),
    "Hostile()": Hostile(),
    "Refusing()": Refusing(),
    "Entries()": Entries(x=1),
    "type": int,
    "lambda": lambda *_: None,
    "tensor(2)": torch.tensor(2),
    "vector": torch.ones(3),
    "meta": torch.ones((), device="meta"),
    "np.int64(4)": np.int64(4),
    "np.ones(2)": np.ones(2),
    "np.array(2)": np.array(2),
    "np.bool_": np.True_,
    "{'x'}": {"x"},
    "generator": (each for each in ()),
    "float32": torch.float32,
}


def fresh() -> tuple[nn.Module, torch.optim.Optimizer]:
    """Make a model and its optimizer."""
    model = nn.Linear(2, 1)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def mean(model: nn.Module, x: Any) -> Any:
    """Return a plain mean."""
    return model(x).square().mean()


X = torch.arange(12.0).view(6, 2)


def _accumulator(**given: Any) -> Any:
    model, optimizer = fresh()
    arguments: dict[str, Any] = {"model": model, "optimizer": optimizer, "microbatch_size": 2} | given
    return mb.Accumulator(**arguments)


def _constructed(**given: Any) -> Any:
    """Construct an accumulator, and use it: a value that passes the constructor may fail later."""
    accumulator = _accumulator(**given)
    if accumulator.options.compile:  # takes seconds
        return None
    return (accumulator.step if accumulator.options.optimizers else accumulator.gradient)(X, mean)


def _step(**given: Any) -> Any:
    usual = {"batch": X, "loss_fn": _tolerant if "batch" in given else mean}
    return _accumulator().step(**(usual | given))


def _window(**given: Any) -> None:
    with _accumulator().window(**({"counts": None} | given)) as window:
        for x in window.split(X):
            window.backward(mean(window.model, x))


def _backward(**given: Any) -> None:
    with _accumulator().window() as window:
        window.backward(**({"loss": mean(window.model, X), "count": 6} | given))


def _windows(**given: Any) -> None:
    for window in _accumulator().windows(**({"loader": list(X.split(2)), "microbatches": 2} | given)):
        for x in window:
            window.backward(_tolerant(window.model, x))  # a loader may give anything


def _scale(**given: Any) -> Any:
    return mb.scale_hyperparameters(
        given.pop("given", fresh()[1]), **({"from_batch_size": 8, "to_batch_size": 16} | given)
    )


def _check(**given: Any) -> Any:
    loss_fn = _tolerant if given.keys() & {"batch", "encode"} else mean
    usual = {"model": fresh()[0], "loss_fn": loss_fn, "batch": X, "microbatch_size": 2}
    return mb.check(**(usual | given))


def _plan(**given: Any) -> Any:
    model, optimizer = fresh()
    loss_fn = _tolerant if "batch" in given else mean
    usual = {"optimizer": optimizer, "loss_fn": loss_fn, "batch": X, "memory_budget": "1 GiB"}
    return mb.plan(given.pop("job", model), **(usual | given))


def _lengths(**given: Any) -> Any:
    lengths = mb.Lengths(**({"of": "n"} | given))
    model, optimizer = fresh()
    accumulator = mb.Accumulator(model, optimizer, microbatch_size=2, lengths=lengths)
    batch = {"x": torch.ones(4, 3, 2), "n": torch.tensor([3, 2, 1, 3])}
    return accumulator.step(batch, lambda model, b: model(b["x"]).mean())


def _batches(**given: Any) -> Any:
    return _step(batch=mb.Batches(given.get("batches", [X, X])))


def _rows(**given: Any) -> Any:
    return _step(
        batch={"x": X, "r": mb.Rows(**({"value": list(range(6))} | given))}, loss_fn=lambda m, b: mean(m, b["x"])
    )


def _whole(**given: Any) -> Any:
    return _step(batch={"x": X, "w": mb.Whole(given.get("value", 3))}, loss_fn=lambda m, b: mean(m, b["x"]))


def _loss(**given: Any) -> Any:
    return _step(loss_fn=lambda m, x: mb.Loss(**({"sum": m(x).sum(), "count": len(x)} | given)))


def _sums(**given: Any) -> Any:
    return _accumulator(sums=mb.Sums(**given)).step(X, mean)


def _ranks(**given: Any) -> Any:
    return _accumulator(ranks=mb.Ranks(**given)).step(X, mean)


def _spill(**given: Any) -> Any:
    stay = given.pop("stay", None)
    return _accumulator(offload=mb.Spill(*([] if stay is None else [stay]), **given)).step(X, mean)


def _linear(**given: Any) -> Any:
    usual = {
        "hidden": torch.ones(3, 2, requires_grad=True),
        "weight": torch.ones(5, 2),
        "labels": torch.tensor([1, 2, 3]),
    }
    usual |= {"tile": 2}
    return mb.linear_cross_entropy(**(usual | given))


def _noise(**given: Any) -> Any:
    return _accumulator(noise_scale=mb.NoiseScale(**given)).step(X, mean)


CALLS: dict[str, tuple[Callable[..., Any], list[str]]] = {
    "Accumulator": (_constructed, list(signature(mb.Accumulator).parameters)),
    "step": (_step, ["batch", "loss_fn", "counts", "encode"]),
    "window": (_window, ["counts"]),
    "backward": (_backward, ["loss", "count"]),
    "windows": (_windows, ["loader", "microbatches", "counts"]),
    "load_state_dict": (lambda **given: _accumulator().load_state_dict(given["state"]), ["state"]),
    "Sums": (_sums, ["dtype", "how", "buffer", "fuse"]),
    "NoiseScale": (_noise, ["every", "by_group", "windows"]),
    "Ranks": (_ranks, ["group", "sync", "reduce_dtype", "overlap"]),
    "Lengths": (_lengths, ["of", "side", "keys", "relative_positions", "microbatch_tokens", "overhead"]),
    "Loss": (_loss, ["sum", "count", "metrics"]),
    "Spill": (_spill, ["stay", "directory", "smallest", "device"]),
    "Batches": (_batches, ["batches"]),
    "Rows": (_rows, ["value", "dim", "group"]),
    "Whole": (_whole, ["value"]),
    "LinearState": (
        lambda **given: mb.LinearState(
            **({"state": "m", "coefficients": lambda *_: (1, 1, 0), "stepping": {}} | given)
        ),
        ["state", "coefficients", "stepping", "hindrance"],
    ),
    "cut": (lambda **given: mb.cut(**({"batch": X, "microbatch_size": 2} | given)), ["batch", "microbatch_size"]),
    "divide_batch": (
        lambda **given: mb.divide_batch(**({"batch_size": 8, "microbatch_size": 2} | given)),
        ["batch_size", "microbatch_size", "microbatches", "ranks"],
    ),
    "scale_hyperparameters": (
        _scale,
        ["given", "from_batch_size", "to_batch_size", "rule", "warmup_steps", "steps", "critical_batch_size"],
    ),
    "Hyperparameters": (
        lambda **given: mb.Hyperparameters(**({"optimizer": "AdamW", "learning_rate": 0.1} | given)),
        ["optimizer", "learning_rate", "momentum", "betas", "eps", "weight_decay"],
    ),
    "check": (
        _check,
        ["model", "loss_fn", "batch", "microbatch_size", "encode", "counts", "loop", "optimizer", "memory_budget"],
    ),
    "plan": (_plan, ["job", "optimizer", "loss_fn", "batch", "memory_budget", "autocast", "from_batch_size"]),
    "convert_batch_norm": (
        lambda **given: mb.convert_batch_norm(given.pop("model", nn.BatchNorm1d(4)), **({"to": "group"} | given)),
        ["model", "to", "groups"],
    ),
    "linear_cross_entropy": (_linear, ["hidden", "weight", "labels", "bias", "ignore_index", "tile"]),
}
SLOW = ("check(", "plan(", "Lengths(")
# Functions of the user may raise whatever they like: these get no class, whose own errors would come out.
FUNCTIONS = {"loss_fn", "encode", "counts", "of", "coefficients", "hindrance", "loop", "listeners"}

# Arguments that are whole numbers, with one that works.
WHOLE: dict[str, dict[str, int]] = {
    "Accumulator": {"microbatch_size": 2, "memory_budget": 1 << 30},
    "windows": {"microbatches": 2},
    "NoiseScale": {"every": 2, "windows": 2},
    "Lengths": {"microbatch_tokens": 6, "overhead": 3},
    "Spill": {"smallest": 4},
    "Rows": {"dim": 0, "group": 1},
    "cut": {"microbatch_size": 2},
    "divide_batch": {"batch_size": 8, "microbatch_size": 2, "microbatches": 4, "ranks": 2},
    "scale_hyperparameters": {"from_batch_size": 8, "to_batch_size": 16, "warmup_steps": 4, "steps": 8},
    "check": {"microbatch_size": 2, "memory_budget": 1 << 30},
    "convert_batch_norm": {"groups": 2},
    "linear_cross_entropy": {"ignore_index": 2, "tile": 2},
}

# What a loss function may return by mistake; each gets the model's output and the rows.
LOSSES: dict[str, Callable[[torch.Tensor, int], Any]] = {
    "numpy number": lambda y, n: np.float64(y.detach().mean().item()),
    "python number": lambda y, n: float(y.detach().mean()),
    "int beyond float": lambda y, n: mb.Loss(sum=y.sum(), count=10**400),
    "numpy count": lambda y, n: mb.Loss(sum=y.sum(), count=np.int64(n)),
    "numpy float count": lambda y, n: mb.Loss(sum=y.sum(), count=np.float32(n)),
    "numpy array count": lambda y, n: mb.Loss(sum=y.sum(), count=np.array([n])),
    "0-d array count": lambda y, n: mb.Loss(sum=y.sum(), count=np.array(n)),
    "NaN count": lambda y, n: mb.Loss(sum=y.sum(), count=float("nan")),
    "NaN tensor count": lambda y, n: mb.Loss(sum=y.sum(), count=torch.tensor(float("nan"))),
    "negative tensor count": lambda y, n: mb.Loss(sum=y.sum(), count=torch.tensor(-1)),
    "bool count": lambda y, n: mb.Loss(sum=y.sum(), count=True),
    "bool tensor count": lambda y, n: mb.Loss(sum=y.sum(), count=torch.tensor(True)),
    "complex count": lambda y, n: mb.Loss(sum=y.sum(), count=torch.tensor(1j)),
    "vector count": lambda y, n: mb.Loss(sum=y.sum(), count=torch.ones(2)),
    "meta count": lambda y, n: mb.Loss(sum=y.sum(), count=torch.ones((), device="meta")),
    "sparse count": lambda y, n: mb.Loss(sum=y.sum(), count=torch.tensor(2.0).to_sparse()),
    "count with a graph": lambda y, n: mb.Loss(sum=y.sum(), count=y.sum().abs() + 1),
    "complex loss": lambda y, n: y.mean() * (1 + 0j),
    "bool loss": lambda y, n: y.mean() > 0,
    "integer loss": lambda y, n: y.mean().long(),
    "bare bool": lambda y, n: True,
    "vector": lambda y, n: y,
    "one element": lambda y, n: y.mean().view(1),
    "meta loss": lambda y, n: y.mean().to("meta"),
    "another graph on meta": lambda y, n: nn.Linear(2, 1, device="meta")(torch.ones(2, device="meta")).sum(),
    "detached": lambda y, n: y.mean().detach(),
    "no parameter": lambda y, n: torch.ones((), requires_grad=True) * 2,
    "sparse loss": lambda y, n: y.mean().to_sparse(),
    "string": lambda y, n: "0.5",
    "bytes": lambda y, n: b"0.5",
    "object": lambda y, n: object(),
    "hostile": lambda y, n: Hostile(),
    "class": lambda y, n: torch.Tensor,
    "function": lambda y, n: y.mean,
    "list": lambda y, n: [y.mean()],
    "tuple of loss and logits": lambda y, n: (y.mean(), y),
    "output object": lambda y, n: Output(y.mean(), y),
    "output mapping": lambda y, n: {"loss": y.mean(), "logits": y},
    "generator": lambda y, n: (each for each in (y.mean(),)),
    "set": lambda y, n: {1, 2},
    "empty dict": lambda y, n: {},
    "dict of None": lambda y, n: {"a": None},
    "dict of numbers": lambda y, n: {"a": 0.5},
    "nested dict": lambda y, n: {"a": {"b": y.mean()}},
    "dict of lists": lambda y, n: {"a": [y.mean()]},
    "odd keys": lambda y, n: {("a", 1): y.mean(), None: y.mean()},
    "two means": lambda y, n: {"a": y.mean(), "b": y.square().mean()},
    "lone surrogate": lambda y, n: {"\ud800": y.mean()},
    "keys that become equal": lambda y, n: {1: y.mean(), "1": y.square().mean()},
    "mean and count": lambda y, n: {"a": y.mean(), "b": mb.Loss(sum=y.sum(), count=n)},
    "half": lambda y, n: y.mean().half(),
    "float8": lambda y, n: y.mean().to(torch.float8_e5m2),
    "infinite": lambda y, n: y.mean() * float("inf"),
    "NaN": lambda y, n: y.mean() * float("nan"),
    "Loss of None": lambda y, n: mb.Loss(sum=None, count=n),
    "Loss of Loss": lambda y, n: mb.Loss(sum=mb.Loss(sum=y.sum(), count=n), count=n),
    "metric of text": lambda y, n: mb.Loss(sum=y.sum(), count=n, metrics={"a": "b"}),
    "metric of numpy": lambda y, n: mb.Loss(sum=y.sum(), count=n, metrics={"a": np.int64(3)}),
    "metric beyond float": lambda y, n: mb.Loss(sum=y.sum(), count=n, metrics={"a": 10**400}),
    "metric on meta": lambda y, n: mb.Loss(sum=y.sum(), count=n, metrics={"a": torch.ones((), device="meta")}),
    "metric vector": lambda y, n: mb.Loss(sum=y.sum(), count=n, metrics={"a": torch.ones(2)}),
    "metrics list": lambda y, n: mb.Loss(sum=y.sum(), count=n, metrics=[1]),
    "zero count": lambda y, n: mb.Loss(sum=y.sum(), count=0),
    "None": lambda y, n: None,
}
COUNTS: dict[str, Any] = {
    "vector": {"a": torch.ones(2)},
    "function of a vector": lambda batch: {"a": torch.ones(2)},
    "numpy": {"a": np.int64(6)},
    "beyond float": {"a": 10**400},
    "NaN": {"a": float("nan")},
    "None": {"a": None},
    "text": {"a": "6"},
    "complex": {"a": torch.tensor(6j)},
    "meta": {"a": torch.ones((), device="meta")},
    "list": [6],
    "number": 6,
    "another term": {"b": 6},
    "function of None": lambda batch: None,
    "nested": {"a": {"b": 6}},
    "right": {"a": 6},
}


# What is made inside the call: marks are checked when they are made, and torch warns of what it calls beta.
MADE: dict[str, Callable[[], Any]] = {
    "csr": X.to_sparse_csr,
    "nested": lambda: torch.nested.nested_tensor([X[:2], X]),
    "Rows of number": lambda: {"x": X, "r": mb.Rows(5)},
    "Rows of None": lambda: {"x": X, "r": mb.Rows(None)},
    "Rows of Rows": lambda: {"x": X, "r": mb.Rows(mb.Rows(list(range(6))))},
    "Rows too short": lambda: {"x": X, "r": mb.Rows([1])},
    "Whole alone": lambda: mb.Whole(X),
    "Whole of Rows": lambda: {"x": X, "w": mb.Whole(mb.Rows([1, 2]))},
    "Batches of None": lambda: mb.Batches([None]),
    "Batches of Batches": lambda: mb.Batches([mb.Batches([X])]),
}


def _batch_like() -> Iterator[tuple[str, Any]]:
    cycle: dict[str, Any] = {"x": X}
    cycle["me"] = cycle
    deep: Any = X
    for _ in range(3000):
        deep = [deep]
    yield from {
        "cycle": cycle,
        "deep": deep,
        "meta": X.to("meta"),
        "sparse": X.to_sparse(),
        "packed": nn.utils.rnn.pack_sequence([X, X[:3]]),
        "quantized": None,
        "strings": ["a", "b", "c"],
        "set": {1, 2, 3},
        "frozenset": frozenset({1}),
        "bytes": b"abc",
        "bytearray": bytearray(b"abc"),
        "memoryview": memoryview(b"abc"),
        "range": range(6),
        "numpy": X.numpy(),
        "object array": np.array([object(), None], dtype=object),
        "structured": np.zeros(6, dtype=[("a", "f4")]),
        "0-d": torch.tensor(1.0),
        "empty tensor": torch.zeros(0, 2),
        "empty list": [],
        "empty dict": {},
        "None": None,
        "number": 3,
        "nan": float("nan"),
        "class": dict,
        "generator": (each for each in X),
        "iterator": iter([X]),
        "hostile": {"x": X, "h": Hostile()},
        "only hostile": Hostile(),
        "refusing": {"x": X, "r": Refusing()},
        "only refusing": Refusing(),
        "refusing in a list": {"x": X, "r": mb.Rows([Refusing()] * 6)},
        "entries as attributes": Entries(x=X, y=X[:, 0]),
        "entries in entries": {"x": X, "e": Entries(y=X)},
        "unreadable dict": Unreadable(x=X),
        "unreadable dict as a whole": {"x": X, "u": mb.Whole([Unreadable(x=1)])},
        "entries as a whole": {"x": X, "e": mb.Whole(Entries(y=X))},
        "ragged list": [[1, 2], [3]],
        "list of tensors": [X, X],
        "disagreeing": {"a": X, "b": X[:3]},
        "odd keys": {1: X, None: X},
        "complex": X * 1j,
        "bool": X > 0,
        "ints": X.long(),
        "big ints": {"x": X, "n": [10**400] * 6},
        "namedtuple": torch.return_types.max((X.max(0).values, X.max(0).indices)),
        "module": nn.Linear(2, 1),
        "parameter": nn.Parameter(X),
        "storage": X.untyped_storage(),
        # More of a graph ends in torch's own words, that it runs a second time, as tests/unit/test_misuse.py expects.
        "a gradient": X.clone().requires_grad_(),
        "expanded": X[:1].expand(6, 2),
        "function": mean,
        "exception": ValueError("x"),
        "device": torch.device("cpu"),
        "dtype": torch.float32,
        "generator of torch": torch.Generator(),
        "string": "abc",
    }.items()


def _tolerant(model: nn.Module, batch: Any) -> Any:
    """Find a tensor in a microbatch, whatever its kind."""
    x = batch
    while isinstance(x, Mapping | list | tuple) and len(x):
        x = next(iter(x.values())) if isinstance(x, Mapping) else x[0]
    if not isinstance(x, torch.Tensor) or x.shape[-1:] != (2,) or not x.is_floating_point():
        return model(torch.ones(2, 2)).mean()
    return model(x).mean()


def calls() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield the name of every call, and the call."""
    for name, (call, arguments) in CALLS.items():
        for argument in arguments:
            for text, value in WRONG.items():
                if text == "type" and argument in FUNCTIONS:
                    continue
                yield f"{name}({argument}={text})", lambda call=call, a=argument, v=value: call(**{a: v})
    for name, make in LOSSES.items():
        yield f"loss: {name}", lambda make=make: _step(loss_fn=lambda m, x: make(m(x), len(x)))
    for name, counts in COUNTS.items():
        yield (
            f"counts: {name}",
            lambda counts=counts: _step(
                loss_fn=lambda m, x: {"a": mb.Loss(sum=m(x).sum(), count=len(x))}, counts=counts
            ),
        )
    for name, batch in _batch_like():
        yield f"batch: {name}", lambda batch=batch: _step(batch=batch, loss_fn=_tolerant)
    for name, make in MADE.items():
        yield f"batch: {name}", lambda make=make: _step(batch=make(), loss_fn=_tolerant)


def raw(call: Callable[[], Any]) -> str | None:
    """Make a call, and describe its error if it is raw: neither of the library nor of the user's own function."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            call()
        except mb.MicrobatchError:
            return None
        except Exception as error:  # noqa: BLE001 - what is looked for
            frames = traceback.extract_tb(error.__traceback__)
            ours = [frame for frame in frames if frame.filename.startswith(OURS)]
            where = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "the call itself"
            return f"{type(error).__name__}: {str(error)[:90]!r} at {where}"
    return None


def run(*parts: str, some: bool = False) -> dict[str, Any]:
    """Make every call whose name contains one of the parts.

    Args:
        parts: None for every call.
        some: Make one in eight of the calls that take long.

    Returns:
        The number of calls, and the raw errors by name.
    """
    made, found = 0, dict[str, str]()
    for index, (name, call) in enumerate(calls()):
        if (parts and not any(part in name for part in parts)) or (some and index % 8 and name.startswith(SLOW)):
            continue
        made += 1
        if (told := raw(call)) is not None:
            found[name] = told
    return {"calls": made, "raw": found}


def refused(kind: Callable[[int], Any]) -> list[str]:
    """List the arguments that do not take a whole number of another type.

    Args:
        kind: Makes a number of that type.

    Returns:
        Names such as ``"cut(microbatch_size)"``.
    """
    found = list[str]()
    for name, arguments in WHOLE.items():
        for argument, value in arguments.items():
            try:
                CALLS[name][0](**{argument: kind(value)})
            except mb.MicrobatchError:
                found.append(f"{name}({argument})")
    return found


if __name__ == "__main__":
    if "--whole" in sys.argv:
        json.dump([refused(kind) for kind in (int, np.int64, np.uint32, lambda value: np.True_)], sys.stdout)
        sys.exit()
    json.dump(run(*[part for part in sys.argv[1:] if part != "--some"], some="--some" in sys.argv), sys.stdout)

"""Nested state as plain JSON beside named tensors, so that reading it back runs no code."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from microbatch.errors import CheckpointError
from microbatch.kind_words import kind_of
from microbatch.shards import local_of
from microbatch.train.sharded_tensors import with_part

_SCALARS = (bool, int, str, type(None))


def encode(node: object) -> tuple[Any, dict[str, Tensor]]:
    """Split nested state into JSON and tensors.

    Every value comes back from `decode` with its type: dict keys that are numbers, tuples, infinities, dtypes, NumPy
    arrays, 0-d tensors and all.

    Args:
        node: Nested dicts, lists and tuples of tensors, NumPy arrays, numbers, texts, bytes, dtypes and devices.

    Returns:
        A value for `json.dumps`, and the tensors that it refers to, by path.

    Raises:
        CheckpointError: Something in it is of another kind, such as a function or an object of the user's own.

    Example:
        >>> encode({0: (1, 2.5)})
        ({'$dict': [[0, {'$tuple': [1, 2.5]}]]}, {})
    """
    tensors: dict[str, Tensor] = {}
    return _encode(node, "state", tensors), tensors


def decode(node: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Put nested state together again.

    Args:
        node: What `encode` returned first, through JSON or not.
        tensors: What it returned second.

    Returns:
        The state, equal in values and types.

    Raises:
        CheckpointError: It refers to a tensor that is not there, or to a kind that this version does not know.
    """
    if isinstance(node, list):
        return [decode(item, tensors) for item in cast("list[Any]", node)]
    if not isinstance(node, dict):
        return node
    entry = cast("dict[str, Any]", node)
    if len(entry) == 1:
        kind, value = next(iter(entry.items()))
        if kind.startswith("$"):
            return _decode_marked(kind, value, tensors)
    return {key: decode(value, tensors) for key, value in entry.items()}


def _encode(node: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(node, Tensor):
        return _encode_tensor(node, path, tensors)
    if isinstance(node, float) and type(node) is float:
        return node if math.isfinite(node) else {"$float": repr(node)}
    if type(node) in _SCALARS:
        return node
    if isinstance(node, Mapping):
        items = cast("Mapping[Any, Any]", node)
        if all(type(key) is str and not key.startswith("$") for key in items):
            return {key: _encode(value, f"{path}.{key}", tensors) for key, value in items.items()}
        for key in items:
            if type(key) not in (str, int):
                raise CheckpointError(
                    f"{path} has the key {key!r}, and a checkpoint holds only texts and whole numbers"
                )
        return {"$dict": [[key, _encode(value, f"{path}.{key}", tensors)] for key, value in items.items()]}
    if isinstance(node, list | tuple):
        children = [_encode(item, f"{path}.{i}", tensors) for i, item in enumerate(cast("list[Any]", node))]
        return children if isinstance(node, list) else {"$tuple": children}
    if isinstance(node, set | frozenset):
        return {"$set": sorted(_encode(item, path, tensors) for item in cast("set[Any]", node))}
    if isinstance(node, bytes):
        return {"$bytes": node.hex()}
    if isinstance(node, torch.dtype):
        return {"$dtype": str(node).removeprefix("torch.")}
    if isinstance(node, torch.device):
        return {"$device": str(node)}
    return _encode_numpy(node, path, tensors)


def _encode_tensor(tensor: Tensor, path: str, tensors: dict[str, Tensor]) -> Any:
    if tensor.layout is not torch.strided or tensor.is_quantized:
        raise CheckpointError(f"{path} is a {tensor.layout} tensor, which a checkpoint cannot hold; make it dense")
    plain = tensor.detach()
    if path in tensors:
        # Keys may contain the dots that join a path, so two paths can read the same.
        path = f"{path}#{len(tensors)}"
    if plain.is_complex():
        tensors[path] = own(torch.view_as_real(plain.resolve_conj()))
        return {"$complex": path}
    tensors[path] = own(plain)
    return {"$tensor": path}


def own(tensor: Tensor) -> Tensor:
    """Give a tensor memory of its own on the host, as a file format without views needs it.

    Args:
        tensor: Any dense tensor.

    Returns:
        A contiguous CPU tensor that shares no memory with the argument; of one that is sharded, with this rank's part
        copied.
    """
    part = local_of(tensor.detach())
    return with_part(tensor, torch.empty(part.shape, dtype=part.dtype, device="cpu").copy_(part))


def _encode_numpy(node: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(node, numpy.ndarray) and node.dtype.kind in "biuf":
        return {"$numpy": _encode_tensor(torch.from_numpy(numpy.array(node)), path, tensors)}
    if numpy is not None and isinstance(node, numpy.generic) and node.dtype.kind in "biuf":
        return _encode(node.item(), path, tensors)
    raise CheckpointError(
        f"{path} is {kind_of(node)}, and a checkpoint holds only tensors, numbers and texts, so that reading "
        "one never runs code. Leave it out of the state_dict that returns it"
    )


def _decode_marked(kind: str, value: Any, tensors: Mapping[str, Tensor]) -> Any:
    match kind:
        case "$tensor" | "$complex":
            if value not in tensors:
                raise CheckpointError(f"the tensor {value!a} is missing from the checkpoint")
            return tensors[value] if kind == "$tensor" else torch.view_as_complex(tensors[value])
        case "$numpy":
            return decode(value, tensors).numpy()
        case "$dict":
            return {key: decode(item, tensors) for key, item in value}
        case "$tuple":
            return tuple(decode(item, tensors) for item in value)
        case "$set":
            return {decode(item, tensors) for item in value}
        case "$float":
            return float(value)
        case "$bytes":
            return bytes.fromhex(value)
        case "$dtype":
            dtype = getattr(torch, value)
            if not isinstance(dtype, torch.dtype):
                raise CheckpointError(f"{value!a} is not a dtype")
            return dtype
        case "$device":
            return torch.device(value)
        case _:
            raise CheckpointError(
                f"the checkpoint holds a {kind!a}, which this version does not know; upgrade to read it"
            )

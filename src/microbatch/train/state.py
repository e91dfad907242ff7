"""Everything that decides what a run computes next: captured for a checkpoint, put back from one."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from microbatch.devices.backend import random_state, set_random_state
from microbatch.errors import CheckpointError
from microbatch.shards import is_shard
from microbatch.train.sharded_tensors import dealt


def optimizers_of(optimizer: Optimizer | Sequence[Optimizer]) -> list[Optimizer]:
    """List a job's optimizers.

    Args:
        optimizer: One, or several.

    Returns:
        All of them.
    """
    return [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)


@contextmanager
def same_bits(device: torch.device, *, wanted: bool) -> Generator[None]:
    """Let operators give the same bits every time, while the block runs.

    On the CPU that takes one thread, as launchers give to each of several ranks: a sum's order depends on how many
    share it.

    Args:
        device: Where the model is.
        wanted: Whether to do anything.

    Yields:
        Nothing.
    """
    if not wanted:
        yield
        return
    before, threads = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    # cuBLAS reads it when it is first used.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.set_num_threads(threads)


def random_states(device: torch.device) -> dict[str, Any]:
    """Read the state of every global generator, as plain values and tensors.

    Args:
        device: The device whose generator is read beside the CPU's.

    Returns:
        States by generator, for `set_random_states`.
    """
    states: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if (on_device := random_state(device)) is not None:
        states[device.type] = on_device
    if "numpy" in sys.modules:
        kind, keys, *rest = sys.modules["numpy"].random.get_state()
        states["numpy"] = (kind, [int(key) for key in keys], *rest)
    return states


def set_random_states(states: Mapping[str, Any], device: torch.device) -> None:
    """Put every global generator back.

    Args:
        states: What `random_states` returned. A generator that this device has not is left alone.
        device: The device whose generator is set beside the CPU's.
    """
    random.setstate(states["python"])
    torch.set_rng_state(states["torch"])
    if device.type in states:
        set_random_state(device, states[device.type])
    if "numpy" in states and "numpy" in sys.modules:
        sys.modules["numpy"].random.set_state(states["numpy"])


def model_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """List everything that a model holds.

    Args:
        model: Any module.

    Returns:
        Its parameters and all its buffers by name, those that its ``state_dict`` leaves out among them; and its extra
        state, which is not tensors.
    """
    saved = model.state_dict()
    tensors = {name: value for name, value in saved.items() if isinstance(value, Tensor)}
    extra = {name: value for name, value in saved.items() if not isinstance(value, Tensor)}
    for name, buffer in model.named_buffers(remove_duplicate=False):
        tensors.setdefault(name, buffer)
    return tensors, extra


@torch.no_grad()
def load_model(model: nn.Module, weights: Mapping[str, Tensor], extra: Mapping[str, Any]) -> None:
    """Put a model's parameters, buffers and extra state back, in place.

    Args:
        model: A module of the same structure.
        weights: What `model_tensors` returned first; on any device.
        extra: What it returned second.

    Raises:
        CheckpointError: Names or shapes differ, so the checkpoint is another model's.
    """
    now, extra_now = model_tensors(model)
    missing, unknown = sorted(set(now) - set(weights)), sorted(set(weights) - set(now))
    shapes = [name for name in now if name in weights and now[name].shape != weights[name].shape]
    if missing or unknown or shapes:
        parts = [("missing", missing), ("unknown", unknown), ("of another shape", shapes)]
        found = "; ".join(f"{what}: {', '.join(names[:3])}" for what, names in parts if names)
        raise CheckpointError(f"the checkpoint belongs to another model than the one that the job creates ({found})")
    state_names = set(model.state_dict()) - set(extra_now)
    model.load_state_dict({name: dealt(weights[name], like=now[name]) for name in state_names} | dict(extra))
    for name, tensor in now.items():
        if name not in state_names:
            tensor.copy_(dealt(weights[name], like=tensor))


def load_optimizer(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Put an optimizer's state back with the dtypes that it had.

    ``load_state_dict`` casts every floating state to its parameter's dtype, which would round the fp32 moments of a
    bf16 parameter, so those values are set once more as they were saved.

    Args:
        optimizer: An optimizer over the same parameters.
        state: What its ``state_dict`` returned; tensors on any device.

    Raises:
        CheckpointError: It has other parameter groups.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = _dealt(state, parameters)
    try:
        optimizer.load_state_dict(cast("dict[str, Any]", state))
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"the checkpoint's optimizer is not the job's: {error}") from error
    saved = cast("Mapping[Any, Any]", state.get("state", {}))
    for index, values in saved.items():
        if not isinstance(index, int) or index >= len(parameters) or not isinstance(values, Mapping):
            continue
        loaded = optimizer.state.get(parameters[index], {})
        for key, value in cast("Mapping[str, Any]", values).items():
            found = loaded.get(key)
            if isinstance(value, Tensor) and isinstance(found, Tensor) and found.dtype != value.dtype:
                loaded[key] = value.to(found.device, copy=True)


def _dealt(state: Mapping[str, Any], parameters: Sequence[Tensor]) -> Mapping[str, Any]:
    """Deal the states of parameters that are spread over ranks out as these are."""
    if not any(is_shard(parameter) for parameter in parameters):
        return state
    by_index = {
        index: {
            key: dealt(value, like=parameters[index])
            if isinstance(value, Tensor) and value.shape == parameters[index].shape
            else value
            for key, value in cast("Mapping[str, Any]", values).items()
        }
        for index, values in cast("Mapping[int, Any]", state["state"]).items()
    }
    return {**state, "state": by_index}

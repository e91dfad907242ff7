"""Layers that need no batch, or a batch over all ranks, in the place of batch normalisation."""

from __future__ import annotations

from math import gcd

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]

from microbatch.errors import ConfigError

_KINDS = ("group", "layer", "sync")


def convert_batch_norm(model: nn.Module, *, to: str, groups: int = 32) -> nn.Module:
    """Replace every batch normalisation of a model by a layer that microbatches do not change, or that ranks share.

    Weights and biases are taken over, as the same parameters, so an optimizer over them stays right. Running statistics
    are not: the other layers have none, and a model that was trained with them has to be trained on.

    Args:
        model: The model; its layers are replaced in place.
        to: ``"group"`` for `torch.nn.GroupNorm`, ``"layer"`` for one group, which is a layer normalisation with a
            weight for each channel, ``"sync"`` for `torch.nn.SyncBatchNorm`, which ranks share and microbatches do not.
        groups: Groups of a GroupNorm at most; a layer whose channels they do not divide has as many as do.

    Returns:
        The model, or what takes its place where it is such a layer itself.

    Raises:
        ConfigError: ``to`` is none of these, or ``groups`` is below 1.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 24, 3), nn.BatchNorm2d(24))
        >>> convert_batch_norm(model, to="group", groups=32)[1]
        GroupNorm(8, 24, eps=1e-05, affine=True...

    Source:
        Wu and He, Group Normalization, 2018 (32 groups).
    """
    if to not in _KINDS:
        raise ConfigError(f"to must be one of {', '.join(map(repr, _KINDS))}, not {to!r}")
    if groups < 1:
        raise ConfigError(f"groups must be at least 1, not {groups}")
    if to == "sync":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return _converted(model, 1 if to == "layer" else groups, {})


def _converted(module: nn.Module, groups: int, made: dict[nn.Module, nn.Module]) -> nn.Module:
    if module not in made:
        made[module] = _group_norm(module, groups) if isinstance(module, _BatchNorm) else module
        for name, child in list(module._modules.items()):  # pyright: ignore[reportPrivateUsage] # also a layer that is there twice
            if child is not None:
                setattr(module, name, _converted(child, groups, made))
    return made[module]


def _group_norm(layer: _BatchNorm, groups: int) -> nn.GroupNorm:
    channels = layer.num_features
    found = nn.GroupNorm(gcd(channels, groups), channels, eps=layer.eps, affine=layer.affine)
    found.weight, found.bias = layer.weight, layer.bias
    found.training = layer.training
    return found

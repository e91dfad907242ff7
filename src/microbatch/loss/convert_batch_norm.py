"""Replace batch normalisation by layers that need no batch, or whose batch is spread over all ranks."""

from __future__ import annotations

from math import gcd

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]

from microbatch.arguments import check_one_of, check_whole
from microbatch.errors import ConfigError
from microbatch.kind_words import kind_of

_KINDS = ("group", "layer", "sync")


def convert_batch_norm(model: nn.Module, *, to: str, groups: int = 32) -> nn.Module:
    """Replace every batch normalisation of a model by group normalisation, layer normalisation or SyncBatchNorm.

    Group and layer normalisation do not depend on the microbatch. The new layers get the same weight and bias
    parameters, so an existing optimizer stays valid. Running statistics are dropped by group and layer normalisation,
    which have none. A model that was trained with batch normalisation has to be trained further.

    Args:
        model: The model; its layers are replaced in place.
        to: ``"group"`` for `torch.nn.GroupNorm`. ``"layer"`` for a GroupNorm of one group, which is a layer
            normalisation with one weight per channel. ``"sync"`` for `torch.nn.SyncBatchNorm`, whose statistics are
            over the ranks, but not over the microbatches.
        groups: Most groups of a GroupNorm; at least 1. A layer has the greatest common divisor of ``groups`` and its
            number of channels.

    Returns:
        The model, or the new layer if the model itself is a batch normalisation.

    Raises:
        ConfigError: ``to`` is none of the three names, or ``groups`` is below 1.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 24, 3), nn.BatchNorm2d(24))
        >>> convert_batch_norm(model, to="group", groups=32)[1]
        GroupNorm(8, 24, eps=1e-05, affine=True...

    Source:
        Wu and He, Group Normalization, 2018 (32 groups).
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model must be a torch.nn.Module, not {kind_of(model)}")
    check_one_of("to", to, _KINDS)
    most = check_whole("groups", groups, least=1)
    if to == "sync":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return _convert(model, 1 if to == "layer" else most, {})


def _convert(module: nn.Module, groups: int, converted: dict[nn.Module, nn.Module]) -> nn.Module:
    if module not in converted:
        converted[module] = _group_norm(module, groups) if isinstance(module, _BatchNorm) else module
        # Not named_children, which skips a layer that occurs twice in a module.
        for name, child in list(module._modules.items()):  # pyright: ignore[reportPrivateUsage]
            if child is not None:
                setattr(module, name, _convert(child, groups, converted))
    return converted[module]


def _group_norm(layer: _BatchNorm, groups: int) -> nn.GroupNorm:
    channels = layer.num_features
    group_norm = nn.GroupNorm(gcd(channels, groups), channels, eps=layer.eps, affine=layer.affine)
    group_norm.weight, group_norm.bias = layer.weight, layer.bias
    group_norm.training = layer.training
    return group_norm

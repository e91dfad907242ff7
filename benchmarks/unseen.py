"""Models that were not looked at while the prediction was made: added at the end, and left as they came out."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.zoo import CLASSES, VOCABULARY, Kind, classify, images, next_token, tokens

TAGS = 17


class Tagger(nn.Module):
    """A tag for each word: two layers of GRU, both ways."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY // 4, 64)
        self.layers = nn.GRU(64, 96, num_layers=2, batch_first=True, bidirectional=True, dropout=0.1)
        self.head = nn.Linear(192, TAGS)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the scores of every tag."""
        return self.head(self.layers(self.words(ids))[0])


class Excited(nn.Module):
    """MobileNetV3's block: widen, a strided convolution of each channel alone, weigh the channels, narrow."""

    def __init__(self, before: int, after: int, *, stride: int) -> None:
        super().__init__()
        inner = 3 * before
        self.wide = nn.Sequential(
            nn.Conv2d(before, inner, 1, bias=False),
            nn.BatchNorm2d(inner),
            nn.Hardswish(),
            nn.Conv2d(inner, inner, 5, stride, 2, groups=inner, bias=False),
            nn.BatchNorm2d(inner),
            nn.Hardswish(),
        )
        self.weigh = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(inner, inner // 4, 1), nn.ReLU(), nn.Conv2d(inner // 4, inner, 1)
        )
        self.narrow = nn.Sequential(nn.Conv2d(inner, after, 1, bias=False), nn.BatchNorm2d(after))
        self.kept = before == after and stride == 1

    def forward(self, x: Tensor) -> Tensor:
        """Return the features, half as many each way where there is a stride."""
        wide = self.wide(x)
        found = self.narrow(wide * F.hardsigmoid(self.weigh(wide)))
        return x + found if self.kept else found


def mobilenet_v3() -> nn.Module:
    """Make a small network of MobileNetV3's form."""
    stem = nn.Sequential(nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16), nn.Hardswish())
    widths = [16, 16, 24, 24, 40]
    blocks = [Excited(a, b, stride=1 if a == b else 2) for a, b in pairwise(widths)]
    return nn.Sequential(stem, nn.Sequential(*blocks), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(40, CLASSES))


class Translator(nn.Module):
    """torch's own transformer, with an encoder and a decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY // 2, 128)
        self.core = nn.Transformer(
            d_model=128, nhead=4, num_encoder_layers=2, num_decoder_layers=2, dim_feedforward=384, batch_first=True
        )
        self.head = nn.Linear(128, VOCABULARY // 2)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Return the logits of every next token of the target."""
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        found = self.core(self.words(source), self.words(target), tgt_mask=mask, tgt_is_causal=True)
        return self.head(found)


class Experts(nn.Module):
    """Perceptrons of which each token goes through the two that it scores highest."""

    def __init__(self, width: int, *, experts: int) -> None:
        super().__init__()
        self.score = nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(
            [nn.Sequential(nn.Linear(width, 3 * width), nn.GELU(), nn.Linear(3 * width, width)) for _ in range(experts)]
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return what the chosen experts say, weighed."""
        flat = x.flatten(0, 1)
        weights, chosen = self.score(flat).softmax(-1).topk(2, dim=-1)
        found = torch.zeros_like(flat)
        for index, expert in enumerate(self.experts):
            rows, slot = torch.where(chosen == index)
            found = found.index_add(0, rows, (expert(flat[rows]) * weights[rows, slot, None]).to(found.dtype))
        return found.view_as(x)


class ExpertBlock(nn.Module):
    """Causal attention, then experts."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.RMSNorm(width), nn.RMSNorm(width)])
        self.inner, self.outer = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.experts = Experts(width, experts=4)

    def forward(self, x: Tensor) -> Tensor:
        """Return the stream with what both found added."""
        heads = [each.unflatten(2, (4, -1)).transpose(1, 2) for each in self.inner(self.norms[0](x)).chunk(3, dim=-1)]
        found = F.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.outer(found.transpose(1, 2).flatten(2))
        return x + self.experts(self.norms[1](x))


def mixture() -> nn.Module:
    """Make a small decoder whose tokens choose their experts."""
    return nn.Sequential(
        nn.Embedding(VOCABULARY // 2, 96), ExpertBlock(96), ExpertBlock(96), nn.Linear(96, VOCABULARY // 2)
    )


# -- losses and batches -----------------------------------------------------------------------------------------------


def tag(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return the mean cross-entropy of every word's tag."""
    return F.cross_entropy(model(batch["ids"]).flatten(0, 1), batch["tags"].flatten())


def from_source(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return the mean cross-entropy of the target's every next token."""
    target = batch["target"]
    return F.cross_entropy(model(batch["source"], target[:, :-1]).flatten(0, 1), target[:, 1:].flatten())


def tagged(rows: int) -> dict[str, Tensor]:
    """Return words with their tags."""
    return {**tokens(rows, length=48, vocabulary=VOCABULARY // 4), "tags": torch.randint(TAGS, (rows, 48))}


def sentences(rows: int) -> dict[str, Tensor]:
    """Return sentences of two languages."""
    source, target = (tokens(rows, length=length, vocabulary=VOCABULARY // 2)["ids"] for length in (56, 41))
    return {"source": source, "target": target}


HELD_OUT = {
    "GRU tagger": Kind(Tagger, tagged, tag, ["layers"]),
    "MobileNetV3": Kind(mobilenet_v3, lambda rows: images(rows, size=64), classify, [f"1.{i}" for i in range(4)]),
    "encoder-decoder": Kind(
        Translator,
        sentences,
        from_source,
        [f"core.{part}.layers.{i}" for part in ("encoder", "decoder") for i in range(2)],
    ),
    "experts": Kind(mixture, lambda rows: tokens(rows, vocabulary=VOCABULARY // 2), next_token, ["1", "2"]),
}

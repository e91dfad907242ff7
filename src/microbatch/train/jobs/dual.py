"""A small dual encoder: two texts that belong together come to lie near one another.

Shapes are name suffixes: B rows, T tokens of a row, C channels, D numbers of a representation.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from microbatch.train.jobs.vocabulary import BOUNDARY


class DualEncoder(nn.Module):
    """Two towers over one table of tokens, and how sharply their similarities tell.

    Rows are independent of one another, and of the padding on their right.

    Args:
        vocabulary: Number of different tokens.
        channels: Width of the towers.
        width: Numbers of a representation.

    Example:
        >>> model = DualEncoder(vocabulary=50, channels=8, width=4)
        >>> model.anchor(torch.tensor([[1, 2, 0], [3, 4, 5]])).norm(dim=1).allclose(torch.ones(2))
        True
    """

    def __init__(self, *, vocabulary: int, channels: int = 256, width: int = 128) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, channels)
        nn.init.normal_(self.tokens.weight, std=0.1)
        self.anchors = Tower(channels, width)
        self.positives = Tower(channels, width)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, anchor_BT: Tensor, positive_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Represent both texts of every pair.

        Args:
            anchor_BT: As for `anchor`.
            positive_BT: As for `positive`.

        Returns:
            What these return.
        """
        return self.anchor(anchor_BT), self.positive(positive_BT)

    def anchor(self, tokens_BT: Tensor) -> Tensor:
        """Represent what is looked for by.

        Args:
            tokens_BT: Token numbers, padded on the right; shape ``(B, T)``, int64.

        Returns:
            Of length 1; shape ``(B, D)``.
        """
        return self._represent(self.anchors, tokens_BT)

    def positive(self, tokens_BT: Tensor) -> Tensor:
        """Represent what is to be found.

        Args:
            tokens_BT: Token numbers, padded on the right; shape ``(B, T)``, int64.

        Returns:
            Of length 1; shape ``(B, D)``.
        """
        return self._represent(self.positives, tokens_BT)

    def _represent(self, tower: nn.Module, tokens_BT: Tensor) -> Tensor:
        return F.normalize(tower(self.tokens(tokens_BT), tokens_BT != BOUNDARY), dim=-1)


class Tower(nn.Module):
    """Weigh the tokens of a row, add them up, and compute on the sum.

    Args:
        channels: Width of what comes in.
        width: Numbers of a representation.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Linear(channels, 1, bias=False)
        self.norm = nn.RMSNorm(channels)
        self.up = nn.Linear(channels, 4 * channels, bias=False)
        self.down = nn.Linear(4 * channels, channels, bias=False)
        self.out = nn.Linear(channels, width, bias=False)
        nn.init.zeros_(self.down.weight)

    def forward(self, stream_BTC: Tensor, mask_BT: Tensor) -> Tensor:
        """Represent every row.

        Args:
            stream_BTC: Shape ``(B, T, C)``.
            mask_BT: Whether there is a token; shape ``(B, T)``, bool, at least one of each row.

        Returns:
            Shape ``(B, D)``.
        """
        share_BT1 = self.weight(stream_BTC).masked_fill(~mask_BT.unsqueeze(-1), -math.inf).softmax(dim=1)
        sum_BC = self.norm((share_BT1 * stream_BTC).sum(dim=1))
        return self.out(sum_BC + self.down(F.gelu(self.up(sum_BC))))

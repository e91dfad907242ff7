"""Gradients to the last bit the same on any number of ranks: virtual microbatches, each with a seed and a place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from microbatch.batch.batch_tree import map_tensors
from microbatch.batch.random_masks import derive
from microbatch.errors import WindowError
from microbatch.gradients.gradient_sum import GradientSum
from microbatch.gradients.sum_tree import Node, Tree, shape_of, total
from microbatch.loss.tally import Tally
from microbatch.ranks.agreement import attend
from microbatch.ranks.process_group import Ranks
from microbatch.ranks.reduce import BUCKET_BYTES
from microbatch.step.saved_state import RandomState, seed_everything


class Canonical:
    """Run a window's microbatches so that it does not matter which rank runs which.

    The effective batch is cut into virtual microbatches of a fixed number of rows, numbered over all ranks. Each goes
    through the model by itself, with random numbers that are a function of the step and its number; and its gradient,
    its loss and its count are added up in an order that is a matter of its number alone.

    Args:
        seed: Of the window; over several ranks the first one's counts.
        size: Rows of a virtual microbatch; the effective batch's last one may have fewer.
        ranks: Who else holds a share of the batch.
        gradients: The window's.
        device: Where the model is.

    Source:
        Law R1, bit for bit.
    """

    def __init__(
        self, seed: int, *, size: int, ranks: Ranks | None, gradients: GradientSum, device: torch.device
    ) -> None:
        self._seed, self._size, self._ranks, self._gradients = seed, size, ranks, gradients
        self._before = RandomState(device)
        self._first = 0
        self._counts: list[int] = []
        self._tree = Tree(0)

    def expect(self, rows: int, *, parameters: int, begun: bool) -> int:
        """Learn where this rank's rows begin in the effective batch.

        Args:
            rows: Of this rank's share.
            parameters: How many gradients the window has.
            begun: Whether the window has had rows before.

        Returns:
            Rows of the effective batch.

        Raises:
            WindowError: It has, or a share ends in the midst of a virtual microbatch.
            RankError: Another rank failed.

        Cost:
            Over several ranks two small all-reduces.
        """
        if begun:
            raise WindowError("deterministic=True numbers the rows of a batch once; call window.split once")
        shares = [rows]
        if self._ranks is not None:
            self._seed, shares = numbered(self._ranks, rows, seed=self._seed, parameters=parameters)
        last = max((index for index, share in enumerate(shares) if share), default=0)
        if any(share % self._size for share in shares[:last]):
            raise WindowError(
                f"deterministic=True keeps virtual microbatches of {self._size} rows whole, and the ranks' shares are "
                f"{shares}: give every rank but the last a multiple of {self._size} rows"
            )
        self._counts = [-(-share // self._size) for share in shares]
        self._first = 0 if self._ranks is None else sum(self._counts[: self._ranks.index])
        self._tree = Tree(self._first)
        return sum(shares)

    def shown(self, microbatches: Iterable[tuple[int, Any]]) -> Iterator[tuple[int, Any]]:
        """Seed before each microbatch, and put its gradient into the tree after it.

        Args:
            microbatches: Each with its rows.

        Yields:
            The same.
        """
        for number, (rows, microbatch) in enumerate(microbatches, start=self._first):
            seed_everything(derive(self._seed, number))
            # In memory of its own, which begins where all memory does: products round by where a row stands, too.
            yield rows, map_tensors(torch.clone, microbatch)
            self._tree.add(self._gradients.take())

    def check(self) -> None:
        """See to it that everything is in the tree, while the other ranks can still be told that it is not.

        Raises:
            WindowError: A backward ran whose microbatch the window did not hand out.
        """
        if any(self._gradients.present):
            raise WindowError("deterministic=True adds up what window.split hands out, and nothing else")

    @property
    def present(self) -> list[bool]:
        """Which parameters have a gradient on this rank."""
        columns = [node.tensors for node in self._tree.nodes]
        number = len(columns[0]) if columns else len(self._gradients.named)
        return [any(column[index] is not None for column in columns) for index in range(number)]

    def finish(self, present: Sequence[bool]) -> None:
        """Bring the trees of all ranks together, and give the sum to the window's gradients.

        Args:
            present: For each parameter, whether any rank has a gradient for it.

        Cost:
            Over several ranks one all-gather of the gradients, and one more for each further node of a share that is
            no whole subtree.
        """
        self._before.restore()
        nodes = self._tree.nodes
        if self._ranks is None:
            self._gradients.give(total(nodes))
            return
        wanted = [index for index, there in enumerate(present) if there]
        found: list[Tensor | None] = [None] * len(present)
        for bucket in self._buckets(wanted):
            for index, tensor in zip(bucket, self._gathered(self._ranks, bucket, nodes), strict=True):
                found[index] = tensor
        self._gradients.give(found)

    def sums(self, tally: Tally, names: Sequence[str]) -> tuple[list[float], list[float]]:
        """Add up the losses and counts of all virtual microbatches, in their order.

        Args:
            tally: This rank's.
            names: The terms, the same on every rank.

        Returns:
            Sums and counts, by term.
        """
        table = torch.zeros(sum(self._counts), len(names), 2, dtype=torch.float64)
        for column, name in enumerate(names):
            for index, loss, count in tally.parts(name):
                # One row for each, which all other ranks leave at zero: nothing is rounded.
                table[self._first + index, column] += torch.tensor([loss, count], dtype=torch.float64)
        if self._ranks is not None:
            table = table.to(self._ranks.device)
            self._ranks.sum_(table)
        rows = table.tolist()
        sums, counts = ([sum((row[c][k] for row in rows), 0.0) for c in range(len(names))] for k in range(2))
        return sums, counts

    def factor(self, own: float) -> float:
        """Take over what the gradients have to be multiplied with, where this rank ran nothing itself.

        Args:
            own: This rank's; 0 where it does not know.

        Returns:
            Everybody's.
        """
        if self._ranks is None:
            return own
        told = self._ranks.gather(torch.tensor([own], dtype=torch.float64, device=self._ranks.device))
        return max(float(each) for each in told)

    def _gathered(self, ranks: Ranks, bucket: Sequence[int], own: Sequence[Node]) -> list[Tensor]:
        """Add up some parameters over all ranks."""
        like = [self._gradients.zeros(index) for index in bucket]
        starts = [sum(self._counts[:rank]) for rank in range(ranks.size)]
        shapes = [shape_of(start, count) for start, count in zip(starts, self._counts, strict=True)]
        nodes: list[list[Node]] = [[] for _ in shapes]
        for place in range(max(map(len, shapes))):
            here = own[place].tensors if place < len(own) else [None] * (max(bucket) + 1)
            parts = [here[index] for index in bucket]
            flat = torch.cat([(z if p is None else p).reshape(-1) for p, z in zip(parts, like, strict=True)])
            for rank, given in enumerate(ranks.gather(flat)):
                if place < len(shapes[rank]):
                    nodes[rank].append(Node(*shapes[rank][place], [given]))
        (flat,) = total(node for each in nodes for node in each)
        assert flat is not None  # noqa: S101 - every rank gave numbers
        pieces = flat.split([each.numel() for each in like])
        return [piece.view(each.shape) for piece, each in zip(pieces, like, strict=True)]

    def _buckets(self, wanted: Sequence[int]) -> Iterator[list[int]]:
        held: list[int] = []
        size, dtype = 0, None
        for index in wanted:
            like = self._gradients.zeros(index)
            if held and (size >= BUCKET_BYTES or like.dtype != dtype):
                yield held
                held, size = [], 0
            held.append(index)
            size, dtype = size + like.nbytes, like.dtype
        if held:
            yield held


def numbered(ranks: Ranks, rows: int, *, seed: int, parameters: int) -> tuple[int, list[int]]:
    """Agree on how many rows each rank has, and on the first one's seed.

    Args:
        ranks: The ranks.
        rows: This one's.
        seed: Likewise.
        parameters: How many gradients the window has; the ranks must agree on it.

    Returns:
        The seed, and every rank's rows.

    Raises:
        RankError: Another rank failed.

    Cost:
        Two small all-reduces.
    """
    attend(ranks, rows, parameters=parameters)
    told = torch.zeros(ranks.size + 1, dtype=torch.int64, device=ranks.device)
    told[ranks.index] = rows
    if ranks.index == 0:
        told[-1] = seed
    ranks.sum_(told)
    *shares, seed = told.tolist()
    return seed, shares

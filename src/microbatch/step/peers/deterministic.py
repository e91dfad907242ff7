"""Bitwise identical results on any number of ranks: each microbatch has a number, a seed, and a place in a sum tree."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from microbatch.batch.batch_tree import map_tensors, rows_of
from microbatch.batch.batches import Batches
from microbatch.batch.random_masks import derive
from microbatch.errors import WindowError
from microbatch.gradients.sum_tree import Node, Tree, shape_of, total
from microbatch.ranks.agreement import Message
from microbatch.ranks.process_group import RankGroup
from microbatch.ranks.reduce import BUCKET_BYTES
from microbatch.step.cutting import Cutting
from microbatch.step.met import Met
from microbatch.step.part import Begin, OpenWindow, Pass
from microbatch.step.peers.data_parallel import DataParallel
from microbatch.step.saved_state import RandomState, seed_everything


class Deterministic(DataParallel):
    """Run a window's microbatches so that the result does not depend on the number of ranks (also 1).

    The effective batch is cut into microbatches of a fixed number of rows, numbered over all ranks. A microbatch's
    random numbers depend only on the step and its number. Gradients, losses and counts are added up in an order that
    depends only on these numbers.

    Source:
        Law R1, bit for bit.
    """

    repeatable = False  # another microbatch size would change bits

    def prepare(self, window: OpenWindow) -> None:
        """Find the ranks, and save the random state."""
        super().prepare(window)
        self._before = RandomState(window.device)
        self._counts: list[int] = []
        self._tree, self._first = Tree(0), 0
        self._seed = 0

    def cut(self, window: OpenWindow, batch: object, cutting: Cutting) -> None:
        """Number the microbatches over all ranks."""
        if window.done:
            raise WindowError("Ranks(deterministic=True) numbers the rows of a batch once; call window.split once")
        if isinstance(batch, Batches):
            raise WindowError(
                "Ranks(deterministic=True) numbers the rows of one batch, and mb.Batches has several; pad them"
            )
        size = cutting.size
        self._seed, shares = self.number_rows(window, rows_of(batch))
        last = max((index for index, share in enumerate(shares) if share), default=0)
        if any(share % size for share in shares[:last]):
            raise WindowError(
                f"Ranks(deterministic=True) keeps virtual microbatches of {size} rows whole, and the ranks' shares are "
                f"{shares}: give every rank but the last a multiple of {size} rows"
            )
        self._counts = [-(-share // size) for share in shares]
        self._first = sum(self._counts[: self.index])
        self._tree = Tree(self._first)
        window.denominator.share(sum(shares))

    def passes(self, window: OpenWindow, begin: Begin, *, again: bool, graph: bool) -> Iterator[Pass]:
        """Yield this rank's passes; each microbatch is copied, because products also round by memory alignment."""
        del window, again, graph
        for index, (rows, microbatch) in enumerate(begin()):
            yield Pass(rows, map_tensors(torch.clone, microbatch), index)

    @contextmanager
    def around(self, window: OpenWindow, p: Pass) -> Generator[None]:
        """Seed before a microbatch, and add its gradient to the tree after it."""
        seed_everything(derive(self._seed, self._first + p.index))
        yield
        self._tree.add(window.gradients.take())

    def check(self, window: OpenWindow) -> None:
        """Raise an error for gradients of microbatches that the window did not hand out."""
        super().check(window)
        if any(window.gradients.present):
            raise WindowError("Ranks(deterministic=True) adds up what window.split hands out, and nothing else")

    def meet(self, window: OpenWindow) -> Met:
        """Combine the trees of all ranks, so that results are bitwise identical for any world size."""
        denominator, message = window.denominator, self.message(window, sum(window.done))
        self._waited = False
        agreed = self.agree(window, message)
        sums, counts = self._sums(window, agreed.names)
        named = dict(zip(agreed.names, counts, strict=True))
        factor = self._factor(denominator.factor(named) if denominator.contributed and any(counts) else 0.0)
        self._before.restore()
        self._add_up(window, agreed.present)
        window.gradients.scale_(factor)
        return self.met(window, agreed, sums, named)

    def agree(self, window: OpenWindow, message: Message | None) -> Message:
        """Add up the messages of the ranks; a single process sorts its terms as several ranks would."""
        if self.ranks is not None or message is None:
            return super().agree(window, message)
        return replace(message, names=sorted(window.denominator.names), sums=(), counts=())

    def present(self, window: OpenWindow) -> list[bool]:
        """Return for each parameter whether this rank has a gradient."""
        columns = [node.tensors for node in self._tree.nodes]
        number = len(columns[0]) if columns else len(window.gradients.named)
        return [any(column[index] is not None for column in columns) for index in range(number)]

    def _sums(self, window: OpenWindow, names: Sequence[str]) -> tuple[list[float], list[float]]:
        """Add up the losses and counts of all microbatches by term, in the order of their numbers."""
        table = torch.zeros(sum(self._counts), len(names), 2, dtype=torch.float64)
        for column, name in enumerate(names):
            for index, loss, count in window.denominator.per_microbatch(name):
                # Each microbatch has one row, which is zero on all other ranks, so the sum rounds nothing.
                table[self._first + index, column] += torch.tensor([loss, count], dtype=torch.float64)
        if self.ranks is not None:
            table = table.to(self.ranks.device)
            self.ranks.sum_(table)
        rows = table.tolist()
        sums, counts = ([sum((row[c][k] for row in rows), 0.0) for c in range(len(names))] for k in range(2))
        return sums, counts

    def _factor(self, own: float) -> float:
        """Return the factor of the ranks that know it; a rank without microbatches sends 0."""
        if self.ranks is None:
            return own
        told = self.ranks.gather(torch.tensor([own], dtype=torch.float64, device=self.ranks.device))
        return max(float(each) for each in told)

    def _add_up(self, window: OpenWindow, present: Sequence[bool]) -> None:
        """Add up all trees, and set the window's gradients to the sum."""
        nodes = self._tree.nodes
        if self.ranks is None:
            window.gradients.give(total(nodes))
            return
        wanted = [index for index, there in enumerate(present) if there]
        found: list[Tensor | None] = [None] * len(present)
        for bucket in self._buckets(window, wanted):
            tensors = self._gathered(self.ranks, [window.gradients.zeros(index) for index in bucket], bucket)
            for index, tensor in zip(bucket, tensors, strict=True):
                found[index] = tensor
        window.gradients.give(found)

    def _gathered(self, ranks: RankGroup, like: Sequence[Tensor], bucket: Sequence[int]) -> list[Tensor]:
        """Add up the gradients of some parameters over all ranks, with one all-gather for each node of a share."""
        own = self._tree.nodes
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

    def _buckets(self, window: OpenWindow, wanted: Sequence[int]) -> Iterator[list[int]]:
        held: list[int] = []
        size, dtype = 0, None
        for index in wanted:
            like = window.gradients.zeros(index)
            if held and (size >= BUCKET_BYTES or like.dtype != dtype):
                yield held
                held, size = [], 0
            held.append(index)
            size, dtype = size + like.nbytes, like.dtype
        if held:
            yield held

"""Which pictures a process takes in which step, and in which form: everything follows from the job's seed.

Why batches run on from one epoch into the next: every step then has the same number of pictures, on any number of
processes, and none is left out.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from gnswap._datasets import Pictures, Views
from gnswap._finetuning import Job
from gnswap._running import ROWS


def seed_of(job: Job, purpose: str, *numbers: int) -> int:
    """The seed of one draw of random numbers."""
    return zlib.crc32(f"{job.seed} {purpose} {' '.join(map(str, numbers))}".encode())


class Batches:
    """The batches of one process among several.

    Args:
        pictures: what there is.
        job: what is done with them.
        rank, count: which process this is, of how many.
        accumulation: parts of its share of a batch.
        workers: processes that prepare pictures.
        pinned: whether the tensors are to be copied to a GPU.
    """

    def __init__(
        self, pictures: Pictures, job: Job, rank: int, count: int, accumulation: int, workers: int, pinned: bool
    ) -> None:
        self.pictures, self.job, self.rank, self.count = pictures, job, rank, count
        self.accumulation, self.workers, self.pinned = accumulation, workers, pinned
        self._training = Views(pictures.train, job.input, job.augment, job.seed)
        self._judging = Views(pictures.val, job.input, "none", job.seed)
        self._known: tuple[int, list[int]] | None = None

    def rows(self, step: int) -> list[tuple[int, int]]:
        """The pictures of a step of all processes together, as (epoch, place)."""
        count, first = len(self.pictures.train), step * self.job.batch
        return [(at // count, self._order(at // count)[at % count]) for at in range(first, first + self.job.batch)]

    def training(self, first: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's parts of the batches from step `first` on: inputs `[N, C, H, W]`, labels int64 `[N]`."""
        size, own = self.job.batch_size, self.rank * self.accumulation
        parts = (
            self.rows(step)[(own + part) * size :][:size]
            for step in range(first, steps)
            for part in range(self.accumulation)
        )
        return self._loaded(self._training, parts)

    def judging(self) -> Iterator[tuple[Tensor, Tensor, int]]:
        """This process's share of the validation pictures, and how many of each part count.

        All processes have as many parts of the same size, since a sharded network runs on all of them at once; what
        fills them up does not count.
        """
        count = len(self.pictures.val)
        own = range(self.rank, count, self.count)
        share = -(-count // self.count)
        places = [*own, *[0] * (share - len(own))]
        parts = [[(0, place) for place in places[at : at + ROWS]] for at in range(0, share, ROWS)]
        left = len(own)
        for x, labels in self._loaded(self._judging, parts):
            yield x, labels, min(left, len(x))
            left -= min(left, len(x))

    def _order(self, epoch: int) -> list[int]:
        if self._known is None or self._known[0] != epoch:
            generator = torch.Generator().manual_seed(seed_of(self.job, "order", epoch))
            self._known = epoch, torch.randperm(len(self.pictures.train), generator=generator).tolist()
        return self._known[1]

    def _loaded(self, views: Views, parts: Iterable[list[tuple[int, int]]]) -> Iterator[tuple[Tensor, Tensor]]:
        loader = torch.utils.data.DataLoader(
            views,
            batch_sampler=parts,
            num_workers=self.workers,
            pin_memory=self.pinned,
            generator=torch.Generator(),  # its own, so that it draws nothing from the global one
        )
        return iter(loader)

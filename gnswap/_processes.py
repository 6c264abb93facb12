"""One process or several of them that work on one job, through accelerate.

Why no DistributedDataParallel: its wrapper would give the layers other names, wants every parameter used, and would
take part in saving. Adding up the gradients once a step is all that is needed.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from gnswap._errors import MissingDependencyError


class Processes:
    """This process among those that accelerate or torchrun has started for the same job.

    accelerate is imported only where there are several of them.

    Args:
        device: where the tensors are that the processes exchange.

    Attributes:
        count, rank: how many there are, and which this is.

    Raises:
        MissingDependencyError: there are several, and accelerate is not installed.
    """

    def __init__(self, device: torch.device) -> None:
        self.count, self.rank, self._device = 1, 0, device
        self._state: Any = None
        running = torch.distributed.is_available() and torch.distributed.is_initialized()
        if int(os.environ.get("WORLD_SIZE", "1")) == 1 and not (running and torch.distributed.get_world_size() > 1):
            return
        try:
            from accelerate.state import PartialState
        except ImportError as error:
            raise MissingDependencyError(
                "several processes need accelerate", fix="pip install 'gnswap[train]', or start one process."
            ) from error
        # a state that the caller has made already is shared
        state = PartialState() if PartialState._shared_state else PartialState(cpu=device.type == "cpu")
        self._state, self.count, self.rank = state, state.num_processes, state.process_index

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over all processes; the same bits on each."""
        if self._state is None:
            return tensor
        from accelerate.utils import reduce

        summed: Tensor = reduce(tensor, reduction="sum")
        return summed

    def sums(self, figures: list[float]) -> list[float]:
        """The sums over all processes, figure by figure; the same bits on each."""
        if self._state is None:
            return figures
        added: list[float] = self.total(torch.tensor(figures, dtype=torch.float64, device=self._device)).tolist()
        return added

    def mean(self, figures: list[float]) -> list[float]:
        """The mean over all processes, figure by figure; the same bits on each."""
        return [figure / self.count for figure in self.sums(figures)]

    def agree(self, number: int) -> bool:
        """Whether all processes have the same number, 0 or more and below 2^32."""
        own = torch.tensor([number, number * number % 4_294_967_291], dtype=torch.int64, device=self._device)
        return bool((self.total(own) == own * self.count).all())

    def wait(self) -> None:
        """Until all processes are here."""
        if self._state is not None:
            self._state.wait_for_everyone()

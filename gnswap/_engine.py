"""accelerate, as fine-tuning needs it: one process or several, DDP or FSDP2, mixed precision.

Why accelerate and no wrapper of our own: who has a cluster has a configuration for it already (`accelerate config`),
and torchrun's variables are read by it too. What is sharded, and how, is said there and not here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gnswap._errors import ArgumentError, FinetuneError, MissingDependencyError
from gnswap._processes import Processes

PRECISIONS = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
_LOST = ("gloo", "NCCL", "Connection closed", "connection was closed", "Connection reset")


class Engine:
    """The processes of a job, where they compute, and in what precision.

    Args:
        precision: "fp32", "bf16", "fp16", or None for what `accelerate launch` was told, else fp32.

    Attributes:
        processes: this one among the others.
        device: where this process computes.
        precision: what it came to.
        strategy: "one process", "DDP" or "FSDP2".

    Raises:
        MissingDependencyError: accelerate is not installed.
        ArgumentError: fp16 without a GPU; accelerate runs in this process already, in another precision; FSDP1.
    """

    def __init__(self, precision: str | None) -> None:
        try:
            from accelerate import Accelerator
            from accelerate.state import AcceleratorState
        except ImportError as error:
            raise MissingDependencyError(
                "fine-tuning needs accelerate", fix="Run: pip install 'gnswap[train]'"
            ) from error
        if precision == "fp16" and not torch.cuda.is_available():
            raise ArgumentError(
                "fp16 needs a GPU", where="finetune.precision", expected="fp32 or bf16 on the CPU", found="fp16"
            )
        self._is_ours = not AcceleratorState._shared_state
        try:
            self._accelerator = Accelerator(
                cpu=not torch.accelerator.is_available(),  # else it would not look for other processes on the CPU
                mixed_precision=None if precision is None else PRECISIONS[precision],
            )
        except ValueError as error:
            raise ArgumentError(
                "accelerate cannot do this here", where="finetune.precision", found=str(error)
            ) from error
        self.device: torch.device = self._accelerator.device
        self.processes = Processes(self.device)
        chosen = self._accelerator.mixed_precision
        self.precision = next((name for name, theirs in PRECISIONS.items() if theirs == chosen), str(chosen))
        kind = str(self._accelerator.distributed_type).rpartition(".")[2]
        self.is_sharded = bool(self._accelerator.is_fsdp2)
        self.strategy = "FSDP2" if self.is_sharded else "DDP" if self.processes.count > 1 else "one process"
        if kind in ("DEEPSPEED", "MEGATRON_LM") or (kind == "FSDP" and not self.is_sharded):
            raise ArgumentError(
                "this way of distributing is not supported",
                where="accelerate",
                expected="DDP, or FSDP with fsdp_version 2",
                found=kind,
            )

    def prepare(self, network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Take a network that is on `device` already, and its optimizer."""
        self.network = network
        self.model, self.optimizer = self._accelerator.prepare(network, optimizer)

    def not_yet(self, is_last: bool) -> contextlib.AbstractContextManager[None]:
        """Around the backward pass of all parts of a batch but the last one: gradients are exchanged once."""
        if is_last:
            return contextlib.nullcontext()
        held: contextlib.AbstractContextManager[None] = self._accelerator.no_sync(self.model)
        return held

    def backward(self, loss: Tensor) -> None:
        """The gradients of a loss, added to those that are there; over processes, in the end, their mean."""
        self._accelerator.backward(loss)

    def grad_norm(self) -> float:
        """The norm of the whole gradient, after it was exchanged."""
        norm: Any = self._accelerator.clip_grad_norm_(self.model.parameters(), float("inf"))
        return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)

    @property
    def scaler(self) -> dict[str, float]:
        """The state of fp16's gradient scaler; empty in other precisions."""
        scaler = self._accelerator.scaler
        return {} if scaler is None else {key: float(value) for key, value in scaler.state_dict().items()}

    @scaler.setter
    def scaler(self, state: dict[str, float]) -> None:
        if self._accelerator.scaler is not None and state:
            whole = ("growth_interval", "_growth_tracker")
            self._accelerator.scaler.load_state_dict(
                {key: int(value) if key in whole else value for key, value in state.items()}
            )

    def state(self) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
        """The network's whole state dict and, by parameter, the optimizer's. All processes call it together.

        The optimizer's sharded tensors are put together on the CPU of the first process; the others get nothing then.
        """
        from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

        if not self.optimizer.state:  # before the first step; asking for it would take one
            return self.weights(), {}
        options = self._options(cpu_offload=self.is_sharded)
        moments: Any = get_optimizer_state_dict(self.model, self.optimizer.optimizer, options=options)
        return self.weights(), moments.get("state", {})

    def weights(self) -> dict[str, Tensor]:
        """The network's whole state dict, on every process. All processes call it together."""
        from torch.distributed.checkpoint.state_dict import get_model_state_dict

        weights: Any = get_model_state_dict(self.model, options=self._options())
        return dict(weights)

    def load(self, weights: dict[str, Tensor], moments: dict[str, dict[str, Tensor]]) -> None:
        """Go back to a state that `state` gave, on every process with all of it."""
        from torch.distributed.checkpoint import state_dict as parts

        optimizer, options, given = self.optimizer.optimizer, self._options(), dict[str, Any](weights)
        if moments:  # first, since what gives it its form takes a step
            groups: Any = parts.get_optimizer_state_dict(self.model, optimizer, options=options)
            groups["state"] = moments
            parts.set_optimizer_state_dict(self.model, optimizer, groups, options=options)
        parts.set_model_state_dict(self.model, given, options=options)

    def _options(self, cpu_offload: bool = False) -> Any:
        from torch.distributed.checkpoint.state_dict import StateDictOptions

        return StateDictOptions(full_state_dict=True, cpu_offload=cpu_offload)

    def close(self) -> None:
        """Leave accelerate as it was found: its next user in this process may want another precision."""
        from accelerate.state import AcceleratorState

        self._accelerator.free_memory()
        if self._is_ours:
            AcceleratorState._reset_state()


@contextlib.contextmanager
def lost_process(where: Callable[[], str]) -> Iterator[None]:
    """Say it in words where another process of the job has ended while this one waits for it.

    Args:
        where: says how far the job is.

    Raises:
        FinetuneError: another process is gone. Other errors pass.
    """
    try:
        yield
    except RuntimeError as error:
        is_lost = isinstance(error, torch.distributed.DistError) or any(word in str(error) for word in _LOST)
        if not (torch.distributed.is_available() and torch.distributed.is_initialized() and is_lost):
            raise
        raise FinetuneError(
            "another process of this job has ended",
            where=where(),
            found=str(error).strip().splitlines()[0].rpartition("] ")[2][:120],
            fix="Start the job again with the same command: it goes on from there.",
        ) from error

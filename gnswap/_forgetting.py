"""Learning without forgetting: while a network learns new classes, it is asked for its original's answers too."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gnswap import _sites
from gnswap._running import placed

_TEMPERATURE = 2.0


class Memory:
    r"""What a network still answers with its original's head, against what the original answers.

    .. math:: T^2 \, \mathrm{KL}\left(p_\text{original} \,\Vert\, p_\text{old head on the new features}\right)

    with softmax at temperature T = 2 (Li & Hoiem, *Learning without Forgetting*, 2016). The old head does not train.

    Args:
        original: the network before its conversion, with its own head; only read.
        network: the one that learns. A hook on its head listens.
        head: path of the head in both.
    """

    def __init__(self, original: nn.Module, network: nn.Module, head: str) -> None:
        self._original = original.eval().requires_grad_(False)
        self._head = _sites.get(original, head)
        self._features: list[Tensor] = []
        _sites.get(network, head).register_forward_pre_hook(self._listen)

    def _listen(self, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._features = [inputs[0]]

    def loss(self, x: Tensor) -> Tensor:
        """The loss of each sample `[N]` of the batch that the network has just been given."""
        x = placed(x, self._original)
        with torch.no_grad():
            expected = self._original(x) / _TEMPERATURE
        found = self._head(self._features.pop().to(expected)) / _TEMPERATURE
        divergence = F.kl_div(found.log_softmax(1), expected.log_softmax(1), reduction="none", log_target=True)
        return divergence.sum(1) * _TEMPERATURE**2

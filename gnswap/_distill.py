"""What a converted network still has to learn from its original: a loss on answers and features, without labels.

Why features too: the answers to a hundred photos are a hundred vectors; what each norm made of the same photos is a
million numbers, in which an error shows where it arises. Why their mean and no sum: a deep network should not hear
less of its answers than a shallow one. Why the layers' outputs are measured in units of the original's own variance:
layers differ in size by orders of magnitude, and any network should do.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gnswap._errors import ArgumentError
from gnswap._pairs import Pairs
from gnswap._running import answered, eval_mode, flat, placed


class Distillation:
    r"""The loss of a converted network against its original.

    .. math::
        \mathrm{KL}\left(p_\text{original} \,\Vert\, p_\text{converted}\right)
        + \frac wL \sum_{l=1}^{L} \frac{\lVert f_l - f_l^\text{original} \rVert^2}{E_l}

    where :math:`E_l` is the energy of the original's features of one sample about their channel means. Networks
    that are no classifiers have the same relative squared error on their outputs in place of the KL (Hinton et al.,
    *Distilling the Knowledge in a Neural Network*, 2015; Romero et al., *FitNets*, 2015).

    Args:
        original, converted: the networks, in eval mode while `loss` is called.
        names: paths of the layers whose outputs are features, the same in both.
        sample: a batch to measure the energies on.
        is_classifier: whether the output is `[N, classes]`.
        features: w, the weight of the features.
    """

    def __init__(
        self,
        original: nn.Module,
        converted: nn.Module,
        names: Sequence[str],
        sample: Tensor,
        *,
        is_classifier: bool,
        features: float,
    ) -> None:
        self.original, self.converted, self.is_classifier = original, converted, is_classifier
        self._pairs = Pairs(names, self._meet)
        with eval_mode(original), torch.no_grad(), self._pairs.first(original):
            outputs = flat(answered(original, sample))
        self._output_energies = [_energy(output, len(sample)) for output in outputs]
        kept = self._pairs.take()
        energies = {name: sum(_energy(output, len(sample)) for output in found) for name, found in kept.items()}
        heard = [name for name, energy in energies.items() if energy > 0]  # a constant tells nothing
        self._weights = {name: features / len(heard) / energies[name] for name in heard}
        self._features: list[Tensor] = []

    def loss(self, x: Tensor) -> Tensor:
        """The loss summed over the samples of a batch, with a gradient for the converted network.

        Raises:
            ArgumentError: the two networks' outputs or layers do not correspond.
        """
        self._features = []
        with torch.no_grad(), self._pairs.first(self.original):
            expected = flat(self.original(placed(x, self.original)))
        with self._pairs.second(self.converted):
            found = flat(self.converted(placed(x, self.converted)))
        self._pairs.finish()
        if [item.shape for item in expected] != [item.shape for item in found] or not found:
            raise ArgumentError(
                "the two networks' outputs do not correspond",
                where="heal",
                expected=f"floating tensors of shapes {[tuple(item.shape) for item in expected]}",
                found=str([tuple(item.shape) for item in found]),
            )
        expected = [theirs.to(ours) for theirs, ours in zip(expected, found, strict=True)]
        terms = [self._answers(expected, found), *self._features]
        return torch.stack([term.to(found[0].device) for term in terms]).sum()

    def _answers(self, expected: list[Tensor], found: list[Tensor]) -> Tensor:
        if self.is_classifier:
            return F.kl_div(found[0].log_softmax(1), expected[0].log_softmax(1), reduction="sum", log_target=True)
        parts = [
            (ours - theirs).square().sum() / energy
            for theirs, ours, energy in zip(expected, found, self._output_energies, strict=True)
            if energy > 0
        ]
        return torch.stack(parts).mean() if parts else found[0].new_zeros(())

    def _meet(self, name: str, theirs: Tensor, ours: Tensor) -> None:
        if name in self._weights:
            # the difference first: an in-place activation may overwrite `ours` before the backward pass
            difference = ours - theirs.to(ours)
            self._features.append(difference.square().sum() * self._weights[name])


def _energy(output: Tensor, rows: int) -> float:
    """The squared deviation from the channel means, per sample."""
    output = output.double()
    others = tuple(dim for dim in range(output.ndim) if dim != 1 or output.ndim == 1)
    return float((output - output.mean(others, keepdim=True)).square().sum()) / max(rows, 1)

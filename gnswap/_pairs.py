"""The outputs of the same layers in two networks, met call by call while the networks run in turn.

Why hooks and no list of activations: comparing and distilling need each pair only once, so what the second network
computes is used at once, and only the first one's outputs are held.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from gnswap._errors import ArgumentError


class Pairs:
    """Collects the outputs of one network's layers and hands each over with the other network's.

    Args:
        names: paths that lead to a layer in both networks.
        meet: is given the path, the first network's output and the second one's, of equal shape.

    Example:
        >>> one, two = nn.Sequential(nn.ReLU()), nn.Sequential(nn.Identity())
        >>> pairs = Pairs(["0"], lambda name, theirs, ours: print(name, float(theirs), float(ours)))
        >>> with pairs.first(one):
        ...     _ = one(torch.tensor(-1.0))
        >>> with pairs.second(two):
        ...     _ = two(torch.tensor(-1.0))
        0 0.0 -1.0
        >>> pairs.finish()
    """

    def __init__(self, names: Sequence[str], meet: Callable[[str, Tensor, Tensor], None]) -> None:
        self.names, self._receive = names, meet
        self.waiting: dict[str, list[Tensor]] = {name: [] for name in names}  # the first one's outputs, call by call

    def first(self, model: nn.Module) -> contextlib.AbstractContextManager[None]:
        """Within the block, the layers' outputs are kept."""
        # a copy, since an in-place activation behind the layer would overwrite it
        return self._hooked(model, lambda name, output: self.waiting[name].append(output.clone()))

    def second(self, model: nn.Module) -> contextlib.AbstractContextManager[None]:
        """Within the block, the layers' outputs meet the ones that were kept.

        Raises:
            ArgumentError: a layer is called once more, or gives another shape.
        """
        return self._hooked(model, self._meet)

    def finish(self) -> None:
        """Raise `ArgumentError` where the first network called a layer more often than the second one."""
        for name, outputs in self.waiting.items():
            if outputs:
                raise _misfit(name, outputs[0].shape, None)

    def take(self) -> dict[str, list[Tensor]]:
        """The first network's outputs, call by call; none of them waits any more."""
        taken, self.waiting = self.waiting, {name: [] for name in self.names}
        return taken

    def expect(self, taken: Mapping[str, Sequence[Tensor]]) -> None:
        """Wait with outputs that `take` gave, of these pairs or of others."""
        self.waiting = {name: list(outputs) for name, outputs in taken.items()}

    def _meet(self, name: str, output: Tensor) -> None:
        expected = self.waiting[name].pop(0) if self.waiting[name] else None
        if expected is None or expected.shape != output.shape:
            raise _misfit(name, None if expected is None else expected.shape, output.shape)
        self._receive(name, expected, output)

    @contextlib.contextmanager
    def _hooked(self, model: nn.Module, receive: Callable[[str, Tensor], None]) -> Iterator[None]:
        modules = dict(model.named_modules(remove_duplicate=False)) if self.names else {}
        handles = [
            modules[name].register_forward_hook(lambda _module, _inputs, output, name=name: receive(name, output))
            for name in self.names
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _misfit(name: str, expected: torch.Size | None, found: torch.Size | None) -> ArgumentError:
    return ArgumentError(
        "the two networks use a layer differently",
        where=name or "(root)",
        expected=f"an output of shape {tuple(expected)}" if expected is not None else "no further call",
        found=str(tuple(found)) if found is not None else "no further call",
    )

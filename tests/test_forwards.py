"""What the source of a forward tells about norms that no swap of modules reaches."""

from __future__ import annotations

import gc
import weakref

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import batch_norm

from gnswap import _forwards
from gnswap._forwards import Forward, read_forward


class Direct(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, training=True)


class ByName(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return batch_norm(x, None, None, training=True)


class ByTorch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.batch_norm(x, None, None, None, None, True, 0.1, 1e-5, False)


class ByMethod(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return self._normalise(x)

    def _normalise(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, training=True)


class Inherited(ByMethod):
    def unrelated(self) -> None: ...


def helper(x: Tensor) -> Tensor:
    return F.batch_norm(x, None, None, training=True)


class ByFunction(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([helper(part) for part in x.chunk(2)])


class OnWeights(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = F.batch_norm(self.weight.reshape(1, self.out_channels, -1), None, None, training=True)
        return F.conv2d(x, weight.reshape_as(self.weight))


class ChildOfThatName(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.batch_norm = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.batch_norm(x)


class NotInForward(nn.Module):
    def fuse(self) -> Tensor:
        return F.batch_norm(self.bn.running_mean, None, None)

    def forward(self, x: Tensor) -> Tensor:
        return x


class ReadsStatistics(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x - self.bn.running_mean) / self.bn.running_var.sqrt()


def test_pitfall_11_functional_calls_are_found() -> None:
    for kind in (Direct, ByName, ByTorch, ByMethod, Inherited, ByFunction):
        assert read_forward(kind) == Forward(on_activations=True), kind


def test_weight_standardisation_is_told_apart() -> None:
    assert read_forward(OnWeights) == Forward(on_weights=True)


def test_what_only_looks_like_a_call_is_not_reported() -> None:
    for kind in (ChildOfThatName, NotInForward, nn.BatchNorm2d, nn.Sequential):
        assert read_forward(kind) == Forward(), kind


def test_running_statistics_that_a_parent_reads() -> None:
    assert read_forward(ReadsStatistics) == Forward(reads=frozenset({"bn"}))


def test_quantisation_aware_training_reads_them() -> None:
    from torch.ao.nn.intrinsic.qat import ConvBn2d

    assert "bn" in read_forward(ConvBn2d).reads


def test_no_source_is_no_failure() -> None:
    namespace: dict[str, object] = {"F": F, "nn": nn}
    exec(
        "class Generated(nn.Module):\n    def forward(self, x):\n        return F.batch_norm(x, None, None)\n"
        "class Quiet(nn.Module):\n    def forward(self, x):\n        return x\n",
        namespace,
    )
    assert read_forward(namespace["Generated"]) == Forward(unclear=True)  # type: ignore[arg-type]
    assert read_forward(namespace["Quiet"]) == Forward()  # type: ignore[arg-type]


def test_a_forward_that_is_no_function() -> None:
    class Odd(nn.Module):
        forward = len  # type: ignore[assignment]

    assert read_forward(Odd) == Forward()


def test_traced_and_exported_graphs_are_read() -> None:
    traced = torch.fx.symbolic_trace(Direct())
    assert read_forward(type(traced)).on_activations
    norm = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    exported = torch.export.export(norm, (torch.ones(1, 3, 4, 4),)).module()
    assert read_forward(type(exported)).on_activations


def test_classes_are_not_kept_alive() -> None:
    class Passing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    read_forward(Passing)
    assert Passing in _forwards._READ
    gone = weakref.ref(Passing)
    del Passing
    gc.collect()
    assert gone() is None

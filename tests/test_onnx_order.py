"""Channel orders and standardisations that the neighbours take: what moves at run time, and that nothing changes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import onnx_ir
import onnxruntime
import pytest
import timm
import torch
from _models import randomise_norms
from torch import Tensor, nn

from gnswap._apply import apply
from gnswap._export import ExportReport, export_onnx
from gnswap._layer import FusedGroupNorm
from gnswap._onnx import order
from gnswap._plan import plan
from gnswap._validate import validate_onnx


def converted(model: nn.Module, *, seed: int = 0, group_size: int = 4) -> nn.Module:
    """The converted network, every norm with a channel order and a standardisation of its own."""
    return rearranged(apply(model, plan(model.eval(), group_size=group_size)).eval(), seed)


def rearranged(model: nn.Module, seed: int = 0) -> nn.Module:
    """The same network with other orders and standardisations."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, FusedGroupNorm):
            channels = module.num_channels
            module.channel_order = torch.randperm(channels, generator=generator)
            module.channel_scale = torch.randn(channels, generator=generator)
            module.channel_shift = torch.randn(channels, generator=generator)
    return model


def check(model: nn.Module, x: Tensor, path: Path, **options: Any) -> ExportReport:
    """Export, run in onnxruntime, and compare with fp64."""
    report = export_onnx(model, path, x, **options)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {report.inputs[0].name: x.numpy()})
    with torch.no_grad():
        expected = copy.deepcopy(model).double()(x.double())
    assert float((torch.from_numpy(found) - expected).abs().amax()) < 1e-5 * float(expected.abs().amax())
    return report


def conv_norm(before: int, after: int, **options: Any) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(before, after, 3, padding=1, **options), nn.BatchNorm2d(after), nn.SiLU())


class Residual(nn.Module):
    """Two norms behind convs meet in a sum: the second one has to follow the first."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.head = conv_norm(3, 8), conv_norm(8, 8), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(x + self.left(x)).mean((2, 3))


class Concatenated(nn.Module):
    """Branches of orders of their own, put together; a norm reads the whole and so does a conv."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = conv_norm(3, 8), conv_norm(3, 12)
        self.conv, self.norm, self.head = nn.Conv2d(20, 8, 1), nn.BatchNorm2d(20), nn.Conv2d(20, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        both = torch.cat([self.left(x), self.right(x)], 1)
        return torch.cat([self.conv(both), self.head(self.norm(both))], 1)


class Ending(nn.Module):
    """Two orders that end in one output, which has to be natural."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = conv_norm(3, 8), conv_norm(3, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.left(x), self.right(x)], 1)


class Shuffled(nn.Module):
    """An operator that mixes channels by position keeps its input in the natural order."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = conv_norm(3, 8), nn.Conv2d(2, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(nn.functional.pixel_shuffle(self.stem(x), 2))


class Excited(nn.Module):
    """Depthwise conv, squeeze and excitation, a per-channel constant, a classifier behind a flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depthwise = conv_norm(3, 8), conv_norm(8, 8, groups=8)
        self.gate, self.layer_scale = nn.Conv2d(8, 8, 1), nn.Parameter(torch.randn(8, 1, 1))
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(self.stem(x))
        x = x * torch.sigmoid(self.gate(x.mean((2, 3), keepdim=True))) * self.layer_scale
        return self.head(self.pool(x).flatten(1))


@pytest.mark.parametrize(
    ("build", "gathers"),
    [
        (lambda: nn.Sequential(conv_norm(3, 8), conv_norm(8, 8), nn.Conv2d(8, 4, 1)), 0),
        (Residual, 1),  # the sum has the order of the norm that comes first
        (Concatenated, 1),  # the norm that mixes both branches
        (Shuffled, 1),
        (Ending, 1),  # behind the concatenation
        (Excited, 1),  # behind the depthwise conv, which keeps the order of the norm before
        # a conv with as many groups as outputs that reads two channels for each
        (lambda: nn.Sequential(conv_norm(3, 16), conv_norm(16, 8, groups=8), nn.Conv2d(8, 4, 1)), 2),
    ],
)
def test_orders_go_into_the_weights_where_the_graph_allows_it(tmp_path: Path, build: Any, gathers: int) -> None:
    torch.manual_seed(0)
    model = converted(randomise_norms(build()))
    report = check(model, torch.randn(2, 3, 8, 8), tmp_path / "net.onnx", target="cpu")
    assert report.operators.get("Gather", 0) == gathers
    words = [one.channel_order for one in report.norms]
    of_norms = 0 if build is Ending else gathers
    assert words.count("1 Gather") == of_norms
    assert words.count("in the neighbours' weights") == len(words) - of_norms


def test_a_norm_behind_a_linear_layer(tmp_path: Path) -> None:
    layers = nn.Sequential(nn.Linear(6, 16), FusedGroupNorm(4, 16, act="relu"), nn.Linear(16, 3)).eval()
    report = check(rearranged(layers), torch.randn(3, 6), tmp_path / "net.onnx")
    assert report.norms[0].standardisation == "folded into 0"
    assert report.norms[0].channel_order == "in the neighbours' weights"


def test_an_order_does_not_pass_through_values_of_unknown_shape() -> None:
    """Whoever reads such a value could not be told of the order: a wrong answer without a word."""
    x = onnx_ir.Value(name="x", shape=onnx_ir.Shape(["N", 8, 4, 4]), type=onnx_ir.TensorType(onnx_ir.DataType.FLOAT))
    node = onnx_ir.node("Relu", [x])
    assert not order._passes_on(node)
    node.outputs[0].shape = x.shape
    assert order._passes_on(node)


def test_single_layers_are_compared_in_torchs_order(tmp_path: Path) -> None:
    model, x = converted(randomise_norms(Residual())), torch.randn(2, 3, 8, 8)
    report = export_onnx(model, tmp_path / "net.onnx", x)
    parity = validate_onnx(report.path, model, x, provider="cpu", layers=True)
    assert [layer.passed for layer in parity.layers] == [True, True]


def test_what_others_read_too_is_not_folded_into(tmp_path: Path) -> None:
    report = check(converted(randomise_norms(Concatenated())), torch.randn(2, 3, 8, 8), tmp_path / "net.onnx")
    assert {one.path: one.standardisation for one in report.norms} == {
        "left.1": "folded into left.0",
        "right.1": "folded into right.0",
        "norm": "in the norm",
    }


def test_a_conv_that_runs_twice_is_folded_for_each_run(tmp_path: Path) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.one, self.two = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Tensor:
            return (self.one(self.conv(x)) + self.two(self.conv(x * x))).mean((2, 3))

    report = check(converted(randomise_norms(Twice())), torch.randn(2, 3, 8, 8), tmp_path / "net.onnx")
    assert [one.standardisation for one in report.norms] == ["folded into conv"] * 2


@pytest.mark.parametrize("target", ["portable", "cpu"])
def test_a_whole_network_of_the_mobilenet_kind(tmp_path: Path, target: str) -> None:
    torch.manual_seed(0)
    model = converted(randomise_norms(timm.create_model("mobilenetv3_small_050")), group_size=8)
    report = check(model, torch.randn(2, 3, 64, 64), tmp_path / "net.onnx", target=target, dynamic_size=False)
    assert {one.standardisation.split()[0] for one in report.norms} == {"folded"}
    assert max(one.channel_order for one in report.norms) <= "in the neighbours' weights"  # never 2 Gathers

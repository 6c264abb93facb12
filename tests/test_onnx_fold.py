"""What the layer behind a norm takes from it, and that nothing changes; and roots that are no ordinary network."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from _models import randomise_norms
from torch import Tensor, nn

import gnswap
from gnswap._export import ExportReport, export_onnx
from gnswap._layer import FusedGroupNorm
from gnswap._validate import validate_onnx


def layer(num_groups: int, channels: int, *, seed: int = 0, **options: Any) -> FusedGroupNorm:
    """A norm with everything that a conversion can give it."""
    generator = torch.Generator().manual_seed(seed)
    norm = FusedGroupNorm(num_groups, channels, **options)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(torch.randn(channels, generator=generator))
    norm.channel_scale = torch.randn(channels, generator=generator)
    norm.channel_shift = torch.randn(channels, generator=generator)
    norm.channel_order = torch.randperm(channels, generator=generator)
    return norm.eval()


class Behind(nn.Module):
    """Norms in front of every kind of layer that could take their gamma and beta, or must not."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(8, 8, 1)
        self.norms = nn.ModuleDict(
            {
                name: layer(2, channels, seed=channels + number)
                for number, (name, channels) in enumerate(
                    {"pointwise": 8, "grouped": 16, "depthwise": 8, "padded": 16, "transposed": 8, "pooled": 8}.items()
                )
            }
            | {"linear": layer(2, 6), "ending": layer(1, 4), "act": layer(2, 4, act="relu")}
        )
        self.layers = nn.ModuleDict(
            {
                "pointwise": nn.Conv2d(8, 16, 1, bias=False),
                "grouped": nn.Conv2d(16, 8, 2, stride=2, groups=2),
                "depthwise": nn.Conv2d(8, 16, 3, groups=8),
                "padded": nn.Conv2d(16, 8, 3, padding=1),
                "transposed": nn.ConvTranspose2d(8, 8, 2, stride=2),
                "pooled": nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 6)),
                "linear": nn.Linear(6, 4, bias=False),
                "act": nn.Linear(4, 4),
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for name, following in self.layers.items():
            x = following(self.norms[name](x))
        return self.norms["ending"](x)


class SeenTwice(nn.Module):
    """Another node reads the norm too."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = layer(2, 8), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.norm(x)
        return self.conv(x), x.mean((2, 3))


class Twice(nn.Module):
    """One conv and one norm, both run twice: what is folded for one run must not reach the other."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = layer(2, 8), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(self.norm(self.conv(x))))


class Nested(nn.Module):
    """Outputs in a dict of tuples, one of them an input."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = layer(2, 8), layer(4, 8, act="relu", seed=1)

    def forward(self, x: Tensor, z: Tensor) -> dict[str, Any]:
        y = self.two(self.one(x), z)
        return {"pair": (y, [y.mean((2, 3))]), "again": x}


def check(
    model: nn.Module, inputs: tuple[Tensor, ...], path: Path, bound: float = 3e-6, **options: Any
) -> ExportReport:
    """Export, run in onnxruntime, and compare every output with fp64."""
    report = export_onnx(model, path, inputs, **options)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    half = options.get("dtype") == torch.float16
    feed = {one.name: (x.half() if half else x).numpy() for one, x in zip(report.inputs, inputs, strict=True)}
    with torch.no_grad():
        answers = torch.utils._pytree.tree_leaves(copy.deepcopy(model).double()(*(x.double() for x in inputs)))
    for found, exact in zip(session.run(None, feed), answers, strict=True):
        assert float((torch.from_numpy(found).double() - exact).abs().amax()) < bound * float(exact.abs().amax())
    return report


@pytest.mark.parametrize(
    ("options", "bound"),
    [({"target": "cpu", "dynamic_size": False}, 3e-6), ({}, 3e-6), ({"dtype": torch.float16}, 8e-3)],
    ids=["cpu", "portable", "fp16"],
)
def test_gamma_and_beta_go_into_the_layer_behind(tmp_path: Path, options: dict[str, Any], bound: float) -> None:
    model, x = Behind().eval(), torch.randn(2, 8, 10, 10, generator=torch.Generator().manual_seed(1))
    report = check(model, (x,), tmp_path / "net.onnx", bound, **options)
    folded = {one.path.removeprefix("norms."): one.affine for one in report.norms}
    assert folded == {
        **{name: f"folded into layers.{name}" for name in ("pointwise", "grouped", "depthwise", "linear")},
        **dict.fromkeys(("padded", "transposed", "pooled", "act", "ending"), "in the norm"),
    }
    properties = {entry.key: entry.value for entry in onnx.load(report.path).metadata_props}
    assert set(json.loads(properties["gnswap.affine_behind"])) == {
        f"norms.{name}" for name in ("pointwise", "grouped", "depthwise", "linear")
    }


def test_single_layers_are_compared_with_gamma_and_beta(tmp_path: Path) -> None:
    model, x = Behind().eval(), torch.randn(2, 8, 10, 10, generator=torch.Generator().manual_seed(1))
    report = export_onnx(model, tmp_path / "net.onnx", x, target="cpu", dynamic_size=False)
    options: dict[str, Any] = {"provider": "cpu", "layers": True, "more_shapes": False, "special_inputs": False}
    parity = validate_onnx(report.path, model, x, **options)
    assert len(parity.layers) == len(report.norms)
    assert all(one.passed for one in parity.layers)
    with torch.no_grad():
        model.norms["grouped"].weight[3] *= 1.01  # type: ignore[operator]
    parity = validate_onnx(report.path, model, x, **options)
    assert parity.first_departure is not None
    assert parity.first_departure.name == "norms.depthwise"  # behind the layer that has the factor now


def test_what_others_read_too_keeps_gamma_and_beta(tmp_path: Path) -> None:
    report = check(SeenTwice().eval(), (torch.randn(2, 8, 4, 4),), tmp_path / "net.onnx")
    assert report.norms[0].affine == "in the norm"


def test_a_norm_and_a_conv_that_run_twice(tmp_path: Path) -> None:
    report = check(Twice().eval(), (torch.randn(2, 8, 4, 4),), tmp_path / "net.onnx", target="cpu", dynamic_size=False)
    assert [one.affine for one in report.norms] == ["folded into conv", "in the norm"]
    assert [one.standardisation for one in report.norms] == ["folded into conv"] * 2


@pytest.mark.parametrize("shape", [(3, 8), (1, 8, 7), (2, 8, 5, 1), (2, 8, 2, 3, 4)], ids=str)
@pytest.mark.parametrize("plain", [True, False])
def test_the_root_may_be_the_norm(tmp_path: Path, shape: tuple[int, ...], plain: bool) -> None:
    """torch.export miscounts the buffers of such a root where some are None."""
    norm = FusedGroupNorm(2, 8, act="relu").eval() if plain else layer(2, 8)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    report = check(norm, (x,), tmp_path / "norm.onnx", target="cpu", dynamic_size=False)
    assert report.norms[0].path == "(root)"


def test_a_root_with_a_residual_and_no_affine(tmp_path: Path) -> None:
    inputs = (torch.randn(2, 8, 4, 4), torch.randn(2, 8, 4, 4))
    check(layer(2, 8, act="silu"), inputs, tmp_path / "norm.onnx")
    check(FusedGroupNorm(2, 8, affine=False).eval(), inputs[:1], tmp_path / "norm.onnx")


def test_outputs_in_a_dict_of_tuples(tmp_path: Path) -> None:
    inputs = (torch.randn(2, 8, 4, 4), torch.randn(2, 8, 4, 4))
    model = Nested().eval()
    report = export_onnx(model, tmp_path / "net.onnx", inputs, target="cpu")
    assert [one.name for one in report.inputs] == ["x", "z"]
    assert len(report.outputs) == 3
    assert validate_onnx(report.path, model, inputs, provider="cpu", more_shapes=False, special_inputs=False).passed


class Drawn(nn.Module):
    """A network drawn by a seed: convs of every kind, BatchNorms, sums, concatenations."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.steps, self.layers, channels = [], nn.ModuleList([nn.Conv2d(3, 16, 3, padding=1)]), 16
        for kind in torch.randint(0, 6, (5,)).tolist():
            if kind == 5:
                self.steps.append("concat")
                self.layers.append(nn.Sequential(nn.Conv2d(channels, 8, 1), nn.BatchNorm2d(8)))
                channels += 8
                continue
            groups, padding = (1, 1, channels, 4, 1)[kind], (0, 1, 1, 0, 1)[kind]
            conv = nn.Conv2d(channels, channels, 1 + 2 * padding, padding=padding, groups=groups, bias=kind < 2)
            act = (nn.ReLU(), nn.Identity(), nn.SiLU(), nn.Hardswish(), nn.Identity())[kind]
            self.steps.append("add" if kind == 4 else "chain")
            self.layers.append(nn.Sequential(nn.BatchNorm2d(channels), act, conv))
        self.head = nn.Sequential(nn.BatchNorm2d(channels), nn.Conv2d(channels, 5, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers[0](x)
        for step, following in zip(self.steps, list(self.layers)[1:], strict=True):
            y = following(x)
            x = torch.cat([x, y], 1) if step == "concat" else x + y if step == "add" else y
        return self.head(x)


@pytest.mark.parametrize("seed", range(3))
def test_drawn_networks_with_orders_absorbed_activations_and_another_softness(tmp_path: Path, seed: int) -> None:
    model = randomise_norms(Drawn(seed)).eval()
    converted = gnswap.convert(model, group_size=4, absorb=True, softness=0.5).model.eval()
    generator = torch.Generator().manual_seed(seed)
    for norm in converted.modules():
        if isinstance(norm, FusedGroupNorm):
            norm.channel_order = torch.randperm(norm.num_channels, generator=generator)
            norm.softness = 0.25  # as fine-tuning leaves it half-way
    x = torch.randn(2, 3, 8, 8, generator=generator)
    check(converted, (x,), tmp_path / "net.onnx", 1e-5, target="cpu" if seed % 2 else "portable", dynamic_size=False)
    half = copy.deepcopy(converted).half()
    report = export_onnx(half, tmp_path / "half.onnx", x.half(), dynamic_size=False)
    (found,) = onnxruntime.InferenceSession(report.path, providers=["CPUExecutionProvider"]).run(
        None, {"input": x.half().numpy()}
    )
    with torch.no_grad():
        exact = half.double()(x.double())
    assert float((torch.from_numpy(found).double() - exact).abs().amax()) < 2e-2 * float(exact.abs().amax())

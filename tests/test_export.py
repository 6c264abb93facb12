"""export_onnx: what is in the file, what is general about it, and that the network stays as it was.

Exports take seconds each, so the files are made once a module and looked at from many sides.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import onnx
import pytest
import timm
import torch
from _models import AliasedNorms, randomise_norms, small_cnn
from timm.layers import CondConv2d
from torch import Tensor, nn

from gnswap import _export
from gnswap._apply import apply
from gnswap._errors import ArgumentError, ExportError, WrappedModelError
from gnswap._export import ExportReport, export_onnx
from gnswap._layer import FusedGroupNorm
from gnswap._onnx.plain import plain
from gnswap._plan import plan as make_plan
from gnswap._providers import open_session
from gnswap.ops import ACTIVATIONS
from gnswap.ops._backend import Backend


def converted(model: nn.Module, **options: Any) -> nn.Module:
    return apply(model, make_plan(model, **options))


def make_layer(
    num_groups: int, channels: int = 16, *, scale: bool = True, order: bool = True, seed: int = 0, **options: Any
) -> FusedGroupNorm:
    generator = torch.Generator().manual_seed(seed)
    norm = FusedGroupNorm(num_groups, channels, **options)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(torch.randn(channels, generator=generator))
    if scale:
        norm.channel_scale = torch.randn(channels, generator=generator)
        norm.channel_shift = torch.randn(channels, generator=generator)
        norm.channel_gain = torch.rand(channels, generator=generator) + 0.5
    if order:
        norm.channel_order = torch.randperm(channels, generator=generator)
    return norm


class Variants(nn.Module):
    """Every way a layer can be set up, each its own output."""

    def __init__(self) -> None:
        super().__init__()
        # a seed for each: the exporter merges equal constants, and with them equal nodes
        seeds = itertools.count()

        def layer(*arguments: Any, **options: Any) -> FusedGroupNorm:
            return make_layer(*arguments, seed=next(seeds), **options)

        self.layers = nn.ModuleDict(
            {
                "plain": layer(4, scale=False, order=False),
                "standardised": layer(4, order=False),
                "ordered": layer(4),
                "only_ordered": layer(2, scale=False),
                "soft": layer(4, softness=0.7, act="relu"),
                "one_group": layer(1, act="silu"),
                "channelwise": layer(16, act="gelu"),
                "no_bias": layer(4, bias=False, act="hardswish"),
                "no_affine": layer(4, affine=False, act="leaky_relu"),
                "act_module": layer(4, act=nn.Hardtanh()),
                "fusable_module": layer(4, act=nn.ReLU6()),
                "dropped": layer(4, act=nn.ReLU()),
            }
        )
        self.layers["dropped"].drop = nn.Dropout(0.5)
        self.residual = layer(4, act="relu")

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        outputs = {name: norm(x) for name, norm in self.layers.items()}
        return outputs | {"residual": self.residual(x, x)}


class Ranks(nn.Module):
    """Three inputs of different rank, outputs in a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.vectors, self.tokens, self.volume = make_layer(4), make_layer(2, 8), make_layer(2, 4)

    def forward(self, rows: Tensor, tokens: Tensor, volume: Tensor) -> tuple[Tensor, list[Tensor]]:
        return self.vectors(rows), [self.tokens(tokens), self.volume(volume)]


Case = tuple[nn.Module, ExportReport]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("onnx")


@pytest.fixture(scope="module")
def variants(folder: Path) -> Case:
    model = Variants().eval()
    return model, export_onnx(model, folder / "variants.onnx", torch.randn(1, 16, 6, 6))


@pytest.fixture(scope="module")
def ranks(folder: Path) -> Case:
    model = Ranks().eval()
    inputs = (torch.randn(3, 16), torch.randn(3, 8, 5), torch.randn(3, 4, 2, 3, 4))
    return model, export_onnx(model, folder / "ranks.onnx", inputs, opset=20)


@pytest.fixture(scope="module")
def resnet(folder: Path) -> Case:
    torch.manual_seed(0)
    model = converted(randomise_norms(timm.create_model("resnet10t")).eval(), group_size=8)
    return model, export_onnx(model, folder / "resnet10t.onnx", torch.randn(2, 3, 64, 64))


def run(report: ExportReport, *inputs: Tensor) -> list[Tensor]:
    session = open_session(report.path, "cpu")
    names = [endpoint.name for endpoint in report.inputs]
    feed = dict(zip(names, (value.numpy() for value in inputs), strict=True))
    return [torch.from_numpy(value) for value in session.run(None, feed)]


def shape_of(report: ExportReport, output: int = 0) -> tuple[str, ...]:
    return report.outputs[output].shape


# numbers


@pytest.mark.parametrize("shape", [(1, 16, 6, 6), (5, 16, 6, 6), (2, 16, 9, 1), (3, 16, 1, 7)], ids=str)
def test_every_kind_of_layer_computes_the_same_in_onnxruntime(variants: Case, shape: tuple[int, ...]) -> None:
    model, report = variants
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    # onnxruntime is measured against ATen: our own kernels centre every channel and are far more exact than either
    with torch.no_grad(), mock.patch("gnswap.ops._op.choose_backend", return_value=Backend("aten", "a test")):
        ours, exact = model(x), copy.deepcopy(model).double()(x.double())
    found = dict(zip([output.name for output in report.outputs], run(report, x), strict=True))
    assert list(found) == list(exact)
    for name, value in exact.items():
        error, torchs_own = ((one[name] - value).abs().amax() / value.abs().amax() for one in (found, ours))
        assert error < 2e-6 + 4 * torchs_own, name


@pytest.mark.parametrize(("ratio", "tolerance"), [(0, 3e-6), (3, 1e-5), (30, 1e-4)])
def test_a_mean_far_from_zero_costs_few_digits(variants: Case, ratio: float, tolerance: float) -> None:
    """export.md 1: 2e-5 at mean 30 standard deviations, where GroupNormalization-21 is wrong by 2.5e-3."""
    model, report = variants
    x = ratio + torch.randn(2, 16, 6, 6, generator=torch.Generator().manual_seed(2))
    norm = model.layers["plain"]
    with torch.no_grad():
        exact = nn.functional.group_norm(x.double(), 4, norm.weight.double(), norm.bias.double(), 1e-5)
    error = float((run(report, x)[0] - exact).abs().amax())
    assert error < tolerance * float(exact.abs().amax())


def test_two_to_five_dimensions_and_several_inputs(ranks: Case) -> None:
    model, report = ranks
    assert [one.name for one in report.inputs] == ["rows", "tokens", "volume"]
    assert [one.name for one in report.outputs] == ["output_0", "output_1_0", "output_1_1"]
    inputs = (torch.randn(2, 16), torch.randn(2, 8, 7), torch.randn(2, 4, 3, 2, 5))
    with torch.no_grad():
        rows, (tokens, volume) = model(*inputs)
    for found, expected in zip(run(report, *inputs), (rows, tokens, volume), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


class TwoSizes(nn.Module):
    """An image and its thumbnail: axes of two lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.large, self.small = FusedGroupNorm(2, 8), FusedGroupNorm(4, 8)

    def forward(self, image: Tensor, thumbnail: Tensor) -> Tensor:
        large = torch.cos(3 * torch.sin(self.large(image)))  # onnxruntime uses the memory of one for the other
        small = torch.cos(3 * torch.sin(self.small(thumbnail) + large.mean()))
        return large.mean((2, 3)) + small.mean((2, 3))


def test_axes_of_two_lengths_have_two_names(tmp_path: Path) -> None:
    model = TwoSizes().eval()
    inputs = (torch.randn(2, 8, 32, 40), torch.randn(2, 8, 32, 16))
    report = export_onnx(model, tmp_path / "two.onnx", inputs)
    assert [one.shape for one in report.inputs] == [
        ("batch", "8", "height", "width"),
        ("batch", "8", "height", "width_2"),
    ]
    others = (torch.randn(1, 8, 24, 30), torch.randn(1, 8, 24, 47))
    for case in (inputs, others):
        with torch.no_grad():
            torch.testing.assert_close(run(report, *case)[0], model(*case), rtol=0, atol=1e-5)


def test_a_converted_resnet_at_other_batches_and_sizes(resnet: Case) -> None:
    model, report = resnet
    for shape in [(2, 3, 64, 64), (1, 3, 64, 64), (3, 3, 95, 70)]:
        x = torch.randn(shape)
        with torch.no_grad():
            expected = model(x)
        error = float((run(report, x)[0] - expected).abs().amax())
        assert error < 1e-5 * float(expected.abs().amax())


# the graph


def test_pitfall_41_groupnorm_is_written_as_instancenorm(resnet: Case, ranks: Case) -> None:
    for model, report in (resnet, ranks):
        norms = sum(isinstance(module, FusedGroupNorm) for module in model.modules())
        assert report.operators["InstanceNormalization"] == norms == len(report.norms)
        assert "GroupNormalization" not in report.operators
    assert (resnet[1].opset, ranks[1].opset) == (18, 20)


def test_pitfall_41_batch_height_and_width_are_dynamic_without_shape_nodes(resnet: Case, variants: Case) -> None:
    for _, report in (resnet, variants):
        assert report.dynamic_axes == ("batch", "height", "width")
        assert report.notes == () or "one group" in report.notes[0]
        assert not {"Shape", "GroupNormalization", "Cast", "Concat"} & set(report.operators)
    assert resnet[1].inputs[0].shape == ("batch", "3", "height", "width")
    assert shape_of(resnet[1]) == ("batch", "1000")
    assert shape_of(variants[1]) == ("batch", "16", "height", "width")


def test_pitfall_43_between_input_and_output_an_order_is_one_gather_on_each_side(variants: Case) -> None:
    model, report = variants
    norms = [module for module in model.modules() if getattr(module, "channel_order", None) is not None]
    # groups of one or of all channels are the same groups in any order
    ordered = sum(1 < norm.num_groups < norm.num_channels for norm in norms)
    assert report.operators["Gather"] == 2 * ordered
    assert sum(one.channel_order == "2 Gathers" for one in report.norms) == ordered


def test_names_lead_back_to_the_modules(resnet: Case) -> None:
    graph = onnx.load(resnet[1].path).graph
    names = [node.name for node in graph.node]
    assert len(set(names)) == len(names)
    assert {"conv1.0/Conv", "bn1/InstanceNormalization", "layer1.0.bn1/InstanceNormalization"} <= set(names)
    assert {"conv1.0.weight", "fc.bias"} <= {tensor.name for tensor in graph.initializer}


def test_nothing_of_this_machine_is_in_the_file(resnet: Case) -> None:
    data = Path(resnet[1].path).read_bytes()
    assert str(Path.home()).encode() + b"/" not in data
    assert str(Path(__file__).parent.parent).encode() not in data
    assert b"site-packages" not in data


def test_the_report_describes_the_file(resnet: Case) -> None:
    model, report = resnet
    data = Path(report.path).read_bytes()
    assert (report.sha256, report.size) == (hashlib.sha256(data).hexdigest(), len(data))
    assert ExportReport.from_json(report.to_json()) == report
    properties = {entry.key: entry.value for entry in onnx.load_from_string(data).metadata_props}
    assert properties["gnswap.fingerprint"] == model.__dict__["_gnswap"].plan.fingerprint
    assert properties["gnswap.torch"] == report.versions["torch"]


def test_one_group_is_noted_for_tensorrt(variants: Case) -> None:
    assert any("1 layers have one group" in note and "TensorRT" in note for note in variants[1].notes)


def test_a_network_that_wants_one_batch_size(tmp_path: Path) -> None:
    class Experts(nn.Module):
        """Mixes its weights for each sample, as EfficientNet-CC does: the batch size is its convolution's groups."""

        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = CondConv2d(8, 8, 3, num_experts=2), FusedGroupNorm(2, 8)

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.norm(self.conv(x, x.mean((2, 3))[:, :2].sigmoid()))
            return output

    model, x = Experts().eval(), torch.randn(3, 8, 6, 6)
    with pytest.raises(ExportError, match=r"cannot write the network.*dynamic_batch=False \(--fixed-batch N\) helps"):
        export_onnx(model, tmp_path / "net.onnx", x, dynamic_size=False)
    report = export_onnx(model, tmp_path / "net.onnx", x, dynamic_batch=False, dynamic_size=False)
    assert report.inputs[0].shape == ("3", "8", "6", "6")
    (found,) = open_session(report.path, "cpu").run(None, {report.inputs[0].name: x.numpy()})
    assert torch.allclose(torch.from_numpy(found), model(x), atol=1e-5)


# the model, the file and the console stay clean


def test_the_model_is_untouched_and_the_bytes_repeat(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = converted(randomise_norms(small_cnn()), groups=2)
    model[1].train(False)
    before, flags = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    state = torch.get_rng_state()
    reports = [export_onnx(model, folder / f"{name}.onnx", torch.ones(2, 3, 8, 8)) for name in "ab"]
    assert reports[0].sha256 == reports[1].sha256
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(type(module) is FusedGroupNorm for module in (model[1], model[4]))
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert capfd.readouterr().out == ""


def test_a_failure_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(b"old")

    def fail(self: Path, target: Path) -> Path:
        raise OSError(f"no space left for {target} from {self}")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(ExportError, match="cannot be written"):
        export_onnx(nn.Conv2d(3, 4, 1), path, torch.ones(1, 3, 4, 4))
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


# lowering


def test_aliases_stay_aliases() -> None:
    model = converted(randomise_norms(AliasedNorms()).eval(), groups=2)
    prepared, _, _ = plain(model)
    assert prepared.bn1 is prepared.bn2 is prepared.extra["norm"]
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(prepared(x), model(x))


def test_the_root_may_be_the_norm_and_hooks_are_carried() -> None:
    norm = make_layer(4)
    norm.register_forward_hook(lambda _module, _inputs, output: output * 2)
    prepared, _, _ = plain(norm)
    x = torch.randn(2, 16, 3, 3)
    torch.testing.assert_close(prepared(x), norm(x))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: small_cnn().double(), "cannot be exported.*float64.*dtype=torch.float32"),
        (lambda: nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).half()), "found torch.float16, torch.float32"),
        (lambda: small_cnn().to("meta"), "meta device"),
        (lambda: type("Mine", (FusedGroupNorm,), {"forward": nn.Identity.forward})(2, 4), "its own forward"),
    ],
)
def test_models_that_cannot_be_lowered(make: Callable[[], nn.Module], match: str) -> None:
    with pytest.raises(ExportError, match=match):
        plain(make())


def test_dtype_float32_casts_a_copy() -> None:
    model = small_cnn().half()
    prepared, dtype, _ = plain(model, torch.float32)
    assert dtype == torch.float32
    assert prepared[0].weight.dtype == torch.float32
    assert model[0].weight.dtype == torch.float16


# arguments


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"target": "gpu"}, "unknown target.*expected portable or cpu or cuda.*found 'gpu'"),
        ({"dtype": torch.float64}, "no dtype for a file.*float64"),
        ({"threads": 0}, "threads out of range"),
        ({"opset": 22, "target": "cuda"}, "18 to 21 for target cuda"),
        ({"opset": 21, "dtype": torch.bfloat16}, "22 to 24 for target portable and torch.bfloat16"),
        ({"opset": 17}, "opset out of range"),
        ({"target": "cpu", "dtype": torch.bfloat16}, "no convolutions in bf16.*found bf16.*target cuda"),
        ({"path": "nowhere/net.onnx"}, "no such folder.*nowhere"),
        ({"example_input": ()}, "not an input.*found nothing"),
        ({"example_input": (1.0,)}, "not an input.*found float"),
        ({"example_input": torch.empty(0, 3, 8, 8)}, "empty example input"),
    ],
)
def test_bad_arguments_are_refused(tmp_path: Path, options: dict[str, Any], match: str) -> None:
    arguments = {"path": tmp_path / "net.onnx", "example_input": torch.ones(1, 3, 8, 8), **options}
    with pytest.raises(ArgumentError, match=match):
        export_onnx(small_cnn(), **arguments)
    assert not list(tmp_path.iterdir())


def test_an_example_that_the_model_does_not_take(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"does not run on the example input.*1, 4, 8, 8"):
        export_onnx(small_cnn(), tmp_path / "net.onnx", torch.ones(1, 4, 8, 8))


def test_wrapped_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WrappedModelError, match="DataParallel"):
        export_onnx(nn.DataParallel(small_cnn()), tmp_path / "net.onnx", torch.ones(1, 3, 8, 8))


def test_outputs_that_are_no_tensors_are_refused() -> None:
    with pytest.raises(ExportError, match=r"not made of tensors.*found Tensor, int"):
        _export._output_names({"a": torch.ones(1), "b": 3}, ())


def test_what_a_killed_export_left_is_cleared_away(tmp_path: Path) -> None:
    old, young, foreign = (tmp_path / f".{name}" for name in ("net.onnx.gnswap-new-a", "net.onnx.gnswap-new-b", "x"))
    for left in (old, young, foreign):
        left.mkdir()
        (left / "net.onnx").write_text("half of it")
    for left in (old, foreign):
        os.utime(left, (0, 0))
    export_onnx(small_cnn(), tmp_path / "net.onnx", torch.ones(1, 3, 8, 8))
    assert {entry.name for entry in tmp_path.iterdir()} == {"net.onnx", young.name, foreign.name}


def test_an_output_that_is_called_as_the_input(tmp_path: Path) -> None:
    class Named(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"input": x + 1, "logits": x * 2}

    x = torch.randn(2, 3)
    report = export_onnx(Named(), tmp_path / "net.onnx", x)
    assert [one.name for one in report.outputs] == ["output_input", "logits"]
    assert torch.equal(torch.as_tensor(run(report, x)[0]), x + 1)


def test_activations_are_all_covered() -> None:
    assert set(ACTIVATIONS) <= {module.fused_act for module in Variants().layers.values()}

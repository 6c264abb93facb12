"""validate_onnx, its providers and its clock: it passes what is right, and nothing else."""

from __future__ import annotations

import copy
import math
import sys
import types
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from _models import randomise_norms, small_cnn
from torch import Tensor, nn

from gnswap import _onnx_scopes, _parity, _providers, _stress
from gnswap._apply import apply
from gnswap._errors import ArgumentError, MissingDependencyError, ProviderError, ValidationError, WrappedModelError
from gnswap._export import export_onnx
from gnswap._parity import Parity
from gnswap._plan import plan
from gnswap._validate import validate_onnx

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="shows what happens without a CUDA device")


class TwoHeads(nn.Module):
    """Two inputs; logits, a map and integers out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = randomise_norms(small_cnn())

    def forward(self, image: Tensor, shift: Tensor) -> dict[str, Tensor]:
        logits = self.body(image) + shift
        return {"logits": logits, "map": self.body[:3](image), "label": logits.argmax(1)}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    network = TwoHeads()
    return apply(network, plan(network, groups=4)).eval()


@pytest.fixture(scope="module")
def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(2, 3, 12, 10, generator=generator), torch.randn(2, 5, generator=generator)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory, model: nn.Module, inputs: tuple[Tensor, Tensor]) -> Path:
    file = tmp_path_factory.mktemp("onnx") / "net.onnx"
    export_onnx(model, file, inputs)
    return file


@pytest.fixture(scope="module")
def parity(path: Path, model: nn.Module, inputs: tuple[Tensor, Tensor]) -> Parity:
    return validate_onnx(path, model, inputs, provider="cpu")


# what passes


def test_every_output_at_several_batches_and_sizes(parity: Parity) -> None:
    assert parity.passed
    assert {row.name for row in parity.outputs} == {"logits", "map", "label"}
    shapes = {row.inputs: row.input_shapes[0] for row in parity.outputs}
    assert shapes.items() > {"given": "2x3x12x10", "batch 1": "1x3x12x10", "batch 5": "5x3x12x10"}.items()
    assert shapes.items() > {"size 29x29": "1x3x29x29", "size 7x8": "1x3x7x8"}.items()
    assert 0 < parity.worst.relative_error < 1e-5
    assert Parity.from_json(parity.to_json()) == parity


def test_special_inputs(parity: Parity, inputs: tuple[Tensor, Tensor]) -> None:
    special = {"all zero", "constant", "mean/std 30", "tiny variance", "huge contrast"}
    assert special < {row.inputs for row in parity.outputs}
    made = dict(_stress.special_cases(inputs, [{"batch": 0}, {"batch": 0}]))
    assert all(image.shape == (1, 3, 12, 10) and shift.shape == (1, 5) for image, shift in made.values())
    assert not made["all zero"][0].any()
    assert made["constant"][0].unique().numel() == 1
    steep = made["mean/std 30"][0]
    assert float(steep.mean() / steep.std()) == pytest.approx(30, rel=0.1)
    assert float(made["tiny variance"][0].std() / inputs[0][:1].std()) == pytest.approx(1e-4, rel=0.1)
    assert float(made["huge contrast"][0].std() / inputs[0][:1].std()) == pytest.approx(1e3, rel=0.01)
    assert dict(_stress.special_cases((torch.tensor(2.0),), [{}]))["huge contrast"][0].shape == ()
    counted = torch.tensor([[1, 2]])
    assert not list(_stress.special_cases((counted,), [{}]))  # integers mean something


def test_bounds_follow_torch(parity: Parity) -> None:
    rows = [row for row in parity.outputs if row.name != "label"]
    assert all(row.torch_error is not None and row.torch_error < 1e-5 for row in rows)
    for row in rows:
        assert row.bound == _parity.bound_of(row.torch_error, torch.float32)
        assert row.error <= row.bound
    assert parity.precision == "float32"


def test_every_norm_is_compared(path: Path, model: nn.Module, inputs: tuple[Tensor, Tensor]) -> None:
    report = validate_onnx(
        path, model, inputs, provider="cpu", more_shapes=False, special_inputs=False, layers=True, original=TwoHeads()
    )
    assert report.passed
    assert [layer.name for layer in report.layers] == ["body.1", "body.4"]
    assert all(0 < layer.error < 1e-5 and 0 < layer.torch_error < 1e-5 for layer in report.layers)
    assert report.first_departure is None
    assert not report.notes
    given = {row.name: row for row in report.outputs}
    assert given["logits"].top1_original in (0.0, 0.5, 1.0)
    assert given["map"].top1_original is None
    assert {(row.provider, row.operator) for row in report.placement} > {("CPUExecutionProvider", "Conv")}


def test_only_logits_have_a_top1_agreement(parity: Parity) -> None:
    agreements = {row.name: row.top1_agreement for row in parity.outputs}
    assert agreements == {"logits": 1.0, "map": None, "label": None}


def test_the_model_is_given_back_as_it_was(path: Path, model: nn.Module, inputs: tuple[Tensor, Tensor]) -> None:
    network = copy.deepcopy(model).train()
    network.body[0].eval()
    flags = [module.training for module in network.modules()]
    assert validate_onnx(path, network, [inputs], provider="cpu", more_shapes=False).passed
    assert [module.training for module in network.modules()] == flags


def with_forward(model: nn.Module, forward: Any) -> nn.Module:
    """A copy of the model of another class, whose forward is given; `super().forward` is its first argument."""
    network = copy.deepcopy(model)
    inner = type(model).forward
    network.__class__ = type("Other", (type(model),), {"forward": lambda self, *xs: forward(partial(inner, self), *xs)})
    return network


def test_a_size_that_the_model_refuses_is_noted(path: Path, model: nn.Module, inputs: tuple[Tensor, Tensor]) -> None:
    def picky(inner: Any, image: Tensor, shift: Tensor) -> Any:
        if image.shape[2] != 12:
            raise RuntimeError("size")
        return inner(image, shift)

    report = validate_onnx(path, with_forward(model, picky), inputs, provider="cpu", special_inputs=False)
    assert report.passed
    assert report.notes == tuple(
        f"size {size} not compared, the model itself raises RuntimeError" for size in ("29x29", "7x8")
    )


# what does not pass


def tampered(path: Path, folder: Path, name: str, change: float) -> Path:
    proto = onnx.load(path)
    tensor = next(one for one in proto.graph.initializer if one.name == name)
    data = onnx.numpy_helper.to_array(tensor) + np.float32(change)
    tensor.CopyFrom(onnx.numpy_helper.from_array(data, name))
    onnx.save(proto, folder / "tampered.onnx")
    return folder / "tampered.onnx"


@pytest.mark.parametrize(("weight", "first"), [("body.0.weight", "body.1"), ("body.3.weight", "body.4")])
def test_a_tampered_file_fails_and_the_first_layer_is_named(
    path: Path, model: nn.Module, inputs: tuple[Tensor, Tensor], tmp_path: Path, weight: str, first: str
) -> None:
    file = tampered(path, tmp_path, weight, 1e-2)
    report = validate_onnx(file, model, inputs, provider="cpu", more_shapes=False, special_inputs=False, layers=True)
    assert not report.passed
    assert report.first_departure is not None
    assert report.first_departure.name == first
    assert report.first_departure.error > 1e-3
    assert Parity.from_json(report.to_json()) == report


def test_a_tampered_classifier_fails_after_every_norm(
    path: Path, model: nn.Module, inputs: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    file = tampered(path, tmp_path, "body.8.weight", 1e-4)
    report = validate_onnx(file, model, inputs, provider="cpu", more_shapes=False, special_inputs=False, layers=True)
    assert not report.passed
    assert report.first_departure is None
    assert {row.name for row in report.outputs if not row.passed} >= {"logits"}
    assert all(row.passed for row in report.outputs if row.name == "map")


def test_a_wrong_eps_shows_on_special_inputs(
    path: Path, model: nn.Module, inputs: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    """On ordinary inputs eps is lost beside a variance of 1; a picture of one colour needs it."""
    proto = onnx.load(path)
    for node in proto.graph.node:
        for attribute in node.attribute:
            if attribute.name == "epsilon":
                attribute.f *= 1.01
    onnx.save(proto, tmp_path / "eps.onnx")
    report = validate_onnx(tmp_path / "eps.onnx", model, inputs, provider="cpu", more_shapes=False)
    assert "constant" in {row.inputs for row in report.outputs if not row.passed}


def test_the_unsafe_group_normalization_fails_at_mean_std_30(tmp_path: Path) -> None:
    """onnxruntime has no kernel for GroupNormalization and computes E[x²]-E[x]² in its place."""
    node = onnx.helper.make_node("GroupNormalization", ["x", "scale", "bias"], ["y"], num_groups=2)
    ends = [onnx.helper.make_tensor_value_info(name, 1, ["batch", 8, 32, 32]) for name in "xy"]
    vectors = [onnx.helper.make_tensor(name, 1, [8], [value] * 8) for name, value in (("scale", 1.0), ("bias", 0.0))]
    graph = onnx.helper.make_graph([node], "g", ends[:1], ends[1:], vectors)
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10),
        tmp_path / "unsafe.onnx",
    )
    x = torch.randn(2, 8, 32, 32, generator=torch.Generator().manual_seed(0))
    report = validate_onnx(tmp_path / "unsafe.onnx", nn.GroupNorm(2, 8), x, provider="cpu")
    rows = {row.inputs: row for row in report.outputs}
    assert rows["given"].passed
    assert not rows["mean/std 30"].passed
    assert rows["mean/std 30"].error > 100 * rows["given"].error


def test_channels_in_another_order() -> None:
    exact = torch.randn(2, 6, 5, 5, generator=torch.Generator().manual_seed(1)).double().relu()
    exact[:, 2:4] = 0  # dead channels, which nothing tells apart
    order = torch.tensor([3, 5, 0, 2, 1, 4])
    for found, passes, reordered in (
        (exact, True, False),
        (exact[:, order] + 1e-9, True, True),
        (exact[:, order] + 1e-3, False, True),
        (exact * 1.1, False, False),
        (exact * math.nan, False, False),
    ):
        layer = _parity.layer_row("bn", "y", found, exact, exact, precision=torch.float32)
        assert (layer.passed, layer.reordered) == (passes, reordered)


def test_the_result_of_a_layer_is_what_others_read() -> None:
    """Not what it makes of constants and lends to others, and not what it keeps to itself."""
    node = onnx.helper.make_node
    nodes = [
        node("ConstantOfShape", ["shape"], ["ones"], name="a.bn/ConstantOfShape"),
        node("Shape", ["x"], ["size"], name="a.bn/Shape"),
        node("Mul", ["x", "ones"], ["m"], name="a.bn/Mul"),
        node("Relu", ["m"], ["r"], name="a.bn.act/Relu"),
        node("Mul", ["r", "ones"], ["n"], name="a.bn1/Mul"),
        node("Reshape", ["n", "size"], ["y"], name="a.bn1/Reshape"),
    ]
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [4]) for name in "xy"]
    graph = onnx.helper.make_graph(nodes, "g", ends[:1], ends[1:], [onnx.helper.make_tensor("shape", 7, [1], [4])])
    paths = {"a.bn": ("a.bn", "b.bn"), "a.bn1": ("a.bn1",), "elsewhere": ("c",)}
    assert _onnx_scopes.results(graph, paths) == {"a.bn": ("r",), "a.bn1": ("y",), "elsewhere": ()}


def test_layers_of_a_file_that_names_none(
    path: Path, model: nn.Module, inputs: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    proto = onnx.load(path)
    for number, node in enumerate(proto.graph.node):
        node.name = f"node_{number}"
    onnx.save(proto, tmp_path / "nameless.onnx")
    report = validate_onnx(
        tmp_path / "nameless.onnx",
        model,
        inputs,
        provider="cpu",
        more_shapes=False,
        special_inputs=False,
        layers=True,
    )
    assert report.passed
    assert not report.layers
    assert "2 of 2 layers not compared" in report.notes[0]
    assert "body.1, body.4" in report.notes[0]


def test_a_model_without_fp64_gets_a_fixed_bound(path: Path, model: nn.Module, inputs: tuple[Tensor, Tensor]) -> None:
    network = with_forward(model, lambda inner, image, shift: inner(image.float(), shift.float()))
    report = validate_onnx(path, network, inputs, provider="cpu", more_shapes=False, special_inputs=False, layers=True)
    rows = {row.name: row for row in report.outputs}
    assert report.passed
    assert (rows["logits"].error, rows["logits"].bound) == (None, 1e-4)
    assert "does not run in fp64" in report.notes[0]
    assert "layers not compared" in report.notes[1]


def test_a_forward_of_the_instance(path: Path, model: nn.Module, inputs: tuple[Tensor, Tensor]) -> None:
    """A copy of it still runs the model that it was copied from, so nothing is known about single layers."""
    network = copy.deepcopy(model)
    inner = network.forward
    network.forward = lambda image, shift: inner(image.float(), shift.float())  # type: ignore[method-assign]
    report = validate_onnx(path, network, inputs, provider="cpu", more_shapes=False, special_inputs=False, layers=True)
    assert report.passed
    assert "layers not compared" in report.notes[0]


def test_nan_never_passes(path: Path, model: nn.Module, inputs: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    file = tampered(path, tmp_path, "body.8.bias", math.nan)
    report = validate_onnx(file, model, inputs, provider="cpu", tolerance=1e30)
    assert not report.passed
    assert report.worst.max_error == math.inf
    assert Parity.from_json(report.to_json()) == report


def test_a_model_that_is_not_finite_cannot_judge(path: Path, model: nn.Module, inputs: tuple[Tensor, Tensor]) -> None:
    network = copy.deepcopy(model)
    with torch.no_grad():
        network.body[8].bias[0] = math.nan
    with pytest.raises(ValidationError, match=r"own output is not finite.*logits"):
        validate_onnx(path, network, inputs, provider="cpu")


def test_another_model_fails_or_is_refused(path: Path, inputs: tuple[Tensor, Tensor]) -> None:
    class OneHead(TwoHeads):
        def forward(self, image: Tensor, shift: Tensor) -> Any:
            return super().forward(image, shift)["logits"]

    class Transposed(TwoHeads):
        def forward(self, image: Tensor, shift: Tensor) -> Any:
            return {
                name: value.mT if value.dim() > 1 else value for name, value in super().forward(image, shift).items()
            }

    assert not validate_onnx(path, TwoHeads(), inputs, provider="cpu").passed
    with pytest.raises(ValidationError, match=r"different numbers of outputs.*expected 1 \(torch\), found 3"):
        validate_onnx(path, OneHead(), inputs, provider="cpu")
    with pytest.raises(ValidationError, match=r"different shapes.*logits.*expected \(5, 2\)"):
        validate_onnx(path, Transposed(), inputs, provider="cpu")


def test_no_rows_are_no_pass(parity: Parity) -> None:
    empty = Parity(parity.path, "cpu", 1e-4, (), (), {})
    assert not empty.passed


def row(found: Tensor, own: Tensor, exact: Tensor | None, **options: Any) -> _parity.OutputParity:
    options = {"precision": torch.float32, **options}
    return _parity.output_row("y", "given", ("1x2",), found, own, exact, **options)


def test_an_error_is_measured_against_the_largest_output() -> None:
    own = torch.tensor([[100.0, 0.0]])
    one = row(torch.tensor([[100.0, 0.5]]), own, own.double(), tolerance=1e-2)
    assert (one.max_error, one.scale, one.relative_error, one.error, one.passed) == (0.5, 100.0, 0.005, 0.005, True)
    assert not row(torch.tensor([0.5]), torch.tensor([0.0]), torch.zeros(1).double(), tolerance=1e-2).passed
    assert not row(torch.tensor([3]), torch.tensor([4]), None, tolerance=1e2).passed  # integers: equal
    assert row(torch.zeros(0, 2), torch.zeros(0, 2), torch.zeros(0, 2).double()).passed


def test_a_bound_is_as_wide_as_torch_is_off() -> None:
    exact, found = torch.ones(1, 2).double(), torch.full((1, 2), 1 + 1e-5)
    sharp = row(found, exact.float(), exact)
    assert not sharp.passed
    assert sharp.bound == _parity.FLOOR_IN_EPS * torch.finfo(torch.float32).eps
    assert row(found, exact.float() + 1e-6, exact).passed  # torch is off by 1e-6 itself
    lost = row(found, exact.float() + 1e-2, exact)
    assert lost.bound == _parity.CAP[torch.float32]  # a network that torch computes to 2 digits proves nothing
    half = row(found, exact.half(), exact, precision=torch.float16)
    assert half.passed
    assert half.bound > 100 * sharp.bound
    assert row(found, exact.float(), None).bound == _parity.WITHOUT_EXACT[torch.float32]


def test_a_capped_bound_is_noted(path: Path, model: nn.Module, inputs: tuple[Tensor, Tensor]) -> None:
    def rough(inner: Any, image: Tensor, shift: Tensor) -> Any:
        digits = 1.0 if image.dtype == torch.float64 else 1.01
        outputs = inner(image, shift)
        return {name: value * digits if value.is_floating_point() else value for name, value in outputs.items()}

    network = with_forward(model, rough)
    report = validate_onnx(path, network, inputs, provider="cpu", more_shapes=False, special_inputs=False)
    assert "logits, given: torch's own error in torch.float32 is 1.0e-02; the bound is capped" in report.notes


def test_special_inputs_that_torch_cannot_do(path: Path, model: nn.Module, inputs: tuple[Tensor, Tensor]) -> None:
    network = with_forward(
        model, lambda inner, image, shift: inner(image.log(), shift) if not image.any() else inner(image, shift)
    )
    report = validate_onnx(path, network, inputs, provider="cpu", more_shapes=False)
    assert report.notes == ("all zero not compared, torch's own output in torch.float32 is not finite",)


@pytest.mark.parametrize(("kind", "precision"), [("FLOAT16", "float16"), ("BFLOAT16", "bfloat16")])
def test_half_precision_files(tmp_path: Path, kind: str, precision: str) -> None:
    """One Gemm in half precision; torch's own half-precision run sets the bound, and a file that is off fails."""
    torch.manual_seed(0)
    model = nn.Linear(16, 8)
    half = getattr(torch, precision)
    helper, number = onnx.helper, onnx.TensorProto.DataType.Value(kind)

    def write(weight: Tensor) -> Path:
        casts = [helper.make_node("Cast", [name], [f"{name}32"], to=1) for name in ("input", "weight", "bias")]
        nodes = [
            *casts,
            helper.make_node("Gemm", ["input32", "weight32", "bias32"], ["wide"], transB=1),
            helper.make_node("Cast", ["wide"], ["output"], to=number),
        ]
        constants = [
            helper.make_tensor(name, number, value.shape, value.detach().flatten().tolist())
            for name, value in (("weight", weight), ("bias", model.bias))
        ]
        ends = [
            helper.make_tensor_value_info(name, number, ["batch", size])
            for name, size in (("input", 16), ("output", 8))
        ]
        graph = helper.make_graph(nodes, "linear", ends[:1], ends[1:], constants)
        proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
        onnx.save(proto, tmp_path / "half.onnx")
        return tmp_path / "half.onnx"

    report = validate_onnx(write(model.weight), model, torch.randn(4, 16), provider="cpu")
    assert report.passed, report
    assert report.precision == precision
    bounds = {round(row.bound / torch.finfo(half).eps) for row in report.outputs}
    assert min(bounds) >= 16
    assert not validate_onnx(write(model.weight + 0.3), model, torch.randn(4, 16), provider="cpu").passed


# arguments


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        ([], "no inputs"),
        ((), "no inputs"),
        ([()], "not a batch of inputs.*empty tuple"),
        ((torch.ones(0, 3, 12, 10), torch.ones(0, 5)), r"not a batch.*Tensor \(0, 3, 12, 10\)"),
        ([("a", "b")], "not a batch of inputs.*found str"),
        (torch.ones(2, 3, 12, 10), r"wrong number of inputs.*expected 2 \(image, shift\), found 1"),
        ((torch.ones(2, 4, 12, 10), torch.ones(2, 5)), "image.*batchx3xheightxwidth, found 2x4x12x10"),
        ((torch.ones(2, 3, 12), torch.ones(2, 5)), "does not take this shape.*found 2x3x12"),
        ((torch.ones(2, 3, 12, 10), torch.ones(2, 5).double()), "does not take this dtype.*shift.*float64"),
    ],
)
def test_bad_inputs_are_refused(path: Path, model: nn.Module, bad: Any, match: str) -> None:
    with pytest.raises(ArgumentError, match=match):
        validate_onnx(path, model, bad, provider="cpu")


def test_inputs_that_do_not_belong_together(path: Path) -> None:
    mixed = (torch.ones(2, 3, 12, 10), torch.ones(3, 5))
    with pytest.raises(ValidationError, match="onnxruntime fails on an input"):
        _providers.run(_providers.open_session(path, "cpu"), mixed)


@pytest.mark.parametrize("tolerance", [0.0, math.nan, math.inf])
def test_a_tolerance_that_decides_nothing(path: Path, model: nn.Module, tolerance: float) -> None:
    with pytest.raises(ArgumentError, match="tolerance out of range"):
        validate_onnx(path, model, torch.ones(1), provider="cpu", tolerance=tolerance)


def test_files_and_models_that_are_none(path: Path, model: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="no such file"):
        validate_onnx(tmp_path / "none.onnx", model, torch.ones(1), provider="cpu")
    (tmp_path / "cut.onnx").write_bytes(path.read_bytes()[:300])
    with pytest.raises(ValidationError, match=r"onnxruntime cannot run the file.*cut.onnx.*export it again"):
        validate_onnx(tmp_path / "cut.onnx", model, torch.ones(1), provider="cpu")
    group_norm = onnx.helper.make_node(
        "GroupNorm", ["x", "g", "b"], ["y"], domain="com.microsoft", groups=2, activation=0
    )
    ends = [onnx.helper.make_tensor_value_info(name, 1, [1, 4, 4, 4]) for name in "xy"]
    vectors = [onnx.helper.make_tensor(name, 1, [4], [1.0] * 4) for name in "gb"]
    graph = onnx.helper.make_graph([group_norm], "g", ends[:1], ends[1:], vectors)
    contrib = [onnx.helper.make_opsetid("", 18), onnx.helper.make_opsetid("com.microsoft", 1)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=contrib, ir_version=9), tmp_path / "contrib.onnx")
    with pytest.raises(ValidationError, match=r"GroupNorm.*The CPU has no kernel for this operator.*provider='cuda'"):
        validate_onnx(tmp_path / "contrib.onnx", model, torch.ones(1), provider="cpu")
    with pytest.raises(WrappedModelError, match="DataParallel"):
        validate_onnx(path, nn.DataParallel(model), torch.ones(1), provider="cpu")


# providers


@needs_no_gpu
@pytest.mark.parametrize(("provider", "library"), [("cuda", "libcu"), ("tensorrt", "libnvinfer.so")])
def test_pitfall_42_a_provider_that_cannot_run_is_an_error_that_says_what_is_missing(
    path: Path,
    model: nn.Module,
    inputs: tuple[Tensor, Tensor],
    capfd: pytest.CaptureFixture[str],
    provider: str,
    library: str,
) -> None:
    with pytest.raises(ProviderError, match=f"'{provider}' does not run on this machine.*missing libraries.*{library}"):
        validate_onnx(path, model, inputs, provider=provider)
    heard = capfd.readouterr()
    assert heard.out == heard.err == ""


def assignment(**nodes: list[str]) -> list[Any]:
    def part(provider: str, names: list[str]) -> Any:
        listed = [types.SimpleNamespace(name=name, op_type="Shape", domain="") for name in names]
        return types.SimpleNamespace(ep_name=provider, get_nodes=lambda: listed)

    return [part(provider, names) for provider, names in nodes.items()]


def test_pitfall_42_one_node_on_the_cpu_is_an_error_that_names_it() -> None:
    _providers.require_placement(assignment(CUDAExecutionProvider=["a", "b"]), "CUDAExecutionProvider")
    mixed = assignment(CUDAExecutionProvider=["a", "b"], CPUExecutionProvider=["bn1/Shape"])
    with pytest.raises(ProviderError, match=r"1 nodes would not run.*bn1/Shape \(Shape\) on CPUExecutionProvider"):
        _providers.require_placement(mixed, "CUDAExecutionProvider")
    many = assignment(CPUExecutionProvider=[f"n{number}" for number in range(14)])
    with pytest.raises(ProviderError, match=r"14 nodes.*and 4 more"):
        _providers.require_placement(many, "CUDAExecutionProvider")


def test_pitfall_42_no_assignment_proves_nothing() -> None:
    with pytest.raises(ProviderError, match="did not say where"):
        _providers.require_placement([], "CUDAExecutionProvider")


def test_pitfall_42_a_session_that_moved_elsewhere_is_an_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = types.SimpleNamespace(get_providers=lambda: ["CPUExecutionProvider"])
    monkeypatch.setattr(_providers, "_construct", lambda *_arguments: session)
    monkeypatch.setattr(_providers, "missing_libraries", lambda _provider: ())
    with pytest.raises(ProviderError, match="the session runs on CPUExecutionProvider"):
        _providers.open_session(path, "cuda")


def test_pitfall_42_a_refused_fallback_names_the_nodes(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime refuses without a name; the nodes come from a second session that is never run."""
    loose = types.SimpleNamespace(
        get_providers=lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"],
        get_provider_graph_assignment_info=lambda: assignment(
            CUDAExecutionProvider=["a"], CPUExecutionProvider=["odd"]
        ),
    )

    def construct(_runtime: Any, _path: Any, _wanted: str, options: dict[str, str], *_more: Any) -> Any:
        if "session.disable_cpu_ep_fallback" in options:
            raise RuntimeError("fallback to CPU EP has been explicitly disabled")
        return loose

    monkeypatch.setattr(_providers, "_construct", construct)
    with pytest.raises(ProviderError, match=r"1 nodes would not run.*odd"):
        _providers.open_session(path, "cuda")


def test_unknown_providers_and_builds(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ArgumentError, match=r"unknown provider.*cpu, cuda, tensorrt.*'gpu'"):
        _providers.open_session(path, "gpu")
    runtime = types.SimpleNamespace(get_available_providers=lambda: ["CPUExecutionProvider"])
    monkeypatch.setattr(_providers, "require_onnxruntime", lambda: runtime)
    with pytest.raises(ProviderError, match=r"this build of onnxruntime has no CUDA.*pip install onnxruntime-gpu"):
        _providers.open_session(path, "cuda")


def test_a_missing_onnxruntime_says_what_to_install(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'gnswap\[onnx\]'"):
        _providers.open_session(path, "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_file_runs_on_cuda_alone(
    model: nn.Module, inputs: tuple[Tensor, Tensor], tmp_path: Path, dtype: torch.dtype
) -> None:
    options: dict[str, Any] = {"target": "cuda", "dtype": dtype, "dynamic_batch": False, "dynamic_size": False}
    export_onnx(model, tmp_path / "cuda.onnx", inputs, **options)
    report = validate_onnx(tmp_path / "cuda.onnx", model, inputs, provider="cuda", layers=True)
    assert report.passed, report
    assert {row.provider for row in report.placement} == {"CUDAExecutionProvider"}
    assert len(report.layers) == 2

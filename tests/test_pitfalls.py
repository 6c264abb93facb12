"""The pitfalls of swapping norms, by number: what went wrong in other tools, and the tests that it does not here.

`_pitfalls.py` is the index. Most pitfalls are tested where the code is; here are those that belong to no single module.
"""

from __future__ import annotations

import ast
import copy
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import timm
import torch
import torch.nn.functional as F
from _models import build, mlp, randomise_norms, small_cnn
from _pitfalls import PITFALLS
from timm.layers import BatchNormAct2d
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

import gnswap
from gnswap import FusedGroupNorm

TESTS = Path(__file__).parent


@cache
def names_in(path: Path) -> frozenset[str]:
    """The tests of a file, as pytest names them."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        inside = node.body if isinstance(node, ast.ClassDef) else [node]
        prefix = f"{node.name}::" if isinstance(node, ast.ClassDef) else ""
        found |= {prefix + one.name for one in inside if isinstance(one, ast.FunctionDef)}
    return frozenset(found)


def missing(tests: tuple[str, ...]) -> list[str]:
    """Those that are not there."""
    parts = [test.partition("::") for test in tests]
    return [f"{file}::{name}" for file, _, name in parts if name not in names_in(TESTS / f"{file}.py")]


@pytest.mark.parametrize("number", range(1, 44))
def test_every_pitfall_has_its_tests(number: int) -> None:
    assert PITFALLS[number]
    assert missing(PITFALLS[number]) == []


def test_a_renamed_test_would_be_seen() -> None:
    gone = ("test_apply::test_that_was_renamed", "test_heal::TestRefusals::test_gone", "test_revert::test_meta_device")
    assert missing(gone) == list(gone[:2])


# discovery and matching


def test_pitfall_01_every_fused_activation_is_kept() -> None:
    """Of EfficientNet-B0's 49 norms, 33 are fused with SiLU; tools that match BatchNorm2d only find none."""
    with torch.device("meta"):
        model = timm.create_model("efficientnet_b0")
    converted = gnswap.convert(model).model
    layers = {path: module for path, module in converted.named_modules() if isinstance(module, FusedGroupNorm)}
    assert len(layers) == 49
    assert gnswap.inspect(converted).sites == ()
    for path, layer in layers.items():
        norm = model.get_submodule(path)
        assert isinstance(norm, BatchNormAct2d)
        assert (type(layer.act), type(layer.drop)) == (type(norm.act), type(norm.drop))
    assert sum(layer.fused_act == "silu" for layer in layers.values()) == 33


class Doubled(nn.BatchNorm2d):
    """A BatchNorm that does something of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


def test_pitfall_02_what_is_left_stays_in_sight() -> None:
    """In the report, in the converted model's own inventory, and unchanged in the model."""
    model = nn.Sequential(nn.Conv2d(3, 8, 1), Doubled(8), nn.BatchNorm2d(8))
    conversion = gnswap.convert(model)
    assert (conversion.report.swapped, conversion.report.kept) == (1, 1)
    assert "kept 1: Doubled is a subclass of BatchNorm unknown to gnswap" in conversion.report.notes[0]
    (left,) = gnswap.inspect(conversion.model).sites
    assert (left.name, left.refusal is None) == ("1", False)
    assert type(conversion.model[1]) is Doubled


class GroupNorm2d(nn.modules.batchnorm._BatchNorm):
    """As FedML has it: a GroupNorm that inherits from BatchNorm."""

    def _check_input_dim(self, x: Tensor) -> None: ...

    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x, 2, self.weight, self.bias)


class _BatchNormXd(nn.modules.batchnorm._BatchNorm):
    """As mmengine has it: a BatchNorm of any dimension."""

    def _check_input_dim(self, x: Tensor) -> None: ...


@pytest.mark.parametrize("kind", [GroupNorm2d, _BatchNormXd])
def test_pitfall_03_other_packages_subclasses_are_refused(kind: type[nn.Module]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), kind(8))
    (site,) = gnswap.inspect(model).sites
    assert site.refusal == f"{kind.__name__} is a subclass of BatchNorm unknown to gnswap: see gnswap.register_norm"
    with pytest.raises(gnswap.NothingToSwapError, match=f"1 layer kept.*{kind.__name__}"):
        gnswap.convert(model)


# state


def test_pitfall_19_no_decay_groups() -> None:
    """Groups by shape stay as they are; groups by class have to name the new class, as `apply` says."""
    model = small_cnn()
    converted = gnswap.convert(model).model

    def undecayed(network: nn.Module) -> set[str]:
        names = {id(parameter): name for name, parameter in network.named_parameters()}
        groups = param_groups_weight_decay(network, weight_decay=0.1)
        return {names[id(p)] for group in groups if group["weight_decay"] == 0 for p in group["params"]}

    def by_class(network: nn.Module, *kinds: type[nn.Module]) -> set[str]:
        return {
            f"{path}.{name}"
            for path, module in network.named_modules()
            if isinstance(module, kinds)
            for name, _ in module.named_parameters(recurse=False)
        }

    assert undecayed(converted) == undecayed(model)
    assert by_class(converted, nn.BatchNorm2d) == set()
    assert by_class(converted, nn.BatchNorm2d, FusedGroupNorm) == by_class(model, nn.BatchNorm2d)


# numbers of groups


def test_pitfall_26_vectors_and_maps_of_one_pixel_keep_what_they_say() -> None:
    """A norm behind global pooling sees one value a channel: groups of one are beta, whatever the input."""
    pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 64, 1), nn.BatchNorm2d(64), nn.Flatten())
    for model, shape in ((pooled, (1, 8, 6, 6)), (mlp()[:2], (1, 6))):
        one, other = (torch.randn(shape) * 2 for _ in range(2))
        converted = gnswap.convert(randomise_norms(model).eval()).model.train()  # BatchNorm raises here, or gives beta
        with torch.no_grad():
            expected = model(one) - model(other)
            difference = converted(one) - converted(other)
        assert float(F.cosine_similarity(difference, expected)) > 0.9
        assert 0.5 < float(difference.norm() / expected.norm()) < 2


# numerics


def test_pitfall_29_zero_variance_compiled_as_eager() -> None:
    norm = FusedGroupNorm(2, 8, act="relu")
    nn.init.normal_(norm.bias)
    x = torch.full((2, 8, 5, 5), 3.0)
    found = []
    for forward in (norm, torch.compile(norm, backend="aot_eager", fullgraph=True)):
        leaf = x.clone().requires_grad_()
        y = forward(leaf)
        (gradient,) = torch.autograd.grad(y.square().sum(), leaf)
        assert y.isfinite().all()
        assert gradient.isfinite().all()
        found.append((y, gradient))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_pitfall_32_backward_hooks_and_in_place_activations() -> None:
    """torch forbids the two together behind any module; an activation inside the layer has no such trouble."""
    for norm in (nn.BatchNorm2d(8), FusedGroupNorm(2, 8)):
        norm.register_full_backward_hook(lambda *_: None)
        with pytest.raises(RuntimeError, match=r"BackwardHookFunction.*modified inplace"):
            nn.ReLU(inplace=True)(norm(torch.randn(2, 8, 4, 4, requires_grad=True)))
    seen = []
    fused = FusedGroupNorm(2, 8, act=nn.ReLU(inplace=True))
    fused.register_full_backward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    x = torch.randn(2, 8, 4, 4, requires_grad=True)
    fused(x).square().sum().backward()
    (expected,) = torch.autograd.grad(torch.relu(F.group_norm(x, 2)).square().sum(), x)
    torch.testing.assert_close(x.grad, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(seen[0], x.grad)


# channel order


class Mixed(nn.Module):
    """Whatever mixes channels by position, behind norms with orders of their own; names that look alike."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1_1, self.norm1_1 = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.conv11, self.norm11 = nn.Conv2d(2, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.grouped, self.norm2 = nn.Conv2d(16, 16, 3, padding=1, groups=4), nn.BatchNorm2d(16)
        self.up, self.norm3 = nn.ConvTranspose2d(16, 8, 2, stride=2), nn.BatchNorm2d(8)
        self.mask = nn.Conv2d(8, 1, 1)  # one output channel: no depthwise conv
        self.layer_norm, self.query = nn.LayerNorm(8), nn.Linear(8, 8)
        self.norm4, self.head = nn.BatchNorm2d(32), nn.Linear(32 * 16, 4)

    def forward(self, image: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        one = torch.relu(self.norm1_1(self.conv1_1(image)))
        two = torch.relu(self.norm11(self.conv11(other)))
        # a channel shuffle, as in ShuffleNet
        n, c, h, w = one.shape
        shuffled = one.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        left, right = self.norm2(self.grouped(shuffled)).chunk(2, dim=1)
        nested = torch.cat([torch.cat([left, two], dim=1), right], dim=1)
        large = self.norm3(self.up(two))
        tokens = self.layer_norm(large.flatten(2).transpose(1, 2))
        attended = (self.query(tokens) @ tokens.transpose(1, 2) / 8).softmax(-1) @ tokens
        masked = attended.transpose(1, 2).reshape(large.shape) * torch.sigmoid(self.mask(large))
        return self.head(self.norm4(nested).flatten(1)), masked


def ordered(seed: int = 0) -> tuple[nn.Module, nn.Module]:
    """`Mixed`, and the same converted with a random order for every norm."""
    model = randomise_norms(Mixed(), seed).eval()
    made = gnswap.plan(model, group_size=4, softness=0)
    for decision in made.decisions:
        order = tuple(torch.randperm(decision.num_channels).tolist())
        made = made.edit(decision.name, channel_order=order)
    return model, gnswap.apply(model, made)


def test_pitfalls_34_and_36_orders_through_whatever_mixes_channels(tmp_path: Path) -> None:
    _, converted = ordered()
    inputs = (torch.randn(2, 3, 4, 4), torch.randn(2, 2, 4, 4))
    report = gnswap.export_onnx(converted, tmp_path / "net.onnx", inputs, target="cpu", dynamic_size=False)
    session = onnxruntime.InferenceSession(report.path, providers=["CPUExecutionProvider"])
    feeds = dict(zip([one.name for one in session.get_inputs()], [x.numpy() for x in inputs], strict=True))
    with torch.no_grad():
        expected = converted.double()(*(x.double() for x in inputs))
    for found, wanted in zip(session.run(None, feeds), expected, strict=True):
        assert float((torch.from_numpy(found) - wanted).abs().max()) < 1e-5 * float(wanted.abs().max())
    assert len(report.norms) == 5
    assert "1 Gather" in {one.channel_order for one in report.norms}, "the other one went into the weights"


def test_pitfall_36_names_do_not_collide() -> None:
    model, _ = ordered()
    made = gnswap.plan(model, exclude="norm1_1", overrides={"norm11": {"groups": 2}})
    groups = {decision.name: decision.num_groups for decision in made.swaps}
    assert groups["norm11"] == 2
    assert "norm1_1" not in groups
    assert type(gnswap.apply(model, made).norm1_1) is nn.BatchNorm2d


@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (nn.BatchNorm1d(12), (9,)),
        (nn.BatchNorm2d(12), (4, 5)),
        (nn.BatchNorm3d(12), (2, 3, 4)),
        (nn.SyncBatchNorm(12), (4, 5)),
        (BatchNormAct2d(12), (4, 5)),
        (FrozenBatchNorm2d(12), (4, 5)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_pitfall_35_an_order_moves_all_state_of_every_type(norm: nn.Module, shape: Any) -> None:
    """The same as a norm whose gamma, beta, mean and variance were permuted by hand, on permuted channels."""
    norm = randomise_norms(norm).eval()
    order = torch.randperm(12)
    by_hand = copy.deepcopy(norm)
    for tensor in (by_hand.weight, by_hand.bias, by_hand.running_mean, by_hand.running_var):
        tensor.data.copy_(tensor[order])
    natural = gnswap.plan(norm, overrides={"(root)": {"groups": 3, "softness": 0.5}})
    x = torch.randn(2, 12, *shape)
    found = gnswap.apply(norm, natural.edit("*", channel_order=tuple(order.tolist())))(x)
    expected = gnswap.apply(by_hand, natural)(x[:, order])
    torch.testing.assert_close(found[:, order], expected, rtol=1e-5, atol=1e-5)


class Branching(nn.Module):
    """Control flow that depends on values: no tracer follows it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.norm(self.conv(x)))
        return y if y.detach().sum().item() > 0 else -y


def test_pitfall_37_orders_need_no_trace() -> None:
    model = randomise_norms(Branching()).eval()
    order = torch.randperm(16)
    conversion = gnswap.convert(model, groups=4, softness=0, order={"norm": order.tolist()}, absorb=True)
    x = torch.randn(2, 3, 4, 4)
    natural = gnswap.convert(model, groups=4, softness=0).model
    assert conversion.model(x).isfinite().all()
    assert not torch.allclose(conversion.model(x), natural(x))
    assert torch.equal(conversion.model.norm.channel_order, order)
    assert any("torch.fx cannot follow it" in note for note in conversion.report.notes)


PLAN = """
import hashlib, torch, gnswap
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3), torch.nn.BatchNorm2d(16), torch.nn.ReLU()).eval()
made = gnswap.plan(net, group_size=4, calibration=[torch.randn(16, 3, 8, 8)])
assert all(decision.channel_order for decision in made.decisions)
digest = hashlib.sha256(made.to_json().encode()).hexdigest()
"""


def test_pitfall_38_another_process_makes_the_same_plan() -> None:
    """With another hash seed, as every rank of a job has it; photos have all the say in the plan."""
    environment = os.environ | {"PYTHONHASHSEED": "12345", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-c", PLAN + "print(digest)"]
    out = subprocess.run(command, capture_output=True, text=True, cwd=TESTS.parent, env=environment)
    assert out.returncode == 0, out.stderr
    here: dict[str, Any] = {}
    exec(PLAN, here)
    assert out.stdout.strip() == here["digest"]


# calibration


def test_pitfall_39_calibration_leaves_everything_as_it_was() -> None:
    """Flags, random state, gradients, hooks, momentum, counters, and whether gradients are recorded."""
    model, x = build("plain")
    model.train()
    model[4].eval()
    model[1].momentum = 0.37
    model(x).sum().backward()
    calls: list[nn.Module] = []
    handle = model[1].register_forward_hook(lambda module, *_: calls.append(module))
    state = copy.deepcopy(model.state_dict())
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    flags, random = [module.training for module in model.modules()], torch.get_rng_state()
    gnswap.plan(model, group_size=4, calibration=iter(x.split(1)))
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.is_grad_enabled()
    assert [module.training for module in model.modules()] == flags
    assert model[1].momentum == 0.37
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(p.grad, was) for p, was in zip(model.parameters(), gradients, strict=True))
    assert calls, "the user's own hook went on working"
    handle.remove()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_pitfall_40_photos_help_on_other_photos() -> None:
    """At the answers and in the mean over the layers, on photos that chose nothing; gamma keeps its sign."""

    def photos(count: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        contrast = torch.rand(count, 1, 1, 1, generator=generator) * 1.5 + 0.25
        shift = torch.randn(count, 3, 1, 1, generator=generator)
        return torch.randn(count, 3, 8, 8, generator=generator) * contrast + shift

    model = randomise_norms(small_cnn()).train()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = None
            norm.reset_running_stats()
    with torch.no_grad():
        for part in photos(512, 1).split(64):
            model(part)
    model.eval()
    options: dict[str, Any] = {"group_size": 4, "softness": 0}
    without = gnswap.convert(model, **options).model
    helped = gnswap.convert(model, **options, calibration=[photos(64, 2)]).model
    others = [photos(256, 3)]
    before, after = gnswap.compare(model, without, others), gnswap.compare(model, helped, others)
    assert after.logit_error < before.logit_error
    mean_before, mean_after = (
        sum(layer.relative_error for layer in one.layers) / len(one.layers) for one in (before, after)
    )
    assert mean_after < mean_before
    assert (model[1].weight < 0).any()
    assert torch.equal(helped[1].weight, model[1].weight)

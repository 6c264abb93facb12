"""Networks of other packages than timm, the whole way; `examples/benchmarks/beyond_timm.py` makes the table of all."""

from __future__ import annotations

import warnings
from pathlib import Path

import onnxruntime
import pytest
import torch
from _networks import NETWORKS, Network
from _whole_way import leaves, whole_way

import gnswap
from gnswap._sites import find_norms

TESTED = [network for network in NETWORKS if network.tested]
SWAPPED = [network for network in TESTED if network.swapped]


@pytest.fixture
def network(request: pytest.FixtureRequest) -> Network:
    """One of the networks, where its package is installed."""
    found: Network = request.param
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of packages while they are imported
        pytest.importorskip(found.package)
    return found


@pytest.mark.parametrize("network", SWAPPED, ids=str, indirect=True)
def test_the_whole_way(network: Network) -> None:
    model = network.made()
    way = whole_way(model, network.run)
    conversion = way.conversion
    assert (conversion.report.swapped, conversion.report.kept) == (network.swapped, network.kept)
    assert all(decision.reason for decision in conversion.plan.kept)
    assert len(find_norms(conversion.model)) == network.kept
    # beyond 1 nothing is left of the answers, and it is chance which of the two is worse
    assert way.error < way.naive_error or way.naive_error > 1
    assert way.layer_error < way.naive_layer_error
    assert way.reverted
    assert way.loaded


@pytest.mark.parametrize("network", [one for one in TESTED if not one.swapped], ids=str, indirect=True)
def test_other_norms_are_left_alone_and_named(network: Network) -> None:
    model = network.made()
    before = list(model.modules())
    assert gnswap.inspect(model).left_alone
    with pytest.raises(gnswap.NothingToSwapError, match=r"no BatchNorm\. gnswap\.inspect lists every norm"):
        gnswap.convert(model)
    assert all(one is other for one, other in zip(model.modules(), before, strict=True))


def named(name: str) -> Network:
    return next(network for network in NETWORKS if network.name == name)


@pytest.mark.parametrize("network", [named("ResNet")], ids=str, indirect=True)
def test_exported(network: Network, tmp_path: Path) -> None:
    """With a dataclass for an output."""
    model = gnswap.convert(network.made()).model
    x = network.inputs()
    report = gnswap.export_onnx(model, tmp_path / "net.onnx", x, dynamic_size=False)
    session = onnxruntime.InferenceSession(report.path, providers=["CPUExecutionProvider"])
    with torch.no_grad():
        expected = leaves(model(x))
    for found, wanted in zip(session.run(None, {session.get_inputs()[0].name: x.numpy()}), expected, strict=True):
        assert float((torch.from_numpy(found) - wanted).abs().max()) < 1e-4 * float(wanted.abs().max())


@pytest.mark.parametrize("network", [named("ResNet"), named("DETR, frozen")], ids=str, indirect=True)
def test_photos_and_outputs_that_are_dataclasses(network: Network) -> None:
    model, x = network.made(), network.inputs(6)
    report = gnswap.convert(model, calibration=[x]).report
    assert report.fidelity is not None
    assert report.fidelity.photos == 6
    assert (report.fidelity.agreement is None) == (network.name != "ResNet"), "only one of them is a classifier"

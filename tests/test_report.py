"""The fidelity report: what it measures is right, what it writes is whole, the same every time, and is honest."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import gnswap
from gnswap import Decision
from gnswap._fidelity import compare
from gnswap._report.figures import figures
from gnswap._report.levers import LEVERS, stages
from gnswap._report.photos import MOST, thumbnail
from gnswap._report.records import FidelityReport, wilson
from gnswap._report.svg import Axis, short
from tests._models import build, randomise_norms, same_state, small_cnn

PHOTOS = 20


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return randomise_norms(small_cnn()).eval()


@pytest.fixture(scope="module")
def photos() -> list[Tensor]:
    return list(torch.randn(PHOTOS, 3, 12, 12, generator=torch.Generator().manual_seed(1)).split(6))


@pytest.fixture(scope="module")
def conversion(net: nn.Module, photos: list[Tensor]) -> gnswap.Conversion:
    """With every lever in force."""
    plan = gnswap.plan(net, groups=4, calibration=photos)
    decisions = []
    for number, decision in enumerate(plan.decisions):
        channels = decision.num_channels
        shuffled = torch.randperm(channels, generator=torch.Generator().manual_seed(number)).tolist()
        decisions.append(
            dataclasses.replace(
                decision,
                softness=0.5,
                channel_order=tuple(shuffled),
                signs=tuple(1 - 2 * (c % 2) for c in range(channels)),
                loudness=tuple(1 + 0.02 * c for c in range(channels)),
                centre=tuple(0.1 - 0.02 * c for c in range(channels)),
                gain=tuple(1 + 0.01 * c for c in range(channels)),
                offset=(0.01,) * channels,
            )
        )
    plan = dataclasses.replace(plan, decisions=tuple(decisions))
    return gnswap.Conversion(gnswap.apply(net, plan), plan, gnswap.ConversionReport("net", 2, 0))


@pytest.fixture(scope="module")
def found(net: nn.Module, conversion: gnswap.Conversion, photos: list[Tensor]) -> FidelityReport:
    return gnswap.report(net, conversion, photos)


@pytest.fixture(autouse=True)
def few_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are drawn where they are looked at, and nowhere else: they take most of the time."""
    monkeypatch.setattr("gnswap._report.write.figures", lambda _report: {})


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """With figures after all."""
    monkeypatch.setattr("gnswap._report.write.figures", figures)


# --- the levers ------------------------------------------------------------------------------------------------


def test_every_field_of_a_decision_is_a_levers_or_none_at_all() -> None:
    """A new way to keep the function has to be taken apart here as well."""
    no_lever = {"paths", "norm_type", "num_channels", "action", "reason", "num_groups", "absorbs", "evidence"}
    pulled = [field for lever in LEVERS for field in lever.fields]
    assert sorted([*pulled, *no_lever]) == sorted(field.name for field in dataclasses.fields(Decision))


def test_stages_add_one_lever_at_a_time(conversion: gnswap.Conversion) -> None:
    taken_apart = stages(conversion.plan)
    assert [lever.name for lever, _ in taken_apart] == [
        "naive copy", "standardised", "softness", "order and signs", "balance", "corrections",
    ]  # fmt: skip
    assert taken_apart[-1][1] == conversion.plan.swaps
    naive = taken_apart[0][1][0]
    assert (naive.standardise, naive.softness, naive.channel_order, naive.gain) == (False, 0.0, None, None)
    assert naive.num_groups == 4


def test_levers_that_change_nothing_are_left_out(net: nn.Module) -> None:
    plan = gnswap.plan(net, softness=0, order="natural")
    assert [lever.name for lever, _ in stages(plan)] == ["naive copy", "standardised"]


# --- what is measured ------------------------------------------------------------------------------------------


def test_each_stage_is_what_compare_measures(
    net: nn.Module, conversion: gnswap.Conversion, photos: list[Tensor], found: FidelityReport
) -> None:
    for stage, (_, swaps) in zip(found.stages, stages(conversion.plan), strict=True):
        network = gnswap.apply(net, dataclasses.replace(conversion.plan, decisions=swaps))
        measured = compare(net, network, photos)
        assert stage.fidelity.agreement == measured.agreement
        assert stage.fidelity.kl == pytest.approx(measured.kl, rel=1e-5)
        for one, other in zip(stage.fidelity.layers, measured.layers, strict=True):
            assert one.name == other.name
            assert one.relative_error == pytest.approx(other.relative_error, rel=1e-4)
    assert found.photos == PHOTOS
    assert found.stages[0].fidelity.layers[0].relative_error > found.stages[-1].fidelity.layers[0].relative_error


def test_the_last_stage_is_the_network_itself(net: nn.Module, photos: list[Tensor]) -> None:
    converted = gnswap.convert(net, softness=0).model
    with torch.no_grad():
        converted[-1].bias.add_(torch.linspace(0, 3, 5))
    found = gnswap.report(net, converted, photos)
    assert [stage.name for stage in found.stages] == ["naive copy", "standardised", "trained"]
    assert found.fidelity == compare(net, converted, photos)
    assert found.stages[1].fidelity.kl != found.stages[2].fidelity.kl


def test_the_notes_are_the_conversions(net: nn.Module, photos: list[Tensor]) -> None:
    conversion = gnswap.convert(net, calibration=photos, fidelity=0.2, exclude="4")
    found = gnswap.report(net, conversion, photos)
    assert found.kept == (f"4: {conversion.plan.kept[0].reason}",)
    assert found.notes == conversion.report.notes[1:]
    assert found.notes[-1].startswith("target 0.2")
    assert gnswap.report(net, conversion.model).notes == conversion.plan.notes


def test_layers_that_absorb_an_activation(net: nn.Module, photos: list[Tensor], tmp_path: Path) -> None:
    conversion = gnswap.convert(net, absorb=True)
    assert conversion.plan.decisions[0].absorbs == ("2",)
    found = gnswap.report(net, conversion, photos, directory=tmp_path)
    for stage in found.stages:
        assert [error.name for error in stage.fidelity.layers] == [layer.name for layer in found.layers] == ["1", "4"]
    measured = compare(net, conversion.model, photos).layers
    assert [error.relative_error for error in found.stages[-1].fidelity.layers] == [e.relative_error for e in measured]


def test_the_interval_is_wilsons() -> None:
    """At its ends the observed share is just 1.96 of their standard deviations away."""
    for share, count in ((0.0, 7), (0.3, 40), (1.0, 200)):
        for end in wilson(share, count):
            assert abs(share - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / count), abs=1e-7)


def test_what_a_naive_copy_divides_by(net: nn.Module, photos: list[Tensor]) -> None:
    """Against GroupNorm's variance of the activations themselves."""
    found = gnswap.report(net, gnswap.convert(net, groups=4, softness=0), photos)
    spread = found.layers[0].spreads[0]
    with torch.no_grad():
        x = net[0](torch.cat(photos))
    variance = x.view(PHOTOS, 4, -1).var(2, correction=0).repeat_interleave(4, 1) + net[1].eps
    ratio = (variance / (net[1].running_var + net[1].eps)).flatten().sort().values
    at = [round(q * (len(ratio) - 1)) for q in (0.05, 0.25, 0.5, 0.75, 0.95)]
    assert spread.variance == pytest.approx(ratio[at].tolist(), rel=1e-4)
    mean = x.view(PHOTOS, 4, -1).mean(2).repeat_interleave(4, 1)
    away = ((mean - net[1].running_mean) / (net[1].running_var + net[1].eps).sqrt()).abs()
    assert spread.shift == pytest.approx(float(away.flatten().median()), rel=1e-4)


def test_standardised_channels_at_their_nominal_variance_keep_the_function(net: nn.Module) -> None:
    found = gnswap.report(net, gnswap.convert(net))
    naive, standardised = found.layers[1].spreads[:2]
    assert standardised.variance == pytest.approx((1.0,) * 5)
    assert naive.variance[0] < 0.7
    assert naive.variance[4] > 5
    assert standardised.shift == pytest.approx(0, abs=1e-6)


def test_loud_and_quiet(net: nn.Module) -> None:
    found = gnswap.report(net, gnswap.convert(net, groups=2, order="natural"))
    deviation = (net[1].running_var + net[1].eps).sqrt().view(2, 8)
    ratio = (deviation.amax(1) / deviation.amin(1)).median()
    assert found.layers[0].loud_to_quiet == pytest.approx(float(ratio), rel=1e-5)


def test_the_worst_photos(found: FidelityReport) -> None:
    ranked = sorted(range(PHOTOS), key=lambda index: -found.answers.distance[index])
    assert [photo.index for photo in found.worst] == ranked[:MOST]
    for photo in found.worst:
        assert photo.original[0].probability == pytest.approx(found.answers.probability_original[photo.index])
        same = photo.original[0].index == photo.converted[0].index
        assert found.answers.same[photo.index] is same
    assert sum(found.answers.same) / PHOTOS == found.fidelity.agreement
    assert sum(found.answers.distance) / PHOTOS == pytest.approx(found.fidelity.kl)


def test_answers_that_are_not_finite(net: nn.Module, photos: list[Tensor]) -> None:
    converted = gnswap.convert(net).model
    with torch.no_grad():
        converted[-1].bias[0] = math.nan
    found = gnswap.report(net, converted, photos)
    assert found.fidelity.agreement == 0.0
    assert found.worst[0].distance == math.inf
    assert found.worst[0].converted == ()
    assert FidelityReport.from_json(found.to_json()).worst[0] == found.worst[0]


def test_nothing_is_left_behind(net: nn.Module, conversion: gnswap.Conversion, photos: list[Tensor]) -> None:
    original, before = small_cnn(), {}
    original.load_state_dict(net.state_dict())
    original.train()[1].eval()
    before = {name: module.training for name, module in original.named_modules()}
    gnswap.report(original, conversion, iter(photos))  # an iterator is enough: read once
    assert {name: module.training for name, module in original.named_modules()} == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in original.modules())
    assert same_state(original, net)


@pytest.mark.usefixtures("drawn")
@pytest.mark.parametrize(
    ("name", "groups", "classes"),
    [
        ("1-D", 1, False),
        ("1-D, no length", 1, True),
        ("3-D", 2, False),
        ("called twice", 2, False),
        ("no running statistics", 2, True),
        ("root", 2, False),
    ],
)
def test_other_networks(name: str, groups: int, classes: bool, tmp_path: Path) -> None:
    model, x = build(name)
    found = gnswap.report(model, gnswap.convert(model, groups=groups), [x], directory=tmp_path)
    assert found.fidelity is not None
    assert all((photo.thumbnail is None) == (x.ndim != 4 or x.shape[1] != 3) for photo in found.worst)
    assert (found.agreement_interval is not None) == classes
    page = (tmp_path / "report.html").read_text()
    assert ("keep their class" in page) == classes
    assert ("For the naive copy of gamma and beta it is" in page) != classes


# --- pictures of photos ----------------------------------------------------------------------------------------


def opened(uri: str | None) -> Image.Image:
    assert uri is not None
    assert uri.startswith("data:image/jpeg;base64,")
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


def test_thumbnails_look_like_the_photos() -> None:
    colour = torch.tensor([0.8, 0.4, 0.2]).view(3, 1, 1).expand(3, 300, 200)
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.3, 0.4])
    prepared = (colour - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    image = opened(thumbnail(prepared, {"mean": mean.tolist(), "std": std.tolist()}))
    assert image.size == (117, 176)
    assert image.getpixel((50, 50)) == pytest.approx((204, 102, 51), abs=3)
    grey = opened(thumbnail(torch.linspace(-4, 9, 32).expand(1, 32, 32), {}))
    assert (grey.mode, grey.size) == ("L", (32, 32))
    assert grey.getpixel((31, 5)) > 240 > 15 > grey.getpixel((0, 5))


@pytest.mark.parametrize("shape", [(3,), (3, 9), (4, 9, 9), (3, 4, 6, 6)])
def test_what_is_no_picture_gets_none(shape: tuple[int, ...]) -> None:
    assert thumbnail(torch.randn(shape), {}) is None


# --- what is written -------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("drawn")
def test_files(found: FidelityReport, net: nn.Module, conversion: gnswap.Conversion, photos: list[Tensor],
               tmp_path: Path) -> None:  # fmt: skip
    for folder in ("one", "other"):
        gnswap.report(net, conversion, photos, directory=tmp_path / folder)
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == ["report-layers.png", "report-photos.png", "report-spread.png", "report-stages.png",
                     "report.html", "report.json"]  # fmt: skip
    for name in names:
        content = (tmp_path / "one" / name).read_bytes()
        assert content == (tmp_path / "other" / name).read_bytes(), f"{name} differs from run to run"
        if name.endswith(".png"):
            assert min(Image.open(io.BytesIO(content)).size) > 300
    assert FidelityReport.from_json((tmp_path / "one" / "report.json").read_text()) == found


def test_the_page_fetches_nothing_and_escapes_names(net: nn.Module, photos: list[Tensor], tmp_path: Path) -> None:
    evil = ["</script><script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "c", "d", "e"]
    gnswap.report(
        net, gnswap.convert(net), photos, directory=tmp_path, class_names=evil, photo_names=evil * 4, command=evil[0]
    )
    page = (tmp_path / "report.html").read_text()
    assert page.count("<script") == page.count("</script>") == 2
    assert "<img src=x" not in page
    assert "http://www.w3.org/2000/svg" in page
    assert page.count("http") == page.count("http://www.w3.org/2000/svg") + page.count("http-equiv")
    assert all(source.startswith("data:") for source in page.split(' src="')[1:])
    assert "class 0" not in page


def test_words_of_the_page(net: nn.Module, photos: list[Tensor], tmp_path: Path) -> None:
    calibrated = gnswap.convert(net, calibration=photos)
    gnswap.report(net, calibrated, photos, directory=tmp_path, held_out=False, command="gnswap convert x -o y")
    page = (tmp_path / "report.html").read_text()
    assert "These photos also chose the plan" in page
    assert "gnswap convert x -o y" in page
    assert calibrated.plan.notes[0] in page
    gnswap.report(net, calibrated, photos, directory=tmp_path, held_out=True)
    assert "also chose the plan" not in (tmp_path / "report.html").read_text()
    gnswap.report(net, calibrated, photos, directory=tmp_path)
    assert "If these are among them" in (tmp_path / "report.html").read_text()


@pytest.mark.usefixtures("drawn")
def test_without_photos(net: nn.Module, photos: list[Tensor], tmp_path: Path) -> None:
    converted = gnswap.convert(net)
    gnswap.report(net, converted, photos, directory=tmp_path)
    found = gnswap.report(net, converted, directory=tmp_path)
    assert (found.photos, found.stages, found.fidelity, found.agreement_interval) == (0, (), None, None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report-spread.png", "report.html", "report.json"]
    page = (tmp_path / "report.html").read_text()
    assert "nothing is known about this network" in page
    assert "From the running statistics alone" in page
    assert "One lever after another" not in page


@pytest.mark.usefixtures("drawn")
def test_without_matplotlib(net: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.warns(
        UserWarning, match=r"no PNG figures: matplotlib is not installed.*pip install 'gnswap\[report\]'"
    ):
        gnswap.report(net, gnswap.convert(net), directory=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json"]


def test_a_write_that_fails_leaves_the_old_page(
    net: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    converted = gnswap.convert(net)
    gnswap.report(net, converted, directory=tmp_path, command="first")
    before = (tmp_path / "report.html").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "no space left")))
        with pytest.raises(gnswap.StoreError, match=r"the report cannot be written .*no space left"):
            gnswap.report(net, converted, directory=tmp_path, command="second")
    assert (tmp_path / "report.html").read_bytes() == before
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_saved_network_has_its_report_beside_it(
    net: nn.Module, conversion: gnswap.Conversion, found: FidelityReport, tmp_path: Path
) -> None:
    gnswap.save(conversion, tmp_path / "saved", report=found)
    assert json.loads((tmp_path / "saved" / "report.json").read_text())["photos"] == PHOTOS
    assert torch.equal(gnswap.load(tmp_path / "saved", net)[1].weight, net[1].weight)
    gnswap.save(conversion, tmp_path / "saved")
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == ["model.safetensors", "plan.json"]


# --- what cannot be --------------------------------------------------------------------------------------------


def test_refusals(net: nn.Module, conversion: gnswap.Conversion) -> None:
    with pytest.raises(gnswap.ArgumentError, match="carries no record of a conversion"):
        gnswap.report(net, net)
    with pytest.raises(gnswap.PlanMismatchError, match="different architectures"):
        gnswap.report(nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)), conversion)
    with pytest.raises(gnswap.CalibrationError, match="no photos to measure on"):
        gnswap.report(net, conversion, [])


@pytest.mark.parametrize(
    ("axis", "expected"),
    [
        (Axis(0, 1, 0, 100), [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (Axis(0, 0.734, 0, 100), [0, 0.2, 0.4, 0.6]),
        (Axis(0, 31, 0, 100), [0, 10, 20, 30]),
        (Axis(0.02, 3, 0, 100, log=True), [0.1, 1]),
        (Axis(0.1, 3, 0, 100, log=True), [0.1, 0.2, 0.5, 1, 2]),
        (Axis(1e-4, 1e6, 0, 100, log=True), [1e-4, 1e-2, 1, 1e2, 1e4, 1e6]),
    ],
)
def test_ticks(axis: Axis, expected: list[float]) -> None:
    assert axis.ticks() == pytest.approx(expected)
    assert axis(axis.high) == 100
    assert axis(math.inf) == 100


def test_an_axis_around_nothing_finite() -> None:
    values: list[Any] = [math.nan, math.inf]
    axis = Axis.decades(values, 0, 10, least=1e-3, most=1e3)
    assert (axis.low, axis.high) == pytest.approx((10**-0.5, 10**0.5))


@pytest.mark.parametrize(
    ("value", "text"),
    [(1e-8, "0"), (0.0123, "0.0123"), (0.001234, "0.001"), (1, "1"), (0.5, "0.5"), (123.4, "123"), (2e6, "2e+06"),
     (math.inf, "not finite")],
)  # fmt: skip
def test_numbers_for_people(value: float, text: str) -> None:
    assert short(value) == text

"""explain: the closed form is what the layers compute, on made-up statistics and on a real network."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import gnswap
from gnswap._baselines import naive_group_norm
from gnswap._build import build_layer
from gnswap._explanation import Explanation, LayerSquash
from gnswap._squash import View
from tests._models import build, randomise_norms


def loud_and_quiet() -> nn.BatchNorm2d:
    """Eight channels: 1 is loud by its variance, 6 by its mean, 4 is dead."""
    norm = nn.BatchNorm2d(8, eps=1e-3).eval()
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.copy_(torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 30.0, 0.0]))
    norm.running_var.copy_(torch.tensor([1.0, 2500.0, 0.25, 1.0, 1e-6, 1.0, 1.0, 4.0]))
    return randomise_affine(norm)


def randomise_affine(norm: nn.BatchNorm2d) -> nn.BatchNorm2d:
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 2.0, norm.num_features))
        norm.bias.copy_(torch.linspace(-1.0, 1.0, norm.num_features))
    return norm


def one(explanation: Explanation) -> LayerSquash:
    (layer,) = explanation.layers
    return layer


def measured(norm: nn.BatchNorm2d, layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Factor and shift of every channel, by regression of the layer's output on BatchNorm's."""
    with torch.no_grad():
        before, after = (
            ((module.eval()(x) - norm.bias[:, None, None]) / norm.weight[:, None, None]).transpose(0, 1).flatten(1)
            for module in (norm, layer)
        )
    centred = before - before.mean(1, keepdim=True)
    factor = (centred * after).mean(1) / (centred * before).mean(1)
    return factor, after.mean(1) - factor * before.mean(1)


def test_prediction_against_the_naive_layer_on_gaussian_input() -> None:
    norm = loud_and_quiet().double()
    assert norm.running_mean is not None
    assert norm.running_var is not None
    explained = one(gnswap.explain(norm, groups=2))
    x = torch.randn(1, 8, 400, 400, dtype=torch.float64)
    x = x * norm.running_var.sqrt()[:, None, None] + norm.running_mean[:, None, None]
    factor, shift = measured(norm, naive_group_norm(norm, 2), x)
    torch.testing.assert_close(torch.tensor(explained.factor).double(), factor, rtol=0.01, atol=0)
    torch.testing.assert_close(torch.tensor(explained.shift).double(), shift, rtol=0.01, atol=0.01)
    planned = build_layer(norm, gnswap.plan(norm).decisions[0])
    factor, shift = measured(norm, planned, x)
    torch.testing.assert_close(torch.tensor(explained.factor_after).double(), factor, rtol=0.01, atol=0)
    torch.testing.assert_close(torch.ones(8).double(), factor, rtol=0.01, atol=0)
    assert shift.abs().max() < 0.01


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_the_error_on_photos_is_the_layers_own(groups: int) -> None:
    """With photos the closed form is exact, since a GroupNorm is an affine map of each channel of a sample."""
    norm = randomise_affine(randomise_norms(nn.BatchNorm2d(8)).eval()).double()
    x = 2 * torch.randn(5, 8, 6, 6, dtype=torch.float64) + torch.randn(5, 8, 1, 1, dtype=torch.float64)
    plan = gnswap.plan(norm, groups=2, softness=0.5).edit(
        "(root)", gain=tuple(torch.linspace(0.5, 1.5, 8).tolist()), offset=(0.1,) * 8
    )
    explained = one(gnswap.explain(norm, groups=groups, plan=plan, calibration=[x]))
    with torch.no_grad():
        nominal = norm(x)
        for layer, error in (
            (naive_group_norm(norm, groups), explained.error),
            (build_layer(norm, plan.decisions[0]), explained.error_after),
        ):
            size = (nominal - norm.bias[:, None, None]).square().mean()
            assert error == pytest.approx(float(((layer(x) - nominal).square().mean() / size).sqrt()), rel=1e-4)


def test_prediction_on_a_real_layer(lite0: nn.Module, sample_batch: Tensor) -> None:
    """From running statistics alone, beside what a naive layer does with real photos."""
    name = "blocks.2.0.bn2"
    norm = lite0.get_submodule(name)
    seen: list[Tensor] = []
    with norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])), torch.no_grad():
        lite0(sample_batch[::3])
    assert isinstance(norm, nn.BatchNorm2d)
    explained = one(gnswap.explain(lite0, name))
    naive = naive_group_norm(nn.Sequential(norm))[0]
    naive.drop = naive.act = None  # the norm alone
    plain = nn.BatchNorm2d(norm.num_features, norm.eps)
    plain.load_state_dict(norm.state_dict())
    factor, _ = measured(plain, naive, seen[0])
    live = torch.tensor(explained.live)
    ratio = (torch.tensor(explained.factor) / factor)[live].log()
    assert ratio.abs().median() < 0.1  # within 10 % for half of the channels
    assert ratio.abs().max() < 1.0
    assert explained.squashed > 0.3
    assert (factor[live] < 0.5).float().mean() == pytest.approx(explained.squashed, abs=0.1)
    worst = explained.worst
    assert worst is not None
    assert worst.quietest is not None
    assert factor[worst.quietest] < 0.1


def test_lite0_is_ranked_and_repaired(lite0: nn.Module) -> None:
    explanation = gnswap.explain(lite0)
    assert len(explanation.layers) == 49
    errors = [layer.error for layer in explanation.ranked]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 1.0
    assert all(layer.error_after < 1e-5 for layer in explanation.layers)
    assert "one channel a group in 5 layers (bn1, " in explanation.notes[0]
    assert Explanation.from_json(explanation.to_json()) == explanation
    lines = str(explanation).splitlines()
    assert lines[1].startswith(f"  {explanation.ranked[0].name}: output off by ")


def test_loud_and_quiet_channels_are_named() -> None:
    found = one(gnswap.explain(loud_and_quiet(), groups=2))
    by_variance, by_mean = found.groups
    assert (by_variance.loudest, by_variance.quietest) == (1, 2)
    assert by_variance.by_mean < 0.01
    assert by_variance.part > 0.99
    assert by_variance.ratio == pytest.approx(100, rel=1e-3)
    assert by_variance.deviation == pytest.approx((2502.25 / 4 + 3 / 16) ** 0.5, rel=1e-3)
    assert (by_mean.loudest, by_mean.quietest) == (6, 5)
    assert by_mean.by_mean > 0.99
    assert found.dead == (4,)
    assert found.live == (0, 1, 2, 3, 5, 6, 7)
    assert found.worst == by_variance
    assert found.squashed == pytest.approx(6 / 7)


def test_a_group_of_dead_channels_names_none() -> None:
    norm = nn.BatchNorm2d(4)
    assert norm.running_var is not None
    norm.running_var.zero_()
    found = one(gnswap.explain(norm, groups=2))
    assert found.groups[0].quietest is None
    assert found.worst is None
    assert (found.error, found.squashed) == (0.0, 0.0)


def test_a_fresh_network_has_nothing_to_squash() -> None:
    explanation = gnswap.explain(nn.Sequential(nn.Conv2d(3, 64, 1), nn.BatchNorm2d(64)))
    assert one(explanation).squashed == 0
    assert "of a fresh network" in explanation.notes[0]


def test_what_cannot_be_seen_is_said() -> None:
    model = nn.Sequential(randomise_norms(nn.BatchNorm2d(16)), nn.BatchNorm2d(16, track_running_stats=False))
    model.append(nn.LazyBatchNorm2d())
    model.append(nn.BatchNorm2d(16, device="meta"))
    explanation = gnswap.explain(model, plan=gnswap.plan(model, exclude="0"))
    kept = one(explanation)
    assert kept.remedy == 'kept as BatchNorm (excluded by "0")'
    assert (kept.planned_groups, kept.error_after, set(kept.factor_after)) == (0, 0.0, {1.0})
    assert [text.split(": ")[1] for text in explanation.unseen] == [
        "no running statistics",
        "not initialised",
        "its running statistics have no values (meta device)",
    ]


def test_aliases_and_globs_name_layers() -> None:
    model, _ = build("aliased")
    assert one(gnswap.explain(model, "bn2")).paths == ("bn1", "bn2", "extra.norm")
    assert [layer.name for layer in gnswap.explain(model, "head.*").layers] == ["head.1"]


def test_without_gamma_and_with_an_order() -> None:
    norm = randomise_norms(nn.BatchNorm2d(16, affine=False))
    statistics = gnswap.calibrate(norm, [torch.randn(8, 16, 6, 6)])
    plan = gnswap.plan(norm, groups=2, softness=0).edit("(root)", channel_order=tuple(range(15, -1, -1)))
    found = one(gnswap.explain(norm, plan=plan, calibration=statistics))
    assert found.remedy == "standardised, 2 groups of 8, ordered"
    assert 0 < found.error_after < found.error


def test_a_view_without_a_batch_of_samples() -> None:
    """The naive layer has no buffers, so its view is the identity on the input."""
    mean, deviation = torch.tensor([1.0, 3.0]).double(), torch.tensor([2.0, 2.0]).double()
    view = View.of(gnswap.FusedGroupNorm(1, 2, eps=0.0), mean, deviation)
    m, v = view.statistics(torch.zeros(1, 2).double(), torch.ones(1, 2).double())
    assert (m.item(), v.item()) == (2.0, 5.0)  # the mean of the variances, and the variance of the means


@pytest.mark.parametrize("layer", [None, "blocks.0.*", "blocks.1.0.bn2"])
def test_figures(lite0: nn.Module, tmp_path: Path, layer: str | None) -> None:
    gnswap.explain(lite0, layer, figure=tmp_path / "found.png")
    with Image.open(tmp_path / "found.png") as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 500


def test_a_figure_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(gnswap.StoreError, match=r"the figure cannot be written \(at .*nowhere.*FileNotFoundError"):
        gnswap.explain(loud_and_quiet(), figure=tmp_path / "nowhere" / "found.png")
    (tmp_path / "taken").mkdir()
    with pytest.raises(gnswap.StoreError, match="the figure cannot be written"):
        gnswap.explain(loud_and_quiet(), figure=tmp_path / "taken")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


@pytest.mark.parametrize("groups", [0, 2.0, True])
def test_impossible_groups(groups: int) -> None:
    with pytest.raises(gnswap.ArgumentError, match=r"impossible number of groups \(at explain.groups\)"):
        gnswap.explain(loud_and_quiet(), groups=groups)


def test_nothing_to_explain() -> None:
    with pytest.raises(gnswap.NothingToSwapError, match="found none of any kind"):
        gnswap.explain(nn.ReLU())
    with pytest.raises(gnswap.NothingToSwapError, match="found 0: no running statistics"):
        gnswap.explain(nn.Sequential(nn.BatchNorm2d(4, track_running_stats=False)))


def test_no_such_layer() -> None:
    model, _ = build("plain")
    with pytest.raises(
        gnswap.PlanError, match=r'"bn9" fits no norm layer \(at explain.layer\): expected a path or glob'
    ):
        gnswap.explain(model, "bn9")


def test_other_plans_and_statistics_are_refused() -> None:
    model, x = build("plain")
    other, y = build("pre-activation")
    with pytest.raises(gnswap.PlanMismatchError, match="the plan is of another model"):
        gnswap.explain(model, plan=gnswap.plan(other))
    with pytest.raises(gnswap.PlanMismatchError, match="the calibration is of another model"):
        gnswap.explain(model, plan=gnswap.plan(model), calibration=gnswap.calibrate(other, [y]))
    plan = gnswap.plan(model)
    cut = gnswap.Plan(plan.fingerprint, plan.model, plan.decisions[:1])
    with pytest.raises(gnswap.PlanMismatchError, match="the plan leaves a layer out"):
        gnswap.explain(model, plan=cut, calibration=[x])


def test_a_converted_model_is_refused() -> None:
    with pytest.raises(gnswap.ModelError, match=r"converted already. Explain the original: gnswap.revert\(model\)"):
        gnswap.explain(gnswap.convert(build("plain")[0]).model)

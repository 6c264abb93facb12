"""The search of order and signs: always valid, never worse on photos it did not see, and it finds what is there."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gnswap._estimate import Arrangement, Tables, fluctuation
from gnswap._grouping import valid_groups
from gnswap._order import arrange, held_out


def tables(samples: int, channels: int, seed: int = 0, *, patches: int = 4, common: float = 0.5) -> Tables:
    """Channels that share a few causes, as a network's do."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    causes = randn(samples, 5)
    mean = common * causes @ randn(5, channels) + 0.1 * randn(samples, channels)
    square = 1 + common * causes @ randn(5, channels) / 3 + 0.1 * randn(samples, channels)
    patch = 0.1 * randn(samples, patches, channels)
    return Tables(
        mean,
        square,
        mean[:, None] + patch,
        square[:, None] + patch.flip(1),
        torch.rand(channels, generator=generator) / 2 + 0.5,
        torch.rand(channels, generator=generator),
    )


@given(
    samples=st.integers(2, 40),
    channels=st.sampled_from((1, 4, 6, 16, 24, 60)),
    patches=st.sampled_from((0, 2, 4)),
    seed=st.integers(0, 99),
    data=st.data(),
)
@settings(max_examples=40, deadline=None)
def test_an_arrangement_is_valid_and_never_worse(
    samples: int, channels: int, patches: int, seed: int, data: st.DataObject
) -> None:
    groups = data.draw(st.sampled_from(valid_groups(channels)))
    layer = tables(samples, channels, seed, patches=patches)
    judged = arrange(layer, groups)
    found = judged.arrangement
    assert found.order is None or sorted(found.order) == list(range(channels))
    assert found.signs is None or set(found.signs) == {-1, 1}
    assert judged.held <= judged.natural_held
    held = layer.rows(held_out(torch.arange(samples)))
    assert judged.held == pytest.approx(fluctuation(held, groups, found))


def test_order_and_signs_cut_the_fluctuation() -> None:
    judged = arrange(tables(256, 64), 8)
    assert judged.held < 0.35 * judged.natural_held
    assert judged.arrangement.order is not None
    assert judged.arrangement.signs is not None


def test_noise_is_no_reason_to_reorder_much() -> None:
    """With nothing in common there is nothing to cancel, and the samples held out say so."""
    judged = arrange(tables(16, 256, common=0.0), 8)
    assert judged.seen < judged.natural_seen
    assert judged.held <= judged.natural_held


def test_opposites_are_put_together() -> None:
    """Where half of the channels move one way and half the other, each group gets as many of both, or signs do it."""
    layer = tables(64, 16, common=0.0)
    cause = torch.randn(64, 1, generator=torch.Generator().manual_seed(3))
    direction = torch.tensor([1.0] * 8 + [-1.0] * 8)
    layer = dataclasses.replace(
        layer,
        mean=layer.mean * 0.01 + cause * direction,
        patch_mean=layer.patch_mean[:, :0],
        patch_square=layer.patch_square[:, :0],
    )
    judged = arrange(layer, 4)
    assert judged.held < 0.02 * judged.natural_held


def test_one_form_for_equal_groupings() -> None:
    """Channels ascend inside a group, groups by their first channel, whose sign is +1."""
    found = arrange(tables(64, 24), 4).arrangement
    assert found.order is not None
    assert found.signs is not None
    groups = torch.tensor(found.order).view(4, 6)
    assert torch.equal(groups, groups.sort(1).values)
    assert torch.equal(groups[:, 0], groups[:, 0].sort().values)
    assert all(found.signs[first] == 1 for first in groups[:, 0].tolist())


def test_fluctuation_does_not_see_a_groups_sign_or_the_order_inside() -> None:
    layer = tables(12, 8)
    one = Arrangement((0, 1, 2, 3, 4, 5, 6, 7), (1, -1, 1, 1, 1, 1, -1, 1))
    other = Arrangement((7, 6, 5, 4, 2, 3, 0, 1), (-1, 1, -1, -1, 1, 1, -1, 1))
    assert fluctuation(layer, 2, one) == pytest.approx(fluctuation(layer, 2, other))
    assert fluctuation(layer, 2, one) != pytest.approx(fluctuation(layer, 2, Arrangement()))


def test_fluctuation_by_its_formula() -> None:
    layer = tables(5, 6)
    m = layer.mean.view(5, 2, 3).mean(2)
    v = layer.square.view(5, 2, 3).mean(2) - layer.nominal.view(2, 3).mean(1)
    weight = layer.weight.view(2, 3).sum(1)
    expected = ((m**2 + v**2 / 4).mean(0) * weight).sum() / weight.sum()
    assert fluctuation(layer, 2, Arrangement()) == pytest.approx(float(expected), rel=1e-5)


def test_a_given_order_is_kept() -> None:
    mine = tuple(torch.randperm(24, generator=torch.Generator().manual_seed(0)).tolist())
    found = arrange(tables(64, 24), 4, given=mine).arrangement
    assert found.order == mine
    assert found.signs is not None


def test_the_same_tables_give_the_same_arrangement() -> None:
    torch.manual_seed(0)
    one = arrange(tables(64, 48), 6)
    torch.manual_seed(1)
    assert arrange(tables(64, 48), 6) == one


def test_rows_of_one_sample_stay_together() -> None:
    owner = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3, 4, 4])
    assert held_out(owner).tolist() == [False] * 6 + [True] * 2 + [False] * 2
    assert held_out(torch.tensor([0, 1])).tolist() == [False, True]


def test_dead_channels_and_silent_layers() -> None:
    layer = dataclasses.replace(tables(32, 8), weight=torch.zeros(8))
    assert arrange(layer, 2).held == 0


def test_views_take_part_in_the_search_and_judge_nothing() -> None:
    """Too few samples say little about others; more of their kind say more. What judges stays as it is."""
    whole = tables(512, 192, common=0.2)
    few, more, others = (whole.rows(torch.arange(*span)) for span in ((0, 16), (16, 256), (256, 512)))
    alone, helped = arrange(few, 12), arrange(few, 12, views=more)
    assert (helped.natural_seen, helped.natural_held) == (alone.natural_seen, alone.natural_held)
    assert fluctuation(others, 12, helped.arrangement) < fluctuation(others, 12, alone.arrangement)

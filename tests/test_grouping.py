"""The number of groups: valid for every C, nearest to what was asked for, never one channel a group by itself."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gnswap._grouping import (
    AUTO_GROUP_SIZE,
    MIN_GROUP_SIZE,
    auto_groups,
    nearest_group_size,
    nearest_groups,
    valid_groups,
)

channels = st.integers(1, 4096)
counts = st.integers(1, 5000)
PITFALL_24 = (1, 3, 8, 17, 24, 36, 40, 56, 72, 88, 120, 144, 997)


@given(channels)
def test_valid_groups_are_all_of_them(c: int) -> None:
    expected = [g for g in range(1, c + 1) if c % g == 0 and (g == 1 or c // g >= MIN_GROUP_SIZE)]
    assert list(valid_groups(c)) == expected


@given(channels, counts)
def test_nearest_groups(c: int, asked: int) -> None:
    chosen, note = nearest_groups(c, asked)
    valid = valid_groups(c)
    assert chosen in valid
    assert all((abs(chosen - asked), chosen) <= (abs(other - asked), other) for other in valid)
    assert (note is None) == (chosen == asked)


@given(channels, counts)
def test_nearest_group_size(c: int, asked: int) -> None:
    chosen, note = nearest_group_size(c, asked)
    valid = valid_groups(c)
    assert chosen in valid
    size = c // chosen
    assert all((abs(size - asked), -size) <= (abs(c // other - asked), -c // other) for other in valid)
    assert (note is None) == (size == asked)


@given(channels)
def test_auto_is_valid_and_its_groups_are_large(c: int) -> None:
    assert auto_groups(c) in valid_groups(c)
    assert c // auto_groups(c) >= min(c, AUTO_GROUP_SIZE)


@given(channels.filter(lambda c: c > 1), counts)
def test_pitfall_25_never_one_channel_per_group(c: int, asked: int) -> None:
    """`gcd(32, C)` gave 164 such layers in timm."""
    for groups in (nearest_groups(c, asked)[0], nearest_group_size(c, asked)[0], auto_groups(c)):
        assert groups < c


@pytest.mark.parametrize("c", PITFALL_24)
@pytest.mark.parametrize("asked", [1, 8, 16, 32])
def test_pitfall_24_awkward_numbers_of_channels(c: int, asked: int) -> None:
    """Neither the division by zero of `C // 16` nor the ValueError of `min(32, C)`."""
    for groups, _ in (nearest_groups(c, asked), nearest_group_size(c, asked)):
        assert c % groups == 0
        assert groups == 1 or c // groups >= MIN_GROUP_SIZE


@pytest.mark.parametrize(("c", "asked", "expected"), [(64, 32, 16), (16, 32, 4), (24, 5, 4), (17, 8, 1), (40, 6, 5)])
def test_ties_go_to_fewer_groups(c: int, asked: int, expected: int) -> None:
    assert nearest_groups(c, asked)[0] == expected


@pytest.mark.parametrize(("c", "asked", "size"), [(96, 32, 32), (40, 32, 40), (48, 36, 48), (48, 20, 24), (3, 32, 3)])
def test_ties_go_to_larger_groups(c: int, asked: int, size: int) -> None:
    assert c // nearest_group_size(c, asked)[0] == size


def test_the_note_says_what_was_asked_for_and_what_came() -> None:
    assert "32 groups asked for; 4 is the nearest" in str(nearest_groups(16, 32)[1])
    assert "groups of 8 asked for; 3 channels make one group" in str(nearest_group_size(3, 8)[1])

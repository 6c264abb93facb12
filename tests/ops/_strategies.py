"""Hypothesis' space of the arguments of `group_norm`."""

from __future__ import annotations

from dataclasses import replace

from _cases import Case, full_case, laid_out
from hypothesis import strategies as st

from gnswap import ops


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any call: rank 2 to 5, odd sizes, any layout, any subset of the arguments."""
    num_groups, per_group = draw(st.integers(1, 4)), draw(st.sampled_from([1, 2, 3, 5, 8]))
    spatial = draw(st.lists(st.sampled_from([1, 2, 3, 7, 10]), max_size=3))
    shape = (draw(st.integers(1, 5)), num_groups * per_group, *spatial)
    act = draw(st.sampled_from([None, *ops.ACTIVATIONS]))
    case = full_case(shape, num_groups, act, seed=draw(st.integers(0, 999)))
    optional = ("weight", "bias", "residual", "channel_scale", "channel_shift", "channel_order")
    case = replace(case, **{name: None for name in optional if draw(st.booleans())})
    layout = draw(st.sampled_from(["contiguous", "channels_last", "sliced"]))
    return replace(case, x=laid_out(case.x, layout))

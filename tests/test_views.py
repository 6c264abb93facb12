"""Views: of the same shape and kind, drawn from the generator alone, and still of the photo they were made from."""

from __future__ import annotations

import pytest
import torch

from gnswap import _views
from gnswap._views import views


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("shape", [(4, 7), (4, 3, 9), (4, 3, 10, 12), (4, 1, 16, 16), (2, 3, 4, 8, 8), (1, 3, 8, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shape_and_dtype_stay_and_values_change(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape, dtype=dtype)
    before = x.clone()
    y = views(x, generator())
    assert (y.shape, y.dtype) == (x.shape, dtype)
    assert y.isfinite().all()
    assert torch.equal(x, before), "the photos themselves stay"
    assert not torch.equal(y, x)
    assert torch.equal(y, views(x, generator()))
    assert not torch.equal(y, views(x, generator(1)))


def test_token_ids_are_left_alone() -> None:
    tokens = torch.arange(6).view(2, 3)
    assert views(tokens, generator()) is tokens


def test_memory_format_and_constant_pictures() -> None:
    x = torch.full((2, 3, 6, 6), 0.5)
    torch.testing.assert_close(views(x, generator()), x)


def test_a_crop_holds_half_of_the_picture_or_more_and_half_are_mirrored() -> None:
    ramp = torch.linspace(-1, 1, 64).expand(400, 1, 64, 64)
    cropped = _views._cropped(ramp, generator())
    rows = cropped[:, 0].mean(1)
    extent = (rows.amax(1) - rows.amin(1)) / 2
    assert float(extent.min()) > 0.5**0.5 / _views._STRETCH - 0.05
    mirrored = (rows[:, -1] < rows[:, 0]).double().mean()
    assert 0.4 < float(mirrored) < 0.6
    assert float(cropped.amin()) >= -1.0
    assert float(cropped.amax()) <= 1.0


def test_colour_is_relative_to_the_photo() -> None:
    """A photo of another normalisation gets the same view, in its own units."""
    x = torch.rand(8, 3, 12, 12, dtype=torch.float64)
    one, other = (views(batch, generator()) for batch in (x, 255 * x + 7))
    torch.testing.assert_close(other, 255 * one + 7)


def test_about_half_are_blended_with_their_neighbour() -> None:
    x = torch.eye(200)
    y = _views._blended(x, generator())
    torch.testing.assert_close(y.sum(1), torch.ones(200))
    assert 60 < int(((y > 0).sum(1) == 2).sum()) < 140

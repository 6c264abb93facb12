"""Networks of timm for the zoo: built with random weights and measured statistics, before and after the conversion.

Why random weights but measured statistics: there are no weights offline, and with running mean 0, variance 1, gamma 1
and beta 0 a wrong conversion passes for the wrong reason. Statistics drawn at random would let the output explode, and
with beta around 0 a deep random network is chaotic: a rounding error, let alone another norm, gives any other output.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Iterable
from typing import Any

import timm
import torch
from torch import Tensor, nn

import gnswap
from gnswap._samples import sample_photos
from gnswap._sites import find_norms

SIZES = (96, 128, 160, 192)
"""Sides of the input in pixels, tried in this order; last comes the size that timm names for the network."""

PHOTOS, JUDGES = 11, 3
"""How many photos give the statistics, and for how many of these the outputs are compared."""


@dataclasses.dataclass
class Case:
    """One network before and after its conversion, both in eval mode.

    Attributes:
        name: of the architecture; how to build it again.
        original, conversion: the network with its BatchNorms, and what `gnswap.convert` made of it.
        x: inputs `[N, C, H, W]`; on the meta device where the networks are.
    """

    name: str
    original: nn.Module
    conversion: gnswap.Conversion
    x: Tensor

    @property
    def converted(self) -> nn.Module:
        """The network with GroupNorm."""
        return self.conversion.model

    @functools.cached_property
    def answers(self) -> Any:
        """What the original gives for all inputs."""
        return run(self.original, self.x)

    @functools.cached_property
    def converted_answers(self) -> Any:
        """What the converted network gives for all inputs."""
        return run(self.converted, self.x)

    @functools.cached_property
    def single_answer(self) -> Any:
        """What the converted network gives for the first input alone."""
        return self.converted_answers if len(self.x) == 1 else run(self.converted, self.x[:1])


def build(name: str, device: str = "cpu", **options: Any) -> nn.Module:
    """An architecture with random weights (the same in every run), in eval mode."""
    torch.manual_seed(0)
    with torch.device(device), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of architectures that timm has deprecated or renamed
        return timm.create_model(name, pretrained=False, **options).eval()


def photos() -> Tensor:
    """Real photos, cropped to squares and normalised: `[PHOTOS, 3, 224, 224]`."""
    chosen = [photo.image for photo in sample_photos(size=224)[:PHOTOS]]
    crops = [image.crop((0, 0, 224, 224)) for image in chosen]
    pixels = [torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(224, 224, 3) for image in crops]
    return torch.stack(pixels).permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous()


def resized(x: Tensor, channels: int, height: int, width: int) -> Tensor:
    """The photos at another size and with another number of channels."""
    x = nn.functional.interpolate(x, (height, width), mode="bilinear", antialias=True)
    return x if channels == x.shape[1] else x.mean(1, keepdim=True).expand(-1, channels, -1, -1).contiguous()


def run(model: nn.Module, x: Tensor) -> Any:
    """The model's output, without gradients."""
    with torch.no_grad():
        return model(x)


def usable_size(model: nn.Module, x: Tensor, sizes: Iterable[int] = SIZES) -> tuple[int, int, int]:
    """The smallest input, as (channels, height, width), that a network takes.

    Raises:
        the network's own error where it takes not even the size that timm names.
    """
    channels, height, width = model.pretrained_cfg["input_size"]
    for side in sizes:
        if side < min(height, width):
            try:
                run(model, resized(x[:1], channels, side, side))
            except Exception:  # networks with fixed sizes fail in any way; the last size must work
                continue
            return channels, side, side
    run(model, resized(x[:1], channels, height, width))
    return channels, height, width


def give_statistics(model: nn.Module, x: Tensor) -> None:
    """Gamma of both signs with some near 0, random beta, and the statistics that the network has on the photos.

    Beta is around 1, where most activations are nearly linear, and what starts at gamma 0 (the ends of residual
    branches) stays small: both keep the network from being chaotic, as training does. Every norm takes its statistics
    from what the norms before it give in eval mode; in train mode all would differ a little, and in a deep network
    without a path around its activations (ConvMixer) that ends in infinity.
    """
    generator = torch.Generator().manual_seed(0)
    norms = [norm for _, norm in find_norms(model)]
    with torch.no_grad():
        for norm in norms:
            if norm.weight is not None:
                size = 1.0 if norm.weight.any() else 0.2
                norm.weight.copy_(size * (0.7 + 0.5 * torch.randn(norm.weight.shape, generator=generator)))
                norm.weight[::7] *= 1e-3  # nearly pruned channels
            if norm.bias is not None:
                norm.bias.copy_(1 + 0.5 * torch.randn(norm.bias.shape, generator=generator))
        handles = [norm.register_forward_pre_hook(_measure) for norm in norms if norm.running_mean is not None]
        model(x)
    for handle in handles:
        handle.remove()


def _measure(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Take the statistics of what comes in; a channel that is dead here would not be so on all photos of a training."""
    variance, mean = torch.var_mean(inputs[0], [axis for axis in range(inputs[0].dim()) if axis != 1], correction=0)
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(variance.clamp(min=1e-3 * float(variance.mean())))


def make_case(name: str, x: Tensor, sizes: Iterable[int] = SIZES) -> Case:
    """Build, give statistics, convert.

    The photos whose outputs are compared are among those that give the statistics: one that excites a channel which is
    dead on all others would be multiplied by 1/sqrt(eps), which no network meets after training on many photos.
    """
    original = build(name)
    shape = usable_size(original, x, sizes)
    give_statistics(original, resized(x, *shape))
    return Case(name, original, gnswap.convert(original), resized(x[-JUDGES:], *shape))


def make_meta_case(name: str) -> Case:
    """The same without memory, and without values: shapes only, for which one sample is enough."""
    original = build(name, "meta")
    return Case(
        name,
        original,
        gnswap.convert(original),
        torch.empty(1, *original.pretrained_cfg["input_size"], device="meta"),
    )

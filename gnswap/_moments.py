"""What calibration remembers of a network's photos: small tables of channel means and second moments at every norm.

Why these two tables: a GroupNorm is, sample by sample, an affine map of each channel whose two coefficients follow from
the means and second moments of the group's channels. So order, signs, number of groups and softness of a layer can
all be judged on `[N, C]` numbers, without running the network again.

Why on the original network, in one pass: a layer's own input is nearly what it will be in the converted network, and a
pass in which later norms see converted earlier ones would have to hold every photo at once, or run once a layer.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gnswap._errors import ArgumentError, CalibrationError
from gnswap._estimate import Tables
from gnswap._norms import NormState, read_norm, refusal
from gnswap._progress import shown
from gnswap._running import ROWS, answered, chunks, eval_mode, keys, no_photos, require_finite
from gnswap._sites import find_norms, fingerprint, get, require_plain

_LEAST_SIDE = 4  # positions along an axis from which on its two halves count as patches


@dataclasses.dataclass(frozen=True, eq=False)
class Moments:
    """The tables of one norm, on its standardised input x̂ = (x - running mean) / sqrt(running variance + eps).

    Attributes:
        sample: which photo each row is of, as its place in `ChannelStatistics.keys`, int64 `[R]`. A norm that runs
            twice in a forward pass, or on several crops of a photo, has several rows for each.
        mean, square: of x̂ and of x̂² over all positions, fp32 `[R, C]`.
        patch_mean, patch_square: the same over the halves of the last two axes, `[R, K, C]`: K is 4 on pictures, 2
            on sequences, 0 on vectors and where a map had fewer than 4 x 4 positions.
    """

    sample: Tensor
    mean: Tensor
    square: Tensor
    patch_mean: Tensor
    patch_square: Tensor

    def tables(self, state: NormState) -> Tables:
        """What the search of order and signs needs, with the weight of each channel from its norm."""
        assert state.running_var is not None
        var = state.running_var.detach().double().cpu()
        nominal = (var / (var + state.eps)).float()
        gamma = torch.ones_like(nominal) if state.weight is None else state.weight.detach().float().cpu()
        return Tables(self.mean, self.square, self.patch_mean, self.patch_square, nominal, gamma.square() * nominal)


@dataclasses.dataclass(frozen=True, eq=False)
class ChannelStatistics:
    """What `gnswap.calibrate` collected; `gnswap.plan` takes it as its `calibration`.

    The samples stand in an order that follows from their content alone, so the same photos give the same statistics
    whichever way they were batched, shuffled, or spread over processes.

    Attributes:
        fingerprint: of the architecture (`Inventory.fingerprint`).
        keys: a checksum of each sample's input, ascending.
        layers: the tables of every norm with running statistics that ran, by first path.
    """

    fingerprint: str
    keys: tuple[int, ...]
    layers: Mapping[str, Moments]

    @property
    def samples(self) -> int:
        """N, the number of samples."""
        return len(self.keys)

    def merge(self, *others: ChannelStatistics) -> ChannelStatistics:
        """Statistics of all shards together, as if one process had seen all their photos.

        Raises:
            ArgumentError: a shard is of another network, or saw other layers.

        Example:
            >>> import gnswap
            >>> net, photos = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), torch.randn(6, 3, 9, 9)
            >>> shards = [gnswap.calibrate(net, [photos[:4]]), gnswap.calibrate(net, [photos[4:]])]
            >>> shards[0].merge(shards[1]).samples
            6
        """
        shards = (self, *others)
        for shard in others:
            if shard.fingerprint != self.fingerprint or shard.layers.keys() != self.layers.keys():
                raise ArgumentError(
                    "a shard is of another network",
                    where="merge",
                    expected=f"fingerprint {self.fingerprint[:12]} and {len(self.layers)} layers",
                    found=f"{shard.fingerprint[:12]} and {len(shard.layers)}",
                )
        starts = [0]
        for shard in shards[:-1]:
            starts.append(starts[-1] + shard.samples)
        rows = {
            name: [
                dataclasses.replace(shard.layers[name], sample=shard.layers[name].sample + start)
                for shard, start in zip(shards, starts, strict=True)
            ]
            for name in self.layers
        }
        return _sorted(self.fingerprint, [key for shard in shards for key in shard.keys], rows)


def collect(model: nn.Module, batches: Iterable[Any]) -> ChannelStatistics:
    """Run the network once over the batches; see `gnswap.calibrate`."""
    require_plain(model)
    seen: list[int] = []
    listeners = {
        paths[0]: _Listener(paths[0], state, seen)
        for paths, norm in find_norms(model)
        if refusal(norm) is None and (state := read_norm(norm)).running_var is not None
    }
    with eval_mode(model), torch.no_grad(), contextlib.ExitStack() as hooks:
        for name, listener in listeners.items():
            hooks.callback(get(model, name).register_forward_pre_hook(listener, prepend=True).remove)
        for x, _ in shown(chunks(batches, ROWS), "calibrating"):
            require_finite(x)
            batch = keys(x)
            for listener in listeners.values():
                listener.batch = len(batch)
            answered(model, x)
            seen += batch
    if not seen:
        raise no_photos("calibrate on")
    rows = {name: listener.calls for name, listener in listeners.items() if listener.calls}
    return _sorted(fingerprint(model), seen, rows)


class _Listener:
    """A hook that notes the moments of a norm's input at every call."""

    def __init__(self, name: str, state: NormState, seen: list[int]) -> None:
        self.name, self.state, self.seen, self.batch = name, state, seen, 0
        self.calls: list[Moments] = []

    def __call__(self, _norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x, mean, var = inputs[0], self.state.running_mean, self.state.running_var
        assert mean is not None
        assert var is not None
        per_channel = (-1,) + (1,) * (x.ndim - 2)
        scale = (var.double() + self.state.eps).rsqrt().float()
        xhat = (x.float() - mean.float().view(per_channel)) * scale.view(per_channel)
        square = xhat.square()
        # where rows are no samples (crops, frames), those of one photo are taken to lie together
        owner = torch.arange(len(x)) * self.batch // max(len(x), 1) + len(self.seen)
        found = Moments(owner, *(part.cpu() for table in (_mean, _halves) for part in (table(xhat), table(square))))
        if not all(bool(table.isfinite().all()) for table in (found.mean, found.square)):
            raise CalibrationError("the input of a norm is not finite", where=self.name, found="NaN or infinity")
        self.calls.append(found)


def _mean(x: Tensor) -> Tensor:
    """Over all positions: `[N, C, *]` to `[N, C]`."""
    return x.flatten(2).mean(2) if x.ndim > 2 else x


def _halves(x: Tensor) -> Tensor:
    """Means over the halves of the last two axes, or of the one there is: `[N, C, *]` to `[N, K, C]`."""
    axes = x.shape[2:][-2:]
    if not axes or min(axes) < _LEAST_SIDE:
        return x.new_zeros(len(x), 0, x.shape[1])
    flat = x.flatten(2, -1 - len(axes)).mean(2) if x.ndim > 2 + len(axes) else x
    pooled = F.adaptive_avg_pool1d(flat, 2) if len(axes) == 1 else F.adaptive_avg_pool2d(flat, 2)
    return pooled.flatten(2).transpose(1, 2)


def _together(calls: Sequence[Moments]) -> Moments:
    """The rows of several calls. Where one saw maps too small for patches, patches would tell of the others only."""
    patches = min(call.patch_mean.shape[1] for call in calls)
    return Moments(
        sample=torch.cat([call.sample for call in calls]),
        mean=torch.cat([call.mean for call in calls]),
        square=torch.cat([call.square for call in calls]),
        patch_mean=torch.cat([call.patch_mean[:, :patches] for call in calls]),
        patch_square=torch.cat([call.patch_square[:, :patches] for call in calls]),
    )


def _sorted(architecture: str, seen: list[int], rows: Mapping[str, list[Moments]]) -> ChannelStatistics:
    """All calls of each norm in one table, samples in the order of their keys."""
    ranked = sorted(range(len(seen)), key=seen.__getitem__)
    place = torch.empty(len(seen), dtype=torch.int64)
    place[torch.tensor(ranked)] = torch.arange(len(seen))
    layers = {}
    for name, calls in rows.items():
        found = _together(calls)
        sample = place[found.sample]
        by_sample = sample.argsort(stable=True)
        layers[name] = Moments(
            sample[by_sample],
            found.mean[by_sample],
            found.square[by_sample],
            found.patch_mean[by_sample],
            found.patch_square[by_sample],
        )
    return ChannelStatistics(architecture, tuple(seen[index] for index in ranked), layers)

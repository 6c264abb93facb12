"""What the Triton kernels are run on in the interpreter: tiny sizes, with every kind of edge."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from _cases import Case, full_case, laid_out
from torch import Tensor

from gnswap.ops._triton._config import Config

TILE = Config("tile", 4, 16)
FLAT = Config("flat", 1, 64)
# blocks that fit neither the channels nor the positions, so that every edge of a chunk is met
SPLIT = Config("split", 2, 8, 16)
LAST_TILE = Config("channels_last_tile", 16, 4)
LAST_SPLIT = Config("channels_last_split", 4, 4, 8)
REGIMES = (TILE, FLAT, SPLIT, LAST_TILE, LAST_SPLIT)


@dataclass(frozen=True)
class Run:
    """One forward and backward in a given cut, or (None) in the one that would be chosen."""

    config: Config | None
    shape: tuple[int, ...] = (1, 6, 3, 5)
    num_groups: int = 2
    act: str | None = "silu"
    dtype: torch.dtype = torch.float32
    without: tuple[str, ...] = ()
    param_dtype: torch.dtype | None = None
    mean: float = 0.0
    std: float = 1.0
    layout: str | None = None
    mask: tuple[bool, ...] = (True, True, True, True)
    wide: bool = False
    few_at_once: bool = False

    def case(self) -> Case:
        """The arguments; x and residual in the layout that the cut is for."""
        case = full_case(self.shape, self.num_groups, self.act, dtype=self.dtype)
        left_out = set(self.without)
        if self.config in (FLAT, LAST_TILE):
            left_out.add("channel_order")
        case = replace(case, **dict.fromkeys(left_out))
        if self.mean or self.std != 1:
            case = replace(case, x=case.x * self.std + self.mean)
        if self.param_dtype is not None:
            for name in ("weight", "bias", "residual"):
                value = getattr(case, name)
                case = replace(case, **{name: None if value is None else value.to(self.param_dtype)})
        layout = self.layout or ("channels_last" if self.config in (LAST_TILE, LAST_SPLIT) else "contiguous")
        return replace(case, x=laid_out(case.x, layout))

    def gradient(self) -> Tensor:
        """What comes back from above."""
        return torch.randn(self.shape, generator=torch.Generator().manual_seed(1)).to(self.dtype)


PLAIN = ("weight", "bias", "residual", "channel_scale", "channel_shift", "channel_order")

RUNS: dict[str, Run] = {
    "tile": Run(TILE, (2, 6, 3, 5)),
    "tile, nothing optional": Run(TILE, act=None, without=PLAIN),
    "tile, 64-bit offsets": Run(TILE, wide=True),
    "tile, 14x14 and fp16 beyond 256": Run(
        Config("tile", 2, 256), (1, 4, 14, 14), dtype=torch.float16, std=900.0, without=("channel_scale",)
    ),
    "tile, mean/std 1000": Run(TILE, mean=1000.0, without=("channel_shift",)),
    "flat": Run(FLAT, (2, 6, 3, 5)),
    "flat, 7x7, odd D, mean/std 1000": Run(
        Config("flat", 1, 256), (1, 6, 7, 7), act="relu", mean=1000.0, without=PLAIN[3:]
    ),
    "flat, one position": Run(FLAT, (2, 15), 3, "gelu"),
    "flat, bf16": Run(FLAT, dtype=torch.bfloat16, act="hardswish"),
    "flat, only dx and dbias wanted": Run(FLAT, mask=(True, False, True, False)),
    "split, unequal tails": Run(SPLIT, (2, 5, 3, 7), 1, act="relu6"),
    "split, 64-bit offsets": Run(SPLIT, (1, 6, 3, 5), wide=True),
    "split, mean/std 1000": Run(
        SPLIT, (1, 3, 1, 37), 1, "relu", mean=1000.0, without=("channel_scale", "channel_shift")
    ),
    "split, fp16 beyond 256": Run(SPLIT, (1, 3, 1, 20), 1, None, torch.float16, std=900.0, without=PLAIN),
    "split, no gradient but dx": Run(SPLIT, (1, 3, 1, 20), 1, mask=(True, False, False, False)),
    "channels_last tile": Run(LAST_TILE, act="leaky_relu"),
    "channels_last tile, two groups a program": Run(LAST_TILE, (1, 6, 3, 5), 3, "gelu"),
    "channels_last tile, 64-bit offsets": Run(LAST_TILE, (1, 6, 3, 5), 3, wide=True),
    "channels_last tile, 7x7, mean/std 1000": Run(
        Config("channels_last_tile", 64, 4),
        (1, 4, 7, 7),
        1,
        "relu",
        mean=1000.0,
        layout="channels_last",
        without=PLAIN[3:],
    ),
    "channels_last split, unequal tails": Run(LAST_SPLIT, (2, 10, 3, 7)),
    "channels_last split, merged in several steps": Run(LAST_SPLIT, (3, 10, 3, 5), few_at_once=True),
    "channels_last split, natural order": Run(LAST_SPLIT, (1, 6, 3, 7), without=("channel_order", "weight")),
    "channels_last split, 64-bit offsets": Run(LAST_SPLIT, (1, 6, 3, 5), wide=True),
    "channels_last split, mean/std 1000": Run(LAST_SPLIT, (1, 6, 3, 7), act="relu", mean=1000.0, without=PLAIN[3:5]),
    "channels_last split, fp16 beyond 256": Run(
        LAST_SPLIT, (1, 6, 3, 5), act=None, dtype=torch.float16, std=900.0, without=("channel_scale", "residual")
    ),
    "parameters and residual of another dtype": Run(TILE, dtype=torch.float16, param_dtype=torch.float32),
    "chosen, contiguous": Run(None, (1, 4, 5, 5)),
    "chosen, channels_last": Run(None, (1, 4, 4, 5), layout="channels_last"),
    "chosen, a slice": Run(None, (1, 4, 4, 5), layout="sliced"),
    "chosen, five dimensions": Run(None, (1, 4, 2, 3, 3), layout="channels_last"),
}

"""How the work is cut for a problem and a machine: a pure function, so that a test and a compiler without a GPU see it.

Why not autotuned: another block size sums in another order, and the same input must give the same bits every time.
Why without N: a sample must have the same bits alone and in a batch. So the cut is made for a batch of one, which is
where filling the machine is hard; a larger batch is more programs of the same cut.

The numbers come from compiling every regime for sm_80 and sm_90 (`examples/benchmarks/aot_gate.py`): a program may
hold so much that no register spills.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

# Elements that 16 warps hold in registers without spilling: one tensor forward, two backward; half of it where a
# residual in fp32 or the function of the activation takes registers too, and where odd rows are loaded one by one.
_CAPACITY = {False: 32768, True: 16384}
_HEAVY = {False: ("gelu",), True: ("silu", "gelu", "hardswish")}
# In channels_last a thread holds the factors of its channels besides.
_CAPACITY_CHANNELS_LAST = 16384
# A flat tile keeps the factors of every element, and its backward scans three of its size for the channels' sums.
_CAPACITY_FLAT = {False: 8192, True: 4096}
_MOST_COLUMNS = 16384
# What a warp should have: fewer warps make a reduction cheaper, more keep more loads in flight.
_ELEMENTS_PER_WARP = 1024
# One block of a streaming kernel, 4 warps with 16 elements a thread, and the chunk of such blocks of a program.
_STREAM_BLOCK = 2048
_SMALLEST_CHUNK, _LARGEST_CHUNK = 4096, 16384
# Partial results that one program merges at once
_MOST_PARTS, _MOST_SLABS = 1024, 128
# A memory transaction is 32 bytes; two of them keep DRAM bursts whole.
_SECTOR_BYTES, _BURST_BYTES = 32, 64
# Clusters are compiled and checked for this architecture only.
_CLUSTER_ARCH, _CLUSTER_SIZES, _MOST_CLUSTER_ROWS = 90, (2, 4, 8), 64
_VECTOR_BYTES = 16


class Machine(NamedTuple):
    """What the cut depends on: streaming multiprocessors, and compute capability as in sm_90."""

    sm_count: int
    arch: int


class Problem(NamedTuple):
    """One sample's problem: G groups of D channels, S positions, bytes of an element, and what is done with them."""

    num_groups: int
    channels_per_group: int
    positions: int
    itemsize: int
    channels_last: bool = False
    ordered: bool = False
    backward: bool = False
    act: str | None = None
    residual: bool = False

    @property
    def channels(self) -> int:
        """C."""
        return self.num_groups * self.channels_per_group

    @property
    def group_size(self) -> int:
        """Elements of a group, D * S."""
        return self.channels_per_group * self.positions


@dataclass(frozen=True)
class Config:
    """How the work is cut.

    Attributes:
        regime: see the package; names the kernels.
        rows, columns: the block of a program: channels by positions, or positions by channels in channels_last.
            Powers of two.
        chunk: positions that a program of a split regime walks through, a multiple of its block's; otherwise 0.
        num_warps: warps of a program, of each CTA in a cluster.
        num_ctas: CTAs of a program; more than 1 is a cluster.
    """

    regime: str
    rows: int
    columns: int
    chunk: int = 0
    num_warps: int = 4
    num_ctas: int = 1

    @property
    def one_read(self) -> bool:
        """Whether each element is read once."""
        return self.chunk == 0


@functools.lru_cache(4096)
def choose_config(problem: Problem, machine: Machine) -> Config:
    """Choose the regime and its sizes.

    Args:
        problem: sizes of one sample, layout and direction.
        machine: the GPU.

    Returns:
        The cut; equal arguments give an equal cut.

    Example:
        >>> layer3 = Problem(num_groups=32, channels_per_group=32, positions=14 * 14, itemsize=2)
        >>> choose_config(layer3, Machine(sm_count=108, arch=80)).regime
        'flat'
    """
    if problem.channels_last:
        return _channels_last(problem, machine)
    return _contiguous(problem, machine)


def _contiguous(problem: Problem, machine: Machine) -> Config:
    alignment = math.gcd(problem.positions * problem.itemsize, _VECTOR_BYTES)
    rows, columns = power_of_two(problem.channels_per_group), power_of_two(problem.positions)
    flat = power_of_two(problem.group_size)
    if alignment < _VECTOR_BYTES and not problem.ordered and flat <= _CAPACITY_FLAT[problem.backward]:
        return Config("flat", 1, flat, num_warps=_warps(flat, problem.backward + 1))
    capacity = _capacity(problem) >> (alignment < _VECTOR_BYTES // 2)
    if columns > _MOST_COLUMNS:
        return _split(problem, machine)
    if rows * columns <= capacity:
        return Config("tile", rows, columns, num_warps=_warps(rows * columns, problem.backward))
    if machine.arch == _CLUSTER_ARCH and alignment == _VECTOR_BYTES and rows <= _MOST_CLUSTER_ROWS:
        for num_ctas in _CLUSTER_SIZES:
            # each CTA has rows of its own: triton cannot reduce a row over the cluster to a vector
            if rows * columns <= capacity * num_ctas and num_ctas <= rows:
                return Config("cluster", rows, columns, num_warps=16, num_ctas=num_ctas)
    return _split(problem, machine)


def _split(problem: Problem, machine: Machine) -> Config:
    programs = math.ceil(2 * machine.sm_count / problem.num_groups)
    size = _clamp(power_of_two(problem.group_size // programs), _SMALLEST_CHUNK, _LARGEST_CHUNK)
    size = max(size, power_of_two(math.ceil(problem.group_size / _MOST_PARTS)))
    # Short rows: several channels a block, cut so that little of the last block of a row is empty.
    columns = _STREAM_BLOCK
    while columns > 64 and _padded(problem.positions, columns) > 1.15 * problem.positions:
        columns //= 2
    rows = _clamp(_STREAM_BLOCK // columns, 1, power_of_two(problem.channels_per_group))
    chunk = max(columns, min(size // rows, power_of_two(problem.positions)))
    return Config("split", rows, columns, chunk)


def _channels_last(problem: Problem, machine: Machine) -> Config:
    capacity = min(_capacity(problem), _CAPACITY_CHANNELS_LAST)
    d = problem.channels_per_group
    lanes, rows = power_of_two(d), power_of_two(problem.positions)
    if lanes == d:
        fill = _BURST_BYTES // problem.itemsize
        while lanes * 2 <= fill and lanes < problem.channels and rows * lanes * 2 <= capacity:
            lanes *= 2
    wide_enough = min(d, lanes) * problem.itemsize >= _BURST_BYTES or (
        lanes % d == 0 and (lanes * problem.itemsize >= _SECTOR_BYTES or lanes >= problem.channels)
    )
    if not problem.ordered and wide_enough and rows * lanes <= capacity:
        # more warps where all that takes registers comes together
        crowding = problem.backward + (_heavy(problem) and _wide_residual(problem))
        return Config("channels_last_tile", rows, lanes, num_warps=_warps(rows * lanes, crowding))
    columns = min(128 // problem.itemsize, power_of_two(problem.channels))
    rows = _STREAM_BLOCK // columns
    blocks = math.ceil(problem.channels / columns)
    chunk = power_of_two(math.ceil(problem.positions * blocks / (2 * machine.sm_count)))
    chunk = max(rows, chunk, power_of_two(math.ceil(problem.positions / _MOST_SLABS)))
    return Config("channels_last_split", rows, columns, chunk)


def _capacity(problem: Problem) -> int:
    return _CAPACITY[problem.backward] >> (_heavy(problem) or _wide_residual(problem))


def _heavy(problem: Problem) -> bool:
    return problem.act in _HEAVY[problem.backward]


def _wide_residual(problem: Problem) -> bool:
    return problem.residual and problem.itemsize == 4


def _warps(elements: int, crowding: int) -> int:
    """Warps for a tile; `crowding` halves what each of them gets."""
    return _clamp((elements << crowding) // _ELEMENTS_PER_WARP, 2, 16)


def power_of_two(number: int) -> int:
    """The smallest power of two that is not less than `number`."""
    return 1 << max(number - 1, 0).bit_length()


def _padded(number: int, block: int) -> int:
    return -(-number // block) * block


def _clamp(number: int, low: int, high: int) -> int:
    return max(low, min(number, high))

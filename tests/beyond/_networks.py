"""Networks of other packages than timm, small and with random weights, for the tests and the table beyond timm.

Each says how it is built, what goes in, and which of its outputs are compared (a detector's boxes come out of a
selection, which no error can be measured on: its feature maps are compared instead). Nothing is downloaded.
"""

from __future__ import annotations

import dataclasses
import importlib
import warnings
from collections.abc import Callable
from typing import Any

import torch
from _whole_way import settle
from torch import Tensor, nn

Answer = Callable[[nn.Module, Tensor], Any]


def called(model: nn.Module, x: Tensor) -> Any:
    """What the network gives when it is called."""
    return model(x)


def of_backbone(model: nn.Module, x: Tensor) -> Any:
    """What the `backbone` gives: the rest of such a network selects, or takes other inputs."""
    return model.backbone(x)


@dataclasses.dataclass(frozen=True)
class Network:
    """One network.

    Attributes:
        package: where it comes from; tests skip where that is not installed.
        name: as the package calls it.
        build: makes it with the package's own initial weights.
        shape: of one input, without the batch.
        swapped: how many norms become GroupNorms; 0 where it has none.
        kept: how many are left, with a reason.
        answer: what of it is compared.
        tested: whether the tests look at it; the table has them all.
        export: whether it is exported and run in onnxruntime.
    """

    package: str
    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    swapped: int
    kept: int = 0
    answer: Answer = called
    tested: bool = False
    export: bool = False

    def __str__(self) -> str:
        return f"{self.package}: {self.name}"

    def inputs(self, batch: int = 2) -> Tensor:
        """A batch of inputs, always the same."""
        return torch.randn(batch, *self.shape, generator=torch.Generator().manual_seed(1))

    def run(self, model: nn.Module) -> Any:
        """The answer of this network, or a converted one."""
        return self.answer(model, self.inputs())

    def made(self) -> nn.Module:
        """The network in eval mode, with norms as a trained network has them (`settle`)."""
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of constructors, about defaults that they will change
            torch.manual_seed(0)
            return settle(self.build().eval(), lambda model: self.answer(model, self.inputs(8)))


# how they are built


def made_by(module: str, name: str, *arguments: Any, **options: Any) -> Callable[[], nn.Module]:
    """A call of a class or function, made when the network is built: its package is not imported before."""

    def build() -> nn.Module:
        model: nn.Module = getattr(importlib.import_module(module), name)(*arguments, **options)
        return model

    return build


def _torchvision(name: str, **options: Any) -> Callable[[], nn.Module]:
    return made_by("torchvision.models", "get_model", name, weights=None, **options)


def _smp(name: str, encoder: str = "resnet18", **options: Any) -> Callable[[], nn.Module]:
    return made_by("segmentation_models_pytorch", name, encoder, encoder_weights=None, classes=3, **options)


def _monai(name: str, **options: Any) -> Callable[[], nn.Module]:
    return made_by("monai.networks.nets", name, **options)


def _transformers(name: str, **options: Any) -> Callable[[], nn.Module]:
    """A class of transformers on a configuration."""

    def build() -> nn.Module:
        import transformers

        kind = getattr(transformers, name)
        return kind(kind.config_class(**options))

    return build


def _faster_rcnn() -> nn.Module:
    """With frozen norms, as torchvision builds it around pretrained weights."""
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
    from torchvision.ops import FrozenBatchNorm2d

    backbone = resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, norm_layer=FrozenBatchNorm2d, trainable_layers=3
    )
    return FasterRCNN(backbone, num_classes=5)


_SMALL_DETR = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "num_queries": 5,
}
_SMALL_RESNET = {"embedding_size": 16, "hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1]}


def _detr() -> nn.Module:
    """Its backbone's norms are replaced by transformers' own frozen ones."""
    import transformers

    backbone = transformers.ResNetConfig(**_SMALL_RESNET, out_features=["stage4"])
    config = transformers.DetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone_config=backbone, **_SMALL_DETR
    )
    return transformers.DetrForObjectDetection(config)


def _rt_detr() -> nn.Module:
    """Frozen norms in the backbone, norms that train everywhere else."""
    import transformers

    backbone = transformers.RTDetrResNetConfig(**_SMALL_RESNET, out_features=["stage2", "stage3", "stage4"])
    config = transformers.RTDetrConfig(
        backbone_config=backbone,
        encoder_in_channels=[32, 48, 64],
        decoder_in_channels=[32] * 3,
        encoder_hidden_dim=32,
        hidden_expansion=0.5,
        **(_SMALL_DETR | {"num_queries": 10}),
    )
    return transformers.RTDetrForObjectDetection(config)


_AUDIO = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "conv_dim": [16] * 3,
    "conv_stride": [5, 2, 2],
    "conv_kernel": [10, 3, 3],
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
}
_UNET_3D = {"spatial_dims": 3, "in_channels": 1, "out_channels": 2, "channels": (8, 16, 32), "strides": (2, 2)}
_IMAGE, _VIDEO, _VOLUME = (3, 64, 64), (3, 4, 32, 32), (1, 16, 16, 16)
_TV, _SMP, _HF = "torchvision", "segmentation_models_pytorch", "transformers"

NETWORKS = (
    Network(_TV, "resnet18", _torchvision("resnet18"), _IMAGE, 20, export=True),
    Network(_TV, "vgg11_bn", _torchvision("vgg11_bn"), _IMAGE, 8),
    Network(_TV, "densenet121", _torchvision("densenet121"), _IMAGE, 121),
    Network(_TV, "googlenet", _torchvision("googlenet", init_weights=False, aux_logits=False), _IMAGE, 57),
    Network(_TV, "inception_v3", _torchvision("inception_v3", init_weights=False, aux_logits=False), (3, 128, 128), 94),
    Network(_TV, "mobilenet_v2", _torchvision("mobilenet_v2"), _IMAGE, 52),
    Network(_TV, "mobilenet_v3_small", _torchvision("mobilenet_v3_small"), _IMAGE, 34, tested=True, export=True),
    Network(_TV, "efficientnet_b0", _torchvision("efficientnet_b0"), _IMAGE, 49),
    Network(_TV, "mnasnet0_5", _torchvision("mnasnet0_5"), _IMAGE, 52),
    Network(_TV, "shufflenet_v2_x0_5", _torchvision("shufflenet_v2_x0_5"), _IMAGE, 56, tested=True, export=True),
    Network(_TV, "regnet_y_400mf", _torchvision("regnet_y_400mf"), _IMAGE, 53),
    Network(_TV, "squeezenet1_1", _torchvision("squeezenet1_1"), _IMAGE, 0),
    Network(_TV, "convnext_tiny", _torchvision("convnext_tiny"), _IMAGE, 0),
    Network(_TV, "FasterRCNN, frozen", _faster_rcnn, _IMAGE, 20, answer=of_backbone, tested=True),
    Network(
        _TV,
        "ssdlite320_mobilenet_v3_large",
        _torchvision("ssdlite320_mobilenet_v3_large", weights_backbone=None),
        _IMAGE,
        70,
        answer=of_backbone,
    ),
    Network(
        _TV,
        "deeplabv3_mobilenet_v3_large",
        _torchvision("deeplabv3_mobilenet_v3_large", weights_backbone=None),
        _IMAGE,
        53,
        tested=True,
        export=True,
    ),
    Network(
        _TV, "lraspp_mobilenet_v3_large", _torchvision("lraspp_mobilenet_v3_large", weights_backbone=None), _IMAGE, 47
    ),
    Network(_TV, "mc3_18", _torchvision("mc3_18"), _VIDEO, 20, tested=True, export=True),
    Network(_TV, "r2plus1d_18", _torchvision("r2plus1d_18"), _VIDEO, 37),
    Network(
        _TV,
        "raft_large",
        _torchvision("raft_large"),
        (3, 128, 128),
        15,
        answer=lambda model, x: model(x, x.flip(0), num_flow_updates=2),
    ),
    Network(
        _SMP,
        "Unet, scSE",
        _smp("Unet", encoder_depth=3, decoder_channels=(64, 32, 16), decoder_attention_type="scse"),
        _IMAGE,
        26,
        tested=True,
        export=True,
    ),
    Network(_SMP, "UnetPlusPlus", _smp("UnetPlusPlus"), _IMAGE, 42),
    Network(_SMP, "PSPNet", _smp("PSPNet"), _IMAGE, 24, tested=True, export=True),
    Network(_SMP, "Linknet, efficientnet-b0", _smp("Linknet", "efficientnet-b0"), _IMAGE, 64, tested=True),
    Network(_SMP, "DeepLabV3Plus, timm-regnety_002", _smp("DeepLabV3Plus", "timm-regnety_002"), _IMAGE, 53),
    Network(_SMP, "FPN, mobileone_s0", _smp("FPN", "mobileone_s0"), _IMAGE, 226),
    Network(_SMP, "UPerNet, tu-efficientnet_lite0", _smp("UPerNet", "tu-efficientnet_lite0"), _IMAGE, 60),
    Network(
        "monai", "UNet", _monai("UNet", norm="batch", num_res_units=1, **_UNET_3D), _VOLUME, 6, tested=True, export=True
    ),
    Network("monai", "UNet, instance", _monai("UNet", num_res_units=1, **_UNET_3D), _VOLUME, 0, tested=True),
    Network("monai", "AttentionUnet", _monai("AttentionUnet", **_UNET_3D), _VOLUME, 12, kept=2, tested=True),
    Network("monai", "SegResNet, batch", _monai("SegResNet", spatial_dims=3, norm="batch"), _VOLUME, 25),
    Network("monai", "SegResNet", _monai("SegResNet", spatial_dims=3), _VOLUME, 0),
    Network(
        "monai",
        "DenseNet121",
        _monai("DenseNet121", spatial_dims=3, in_channels=1, out_channels=3),
        (1, 32, 32, 32),
        121,
    ),
    Network("monai", "VNet", _monai("VNet", spatial_dims=3, in_channels=1, out_channels=2), _VOLUME, 24),
    Network(
        "monai",
        "BasicUNet, 1-D",
        _monai("BasicUNet", spatial_dims=1, out_channels=2, features=(8, 8, 16, 16, 16, 8), norm="batch"),
        (1, 64),
        18,
        tested=True,
        export=True,
    ),
    Network(
        _HF,
        "ResNet",
        _transformers("ResNetForImageClassification", **_SMALL_RESNET),
        _IMAGE,
        16,
        tested=True,
        export=True,
    ),
    Network(
        _HF,
        "RegNet",
        _transformers("RegNetForImageClassification", groups_width=8, **_SMALL_RESNET),
        _IMAGE,
        17,
        tested=True,
    ),
    Network(_HF, "MobileNetV2", _transformers("MobileNetV2ForImageClassification"), _IMAGE, 52, tested=True),
    Network(
        _HF,
        "MobileViT",
        _transformers(
            "MobileViTForImageClassification", image_size=64, hidden_sizes=[16] * 3, neck_hidden_sizes=[8] * 6 + [16]
        ),
        _IMAGE,
        32,
    ),
    Network(
        _HF,
        "LeViT",
        _transformers(
            "LevitForImageClassification",
            image_size=64,
            hidden_sizes=[16, 32, 48],
            key_dim=[8] * 3,
            depths=[1] * 3,
            num_attention_heads=[2] * 3,
        ),
        _IMAGE,
        27,
    ),
    Network(_HF, "DETR, frozen", _detr, _IMAGE, 16, tested=True, export=True),
    Network(_HF, "RT-DETR, partly frozen", _rt_detr, _IMAGE, 64, tested=True),
    Network(
        _HF,
        "SegFormer",
        _transformers(
            "SegformerForSemanticSegmentation", hidden_sizes=[8, 16, 16, 32], decoder_hidden_size=32, depths=[1] * 4
        ),
        _IMAGE,
        1,
        tested=True,
    ),
    Network(
        _HF,
        "Wav2Vec2-Conformer",
        _transformers("Wav2Vec2ConformerForSequenceClassification", **_AUDIO),
        (2000,),
        2,
        tested=True,
    ),
    Network(
        _HF,
        "HuBERT, batch norm",
        _transformers("HubertModel", conv_pos_batch_norm=True, **_AUDIO),
        (2000,),
        1,
    ),
    Network(
        "diffusers",
        "UNet2DModel",
        made_by(
            "diffusers",
            "UNet2DModel",
            sample_size=16,
            block_out_channels=(32, 32),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        ),
        (3, 16, 16),
        0,
        answer=lambda model, x: model(x, timestep=3),
        tested=True,
    ),
    Network(
        "diffusers",
        "AutoencoderKL",
        made_by(
            "diffusers",
            "AutoencoderKL",
            block_out_channels=(32, 32),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
        ),
        (3, 16, 16),
        0,
    ),
    Network(
        "diffusers",
        "PaellaVQModel",
        made_by(
            "diffusers.pipelines.deprecated.wuerstchen",
            "PaellaVQModel",
            num_vq_embeddings=32,
            embed_dim=16,
            bottleneck_blocks=2,
        ),
        (3, 16, 16),
        1,
    ),
)

"""A converted network in Lightning, unchanged: a module of your own around it, and a callback for the softness.

    pip install 'gnswap[lightning]'
    python examples/own_loop_lightning.py --smoke

With more than one device, Lightning's DDP works as it is: there are no statistics to synchronise, so `sync_batchnorm`
has nothing to do.
"""

from __future__ import annotations

import argparse
import warnings

import lightning
import timm
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

import gnswap


class Classifier(lightning.LightningModule):
    """Any network; nothing here knows that it was converted."""

    def __init__(self, network: nn.Module, lr: float = 1e-3) -> None:
        super().__init__()
        self.network, self.lr = network, lr
        self.losses: list[float] = []

    def training_step(self, batch: tuple[Tensor, Tensor], _index: int) -> Tensor:
        x, labels = batch
        loss = F.cross_entropy(self.network(x), labels)
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # timm spares parameters of one dimension the weight decay: gamma and beta of the converted norms too
        return create_optimizer_v2(self.network, opt="adamw", lr=self.lr, weight_decay=0.05)


class Softness(lightning.Callback):
    """Takes the network to pure GroupNorm in the first half of the steps; its place is in Lightning's checkpoints."""

    def on_fit_start(self, trainer: lightning.Trainer, module: Classifier) -> None:
        steps = max(int(trainer.estimated_stepping_batches) // 2, 1)
        self.schedule = gnswap.SoftnessSchedule(module.network, end=0.0, steps=steps)

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: object) -> None:
        while self.schedule.last_step < trainer.global_step:  # optimizer steps, not batches
            self.schedule.step()


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet18", help="a name that timm knows (resnet18)")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--smoke", action="store_true", help="a tiny network: seconds")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    network = timm.create_model("test_resnet" if options.smoke else options.model, num_classes=2)
    module = Classifier(gnswap.convert(network).model)
    labels = torch.arange(32) % 2
    x = torch.randn(32, 3, 32, 32) + torch.where(labels == 0, -1.0, 1.0)[:, None, None, None]  # dark and bright
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, labels), batch_size=1, shuffle=True)
    trainer = lightning.Trainer(
        max_epochs=options.epochs,
        accumulate_grad_batches=4,
        callbacks=[Softness()],
        accelerator="auto",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=not options.smoke,
        enable_model_summary=False,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice about loader processes
        trainer.fit(module, data)
    first, last = module.losses[: len(labels)], module.losses[-len(labels) :]
    pure = max(layer.softness for layer in network_layers(module.network))
    result = {"first": sum(first) / len(first), "last": sum(last) / len(last), "softness": pure}
    print(result)
    return result


def network_layers(network: nn.Module) -> list[gnswap.FusedGroupNorm]:
    return [module for module in network.modules() if isinstance(module, gnswap.FusedGroupNorm)]


if __name__ == "__main__":
    main()

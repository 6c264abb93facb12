"""Differentially private training with Opacus: the per-sample gradients of a converted network.

Why it needs a word of ours: Opacus computes the gradient of every sample for itself, layer type by layer type, and it
refuses trainable layers with buffers, since a buffer may remember private data (a BatchNorm's does). The buffers of a
`FusedGroupNorm` are constants of the conversion: training reads them and never writes them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gnswap import ops
from gnswap._errors import MissingDependencyError, ModelError
from gnswap._layer import FusedGroupNorm
from gnswap.ops._activations import activate

if TYPE_CHECKING:
    from opacus import GradSampleModule
    from torch.utils.hooks import RemovableHandle

_ONE_OUTPUT = (FusedGroupNorm, nn.modules.conv._ConvNd, nn.Linear)  # what Opacus hooks in these networks


def grad_sample_module(model: nn.Module, **options: Any) -> GradSampleModule:
    """Wrap a converted network for Opacus, whose `PrivacyEngine.make_private` takes the result as its `module`.

    The network is wrapped, not copied. Layers other than ours are held to Opacus' own rule: trainable, and with
    buffers, they are refused. The privacy guarantee covers what happens in training: a conversion is public as far as
    the pretrained weights and the photos given as `calibration=` are.

    Args:
        model: a converted network in train mode.
        **options: handed to `opacus.GradSampleModule`: `batch_first`, `loss_reduction`.

    Returns:
        the network with Opacus' hooks on it.

    Raises:
        MissingDependencyError: Opacus is not installed.
        ModelError: a layer that Opacus cannot compute per-sample gradients of; the message names it.

    Example:
        >>> import torch, gnswap
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
        >>> private = gnswap.grad_sample_module(gnswap.convert(net).model.train())
        >>> private(torch.randn(4, 3, 6, 6)).sum().backward()
        >>> private.get_submodule("_module.1").weight.grad_sample.shape
        torch.Size([4, 8])

    Source: Abadi et al., *Deep Learning with Differential Privacy* (2016); Yousefpour et al., *Opacus* (2021).
    """
    try:
        from opacus import GradSampleModule
        from opacus.grad_sample import register_grad_sampler
    except ImportError as error:
        raise MissingDependencyError(
            "Opacus is not installed, and per-sample gradients come from it", fix="Run: pip install 'gnswap[private]'"
        ) from error
    _check(model)
    register_grad_sampler(FusedGroupNorm)(_grad_sample)
    # not strict: the one thing that strict refuses has just been checked, with our layers exempt
    wrapped = GradSampleModule(model, strict=False, **options)
    for module in model.modules():
        if isinstance(module, _ONE_OUTPUT) and module._backward_hooks:
            wrapped.autograd_grad_sample_hooks.append(_hook_the_output(module))  # Opacus removes them with its own
    return wrapped


def _hook_the_output(module: nn.Module) -> RemovableHandle:
    """Move Opacus' hook from the module to its output.

    PyTorch makes the output of a module with a backward hook a view that must not be changed in place, so the
    `out += shortcut` and in-place activations of most ResNets would end in an error (opacus#828). A hook on the
    output gets the same gradient.
    """
    hooks = list(module._backward_hooks.values())
    module._backward_hooks.clear()
    module._is_full_backward_hook = None

    def watch(layer: nn.Module, _inputs: object, output: Tensor) -> None:
        def pass_on(gradient: Tensor) -> None:
            for hook in hooks:
                hook(layer, (), (gradient,))

        if output.requires_grad:
            output.register_hook(pass_on)  # type: ignore[no-untyped-call]  # torch's is not annotated

    return module.register_forward_hook(watch)


def _check(model: nn.Module) -> None:
    for name, module in model.named_modules():
        where = name or type(module).__name__
        if isinstance(module, FusedGroupNorm):
            inner = [child for child in (module.act, module.drop) if isinstance(child, nn.Module)]
            trains = any(next(child.parameters(), None) is not None for child in inner)
            if trains or not isinstance(module.drop, nn.Identity | None):
                raise ModelError(
                    "this norm holds a layer whose per-sample gradients cannot be had from the norm's output",
                    where=where,
                    expected="an activation without parameters, and nothing between it and the norm",
                    found=", ".join(type(child).__name__ for child in inner),
                    fix="Take the norm and what follows it apart into layers of their own.",
                )
        elif any(own.requires_grad for own in module.parameters(recurse=False)) and any(True for _ in module.buffers()):
            names = [buffer for buffer, _ in module.named_buffers()]
            raise ModelError(
                "Opacus takes no trainable layer with buffers",
                where=where,
                found=f"{type(module).__name__} with {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}",
                fix="Freeze its own parameters, or move them into a layer without buffers.",
            )


def _grad_sample(layer: FusedGroupNorm, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    """The gradients of gamma and beta for each sample, `[N, C]`, from the layer's inputs and its output's gradient."""
    x, *residual = activations
    normalised = ops.group_norm(
        x,
        layer.num_groups,
        None,
        None,
        layer.eps + layer.softness,
        channel_scale=layer.channel_scale,
        channel_shift=layer.channel_shift,
        channel_order=layer.channel_order,
    )
    along_channels = (1, -1, *[1] * (x.ndim - 2))
    weight, bias = (None if one is None else one.detach().view(along_channels) for one in layer.effective_affine())
    before = normalised if weight is None else normalised * weight
    for term in (bias, *residual):
        before = before if term is None else before + term
    backprops = _through_activation(layer, before, backprops)
    positions = list(range(2, x.ndim))
    gradients: dict[nn.Parameter, Tensor] = {}
    if layer.weight is not None and layer.weight.requires_grad:
        product = normalised * backprops
        gradient = product.sum(positions) if positions else product
        for factor in (layer.channel_gain, layer.channel_correction):
            gradient = gradient if factor is None else gradient * factor
        gradients[layer.weight] = gradient
    if layer.bias is not None and layer.bias.requires_grad:
        gradients[layer.bias] = backprops.sum(positions) if positions else backprops
    return gradients


def _through_activation(layer: FusedGroupNorm, before: Tensor, backprops: Tensor) -> Tensor:
    if layer.act is None:
        return backprops
    with torch.enable_grad():
        leaf = before.detach().requires_grad_()
        whole = leaf.clone()  # activations may work in place
        after = layer.act(whole) if isinstance(layer.act, nn.Module) else activate(whole, layer.act)
        return torch.autograd.grad(after, leaf, backprops)[0]

"""What the command line's MODEL and --weights stand for: a name becomes a network, a file becomes its weights."""

from __future__ import annotations

import difflib
import importlib
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from gnswap import _weights
from gnswap._errors import ArgumentError, ModelError, StoreError
from gnswap._saved import ModelSource

_FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
_NESTS = ("state_dict", "model")


def is_factory(name: str) -> bool:
    """Whether MODEL has the form `package.module:factory`."""
    return _FACTORY.fullmatch(name) is not None


def source_of(name: str) -> ModelSource | None:
    """What to record of MODEL when it is saved; None for timm names, which the saved model tells by itself."""
    return ModelSource("factory", name) if is_factory(name) else None


def build_model(name: str, *, pretrained: bool = False) -> nn.Module:
    """The network that MODEL names, in eval mode.

    Args:
        name: a timm name, or `package.module:factory`, where the current directory can be imported from.
        pretrained: fetch timm's pretrained weights.

    Raises:
        ModelError: no such timm model, module or attribute; the factory returns no module; no pretrained weights.
        ArgumentError: pretrained weights were asked for from a factory.
    """
    if is_factory(name):
        if pretrained:
            raise ArgumentError(
                "--pretrained is for timm models",
                where=name,
                fix="Let the factory load its weights, or give them with --weights.",
            )
        return _from_factory(name).eval()
    return _from_timm(name, pretrained).eval()


def _from_timm(name: str, pretrained: bool) -> nn.Module:
    import timm

    if not timm.is_model(name.partition(".")[0]):
        close = difflib.get_close_matches(name, timm.list_models(), n=4)
        raise ModelError(
            "timm has no model of this name",
            where=name,
            fix=(f"Did you mean {', '.join(close)}? " if close else "")
            + "timm.list_models() lists all names; your own network is package.module:factory.",
        )
    try:
        model: nn.Module = timm.create_model(name, pretrained=pretrained)
    except Exception as error:
        if not pretrained:
            raise
        # a download goes through several libraries, each with exceptions of its own
        raise ModelError(
            "the pretrained weights could not be had",
            where=name,
            found=f"{type(error).__name__}: {error}",
            fix="Check the network, or give a file with --weights.",
        ) from error
    return model


def _from_factory(name: str) -> nn.Module:
    module_name, _, attribute = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there, and something that it imports is missing
        raise ModelError(
            "there is no such module", where=name, found=str(error), fix=f"It is looked for in {here} and sys.path."
        ) from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            close = difflib.get_close_matches(part, [key for key in vars(found) if not key.startswith("_")], n=3)
            raise ModelError(
                f"there is no {part!r} in {module_name}",
                where=name,
                fix=f"Did you mean {', '.join(close)}?" if close else "It must be a name in that module.",
            )
        found = getattr(found, part)
    made = found() if callable(found) and not isinstance(found, nn.Module) else found
    if not isinstance(made, nn.Module):
        raise ModelError(
            "the factory returned no network",
            where=name,
            expected="a torch.nn.Module",
            found=type(made).__qualname__,
        )
    return made


def require_finite(model: nn.Module, name: str) -> None:
    """Refuse a network that can only answer NaN: a conversion would keep that faithfully.

    Raises:
        ModelError: a parameter has a NaN or an infinity.
    """
    present = ((path, value) for path, value in model.named_parameters() if not torch.nn.parameter.is_lazy(value))
    broken = [path for path, value in present if not bool(value.isfinite().all())]
    if broken:
        raise ModelError(
            "the weights are not finite",
            where=name,
            expected="numbers in every parameter",
            found=f"NaN or infinity in {', '.join(broken[:4])}"
            + (f" and {len(broken) - 4} more" if len(broken) > 4 else ""),
            fix="Take a checkpoint from before the training diverged.",
        )


def load_weights(model: nn.Module, path: Path) -> tuple[str, ...]:
    """Load a checkpoint file into a model, strictly and without running any code from the file.

    Args:
        model: filled in place.
        path: a safetensors file, or a state dict that `torch.load(weights_only=True)` accepts. A dict around it
            under "state_dict" or "model" and the prefix "module." of DDP are taken off.

    Returns:
        What was taken off, in words.

    Raises:
        StoreError: no such file, a pickle with anything but tensors in it, or names or shapes that do not fit.
    """
    state, notes = _unwrapped(_read_checkpoint(path), path)
    wanted = model.state_dict()
    problems = [
        # state dicts from before PyTorch 0.4.1 have no counters, and torch fills them in
        *(f"{key} is missing" for key in wanted if key not in state and not key.endswith("num_batches_tracked")),
        *(f"{key} is not in the model" for key in state if key not in wanted),
        *(
            f"{key} is {tuple(value.shape)}, not {tuple(wanted[key].shape)}"
            for key, value in state.items()
            if key in wanted and value.shape != wanted[key].shape
        ),
    ]
    if problems:
        raise StoreError(
            "the weights do not fit the model",
            where=str(path),
            expected=f"the {len(wanted)} tensors of {type(model).__qualname__}",
            found="; ".join(problems[:6]) + (f"; and {len(problems) - 6} more" if len(problems) > 6 else ""),
            fix="Check that MODEL is the architecture that was trained, with the same number of classes.",
        )
    model.load_state_dict(state)
    return notes


def _read_checkpoint(path: Path) -> Any:
    if not path.is_file():
        raise StoreError("there is no such weights file", where=str(path), fix="Check --weights.")
    if path.suffix == ".safetensors":
        return _weights.read(path)[0]
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        # torch's first line advises to turn the protection off; what it met stands further down
        met = re.search(r"WeightsUnpickler error: ([^.\n]*)", str(error))
        raise StoreError(
            "refusing to unpickle this file",
            where=str(path),
            expected="a state dict: names and tensors only",
            found="something else" if met is None else met[1].strip(),
            fix="Where it was trained, save model.state_dict() alone, or a safetensors file.",
        ) from error
    except Exception as error:  # on bytes that are no checkpoint the unpickler stumbles over anything, even a KeyError
        raise StoreError(
            "the weights cannot be read",
            where=str(path),
            expected="a safetensors file or a PyTorch state dict",
            found=f"{type(error).__name__}: {error}".splitlines()[0],
            fix="It is cut off or of another kind.",
        ) from error


def _unwrapped(state: Any, path: Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    notes = []
    while isinstance(state, Mapping) and (nest := next((key for key in _NESTS if _nested(state, key)), None)):
        state = state[nest]
        notes.append(f"took the weights from under {nest!r}")
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)} if _is_state(state) else {}
    if not tensors:
        raise StoreError(
            "there is no state dict in this file",
            where=str(path),
            expected="a mapping from names to tensors, plain or under 'state_dict' or 'model'",
            found=f"{type(state).__name__} with {', '.join(map(str, list(state)[:5]))}"
            if isinstance(state, Mapping)
            else type(state).__name__,
        )
    if all(key.startswith("module.") for key in tensors):
        tensors = {key.removeprefix("module."): value for key, value in tensors.items()}
        notes.append("took the prefix 'module.' off every name")
    return tensors, tuple(notes)


def _nested(state: Mapping[str, Any], key: str) -> bool:
    return isinstance(state.get(key), Mapping)


def _is_state(state: Any) -> bool:
    return isinstance(state, Mapping) and all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
    )

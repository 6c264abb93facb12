"""All tensors of a model into one safetensors file and back, bit for bit.

Why not `state_dict`: a saved conversion must give the same bits, so buffers that `state_dict` leaves out, dtypes,
memory layouts and ties between tensors are kept too; and hooks on `state_dict` may rename or convert.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gnswap import _sites
from gnswap._errors import StoreError

# Keys of tensors that are not in the model's own state_dict. No module path holds a colon before its first dot
# by accident; a clash is refused all the same.
BUFFER = "gnswap:buffer:"
ORIGIN = "gnswap:origin:"


@dataclasses.dataclass(frozen=True, eq=False)
class Slot:
    """One name under which a tensor is reached: the module that holds it and the key there."""

    owner: nn.Module
    key: str
    is_parameter: bool
    tensor: Tensor

    @property
    def stored_as(self) -> str:
        """The prefix of its name in the file."""
        return BUFFER if self.key in self.owner._non_persistent_buffers_set and not self.is_parameter else ""

    def put(self, tensor: Tensor) -> None:
        """Make another tensor object take this place."""
        if self.is_parameter:
            self.owner._parameters[self.key] = tensor  # type: ignore[assignment]
        else:
            self.owner._buffers[self.key] = tensor


def slots(model: nn.Module) -> dict[str, Slot]:
    """Every parameter and buffer under every name, by its name in the file."""
    found: dict[str, Slot] = {}
    for path, module in _sites.walk(model):
        for is_parameter, tensors in ((True, module._parameters), (False, module._buffers)):
            for key, tensor in tensors.items():
                if tensor is not None:
                    slot = Slot(module, key, is_parameter, tensor)
                    found[slot.stored_as + (f"{path}.{key}" if path else key)] = slot
    return found


def first_names(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a model, each once under its first name, and the first name of every further name.

    Raises:
        StoreError: a tensor cannot be stored: no data, sparse, quantised, a subclass; or a module keeps state outside
            of tensors.
    """
    for path, module in _sites.walk(model):
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise StoreError(
                "this module keeps state that is no tensor (get_extra_state)",
                where=path or "(root)",
                found=type(module).__qualname__,
                fix="Only tensors are saved, never pickles: remove that module first.",
            )
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[int, str] = {}
    for name, slot in slots(model).items():
        if id(slot.tensor) in seen:
            aliases[name] = seen[id(slot.tensor)]
            continue
        seen[id(slot.tensor)] = name
        tensors[name] = storable(name, slot.tensor)
    return tensors, aliases


def storable(name: str, tensor: Tensor) -> Tensor:
    """The tensor as safetensors takes it. Raises `StoreError` where its content would not come back."""
    problem = None
    if is_lazy(tensor) or tensor.is_meta:
        problem = "it has no data"
    elif type(tensor) not in (Tensor, nn.Parameter) or tensor.layout is not torch.strided or tensor.is_quantized:
        problem = f"{type(tensor).__qualname__}, {tensor.layout}"
    if problem is not None:
        raise StoreError("this tensor cannot be saved", where=name, expected="a plain dense tensor", found=problem)
    return tensor.detach()


def strides(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Memory layouts other than contiguous, such as channels_last: another layout may give other bits."""
    return {
        name: tuple(tensor.stride())
        for name, tensor in tensors.items()
        if not tensor.is_contiguous() and _is_dense(tensor)
    }


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill their memory without holes or overlap, in whatever order."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file. With one entry of metadata, the same content gives the same bytes.

    Raises:
        StoreError: a dtype that the format does not have.
    """
    # clone: safetensors refuses tensors that share memory, such as views into one flat buffer
    shared = Counter(tensor.untyped_storage().data_ptr() for tensor in tensors.values())
    data = {
        name: tensor.clone(memory_format=torch.contiguous_format)
        if not tensor.is_contiguous() or shared[tensor.untyped_storage().data_ptr()] > 1
        else tensor
        for name, tensor in tensors.items()
    }
    try:
        save_file(data, path, metadata=metadata)
    except (SafetensorError, ValueError, KeyError) as error:
        raise StoreError("safetensors cannot hold these tensors", where=str(path), found=str(error)) from error


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file.

    Raises:
        StoreError: no such file, cut off, or no safetensors file.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise StoreError(
            "the weights cannot be read",
            where=str(path),
            expected="a whole safetensors file",
            found=str(error),
            fix="It is cut off or of another kind: save or copy it again.",
        ) from error


def restore(
    model: nn.Module, tensors: dict[str, Tensor], aliases: dict[str, str], layouts: dict[str, tuple[int, ...]]
) -> None:
    """Fill a model with saved tensors: all of them, with their dtypes, layouts and ties.

    Raises:
        StoreError: names or shapes differ; the model is unchanged then.
    """
    places = slots(model)
    _check(places, tensors, aliases)
    filled: dict[int, str] = {}
    for name, value in tensors.items():
        slot = places[name]
        device = torch.device("cpu") if slot.tensor.is_meta else slot.tensor.device
        stride = layouts.get(name)
        data = (
            torch.empty_strided(value.shape, stride, dtype=value.dtype, device=device)
            if stride
            else torch.empty(value.shape, dtype=value.dtype, device=device)
        )
        data.copy_(value)
        if slot.tensor.is_meta or id(slot.tensor) in filled:  # tied here, but not where it was saved
            slot.put(nn.Parameter(data, slot.tensor.requires_grad) if slot.is_parameter else data)
        else:
            slot.tensor.data = data  # keeps the object, and with it whatever else points to it
        filled[id(slot.tensor)] = name
    places = slots(model)
    for name, first in aliases.items():
        places[name].put(places[first].tensor)


def _check(places: dict[str, Slot], tensors: dict[str, Tensor], aliases: dict[str, str]) -> None:
    saved = tensors.keys() | aliases.keys()
    problems = [
        *(f"{name} is missing in the file" for name in places.keys() - saved),
        *(f"{name} is not in the model" for name in saved - places.keys()),
        *(
            f"{name} ties to {first}, which is not in the file"
            for name, first in aliases.items()
            if first not in tensors
        ),
        *_wrong_shapes(places, tensors),
    ]
    if problems:
        problems.sort()
        raise StoreError(
            "the saved tensors do not fit the model",
            found="; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else ""),
            fix="The files were changed, or the network is built differently by now.",
        )


def _wrong_shapes(places: dict[str, Slot], tensors: dict[str, Tensor]) -> Iterator[str]:
    for name, tensor in tensors.items():
        if name in places and tensor.shape != places[name].tensor.shape:
            yield f"{name} is {tuple(tensor.shape)}, not {tuple(places[name].tensor.shape)}"


def flat(groups: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Groups of tensors by one name each, `group.name`, as a file keeps them."""
    return {f"{group}.{name}": tensor for group, held in groups.items() for name, tensor in held.items()}


def grouped(tensors: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, dict[str, Tensor]]:
    """The groups that `flat` was given; those of `names` that held nothing are empty."""
    groups: dict[str, dict[str, Tensor]] = {name: {} for name in names}
    for name, tensor in tensors.items():
        group, _, rest = name.partition(".")
        groups[group][rest] = tensor
    return groups

"""Saving and loading: the same bits come back, or a clear error; a kill leaves the old directory or the new one."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import gnswap
from gnswap import _directory, _store
from gnswap._saved import ModelSource
from tests._models import ZOO, build, randomise_norms, same_state, small_cnn


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "saved"


@pytest.fixture
def net() -> nn.Module:
    return randomise_norms(small_cnn()).eval()


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        result = model(x)
    assert isinstance(result, Tensor)
    return result


def edit_json(path: Path, change: Any) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- what comes back -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ZOO)
def test_same_bits_and_revert_after_loading(name: str, folder: Path) -> None:
    """Pitfall 17: fresh build, apply, strict load, bit-equal outputs; and the original can still be had."""
    model, x = build(name)
    conversion = gnswap.convert(model)
    gnswap.save(conversion, folder)
    loaded = gnswap.load(folder, model)
    assert torch.equal(outputs(loaded, x), outputs(conversion.model, x))
    assert same_state(loaded, conversion.model)
    reverted = gnswap.revert(loaded)
    assert same_state(reverted, model)
    assert torch.equal(outputs(reverted, x), outputs(model, x))


def test_the_given_model_is_left_untouched(net: nn.Module, folder: Path) -> None:
    gnswap.save(gnswap.convert(net), folder)
    other = randomise_norms(small_cnn(), seed=7)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    gnswap.load(folder, other)
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())


def test_two_files_and_neither_is_a_pickle(net: nn.Module, folder: Path) -> None:
    gnswap.save(gnswap.convert(net), folder)
    assert entries(folder) == ["model.safetensors", "plan.json"]
    for path in folder.iterdir():
        with pytest.raises((pickle.UnpicklingError, ValueError, KeyError, EOFError)):
            pickle.loads(path.read_bytes())
        assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_the_weights_are_an_ordinary_safetensors_file(net: nn.Module, folder: Path) -> None:
    conversion = gnswap.convert(net)
    gnswap.save(conversion, folder)
    tensors = load_file(folder / "model.safetensors")
    own = {name for name in tensors if not name.startswith("gnswap:")}
    assert own == set(conversion.model.state_dict())
    assert "gnswap:origin:1.num_batches_tracked" in tensors


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_are_kept(dtype: torch.dtype, net: nn.Module, folder: Path) -> None:
    converted = gnswap.convert(net).model.to(dtype)
    gnswap.save(converted, folder)
    loaded = gnswap.load(folder, net)
    x = torch.randn(2, 3, 8, 8, dtype=dtype)
    assert same_state(loaded, converted)
    assert torch.equal(outputs(loaded, x), outputs(converted, x))


def test_memory_layout_is_kept(net: nn.Module, folder: Path) -> None:
    """Another layout of a convolution's weight may choose another algorithm, and give other bits."""
    converted = gnswap.convert(net).model.to(memory_format=torch.channels_last)
    gnswap.save(converted, folder)
    loaded = gnswap.load(folder, net)
    strides = [parameter.stride() for parameter in converted.parameters()]
    assert [parameter.stride() for parameter in loaded.parameters()] == strides
    assert any(not parameter.is_contiguous() for parameter in loaded.parameters())


def test_softness_annealed_after_the_swap(net: nn.Module, folder: Path) -> None:
    converted = gnswap.convert(net, softness=1.0).model
    for module in converted.modules():
        if isinstance(module, gnswap.FusedGroupNorm):
            module.softness = 0.125
    gnswap.save(converted, folder)
    loaded = gnswap.load(folder, net)
    x = torch.randn(2, 3, 8, 8)
    assert [m.softness for m in loaded.modules() if isinstance(m, gnswap.FusedGroupNorm)] == [0.125, 0.125]
    assert torch.equal(outputs(loaded, x), outputs(converted, x))


def test_modes_and_frozen_parameters_are_kept(net: nn.Module, folder: Path) -> None:
    converted = gnswap.convert(net).model.train()
    converted[1].eval()
    converted[0].requires_grad_(False)
    gnswap.save(converted, folder)
    loaded = gnswap.load(folder, net)
    assert [m.training for m in loaded.modules()] == [m.training for m in converted.modules()]
    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in converted.parameters()]


def test_momentum_and_counters_come_back_with_revert(folder: Path) -> None:
    model = randomise_norms(small_cnn(momentum=0.037)).train()
    model(torch.randn(4, 3, 8, 8))
    gnswap.save(gnswap.convert(model), folder)
    reverted = gnswap.revert(gnswap.load(folder, small_cnn()))
    assert reverted[1].momentum == 0.037
    assert int(reverted[1].num_batches_tracked) == 1
    assert same_state(reverted, model)


def test_a_model_trained_before_saving_is_not_reverted_silently(net: nn.Module, folder: Path) -> None:
    converted = gnswap.convert(net).model
    with torch.no_grad():
        converted[0].weight.add_(0.01)
    gnswap.save(converted, folder)
    with pytest.raises(gnswap.RevertError, match=r"changed since its conversion.*0\.weight"):
        gnswap.revert(gnswap.load(folder, net))


def test_saved_again_after_loading(net: nn.Module, folder: Path, tmp_path: Path) -> None:
    gnswap.save(gnswap.convert(net), folder)
    gnswap.save(gnswap.load(folder, net), tmp_path / "again")
    assert (folder / "model.safetensors").read_bytes() == (tmp_path / "again" / "model.safetensors").read_bytes()
    assert (folder / "plan.json").read_bytes() == (tmp_path / "again" / "plan.json").read_bytes()


class Tied(nn.Module):
    """A classifier whose weight is the embedding's, and a buffer that no state_dict holds."""

    def __init__(self, tie: bool = True) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8, bias=False)
        self.norm = nn.BatchNorm1d(8)
        self.last = nn.Linear(8, 8, bias=False)
        if tie:
            self.last.weight = self.first.weight
        self.register_buffer("scale", torch.full((8,), 0.5), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x))) * self.scale


def test_ties_are_stored_once_and_restored(folder: Path) -> None:
    model = randomise_norms(Tied()).eval()
    gnswap.save(gnswap.convert(model), folder)
    assert "last.weight" not in load_file(folder / "model.safetensors")
    loaded = gnswap.load(folder, Tied())
    assert loaded.last.weight is loaded.first.weight


def test_ties_made_or_cut_after_the_swap(folder: Path) -> None:
    x = torch.randn(3, 8)
    for build_tied, save_tied in ((False, True), (True, False)):
        converted = gnswap.convert(randomise_norms(Tied(tie=build_tied)).eval()).model
        source = converted.first.weight if save_tied else converted.first.weight.detach().flip(0)
        converted.last.weight = source if save_tied else nn.Parameter(source)
        gnswap.save(converted, folder)
        loaded = gnswap.load(folder, Tied(tie=build_tied))
        assert (loaded.last.weight is loaded.first.weight) is save_tied
        assert torch.equal(outputs(loaded, x), outputs(converted, x))


def test_hidden_buffers_are_kept(folder: Path) -> None:
    model = randomise_norms(Tied()).eval()
    model.scale.fill_(0.25)
    gnswap.save(gnswap.convert(model), folder)
    assert gnswap.load(folder, Tied()).scale.unique().tolist() == [0.25]


def test_views_into_one_buffer_are_saved_each_on_its_own(net: nn.Module, folder: Path) -> None:
    """safetensors refuses shared memory; flattened parameters (RNNs, flat optimizers) share it without being tied."""
    converted = gnswap.convert(net).model
    flat = torch.randn(24 * 2)
    converted[4].weight.data, converted[4].bias.data = flat[:24], flat[24:]
    gnswap.save(converted, folder)
    assert same_state(gnswap.load(folder, net), converted)


def test_a_model_on_the_meta_device_will_do(net: nn.Module, folder: Path) -> None:
    conversion = gnswap.convert(net)
    gnswap.save(conversion, folder)
    with torch.device("meta"):
        empty = small_cnn()
    loaded = gnswap.load(folder, empty)
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(outputs(loaded, x), outputs(conversion.model, x))
    assert same_state(gnswap.revert(loaded), net)


# --- timm: the architecture is known ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        return randomise_norms(timm.create_model("resnet10t", num_classes=7, in_chans=1)).eval()


def test_timm_models_need_no_model(resnet: nn.Module, folder: Path) -> None:
    conversion = gnswap.convert(resnet)
    gnswap.save(conversion, folder)
    state = torch.random.get_rng_state()
    loaded = gnswap.load(folder)
    assert torch.equal(torch.random.get_rng_state(), state)
    x = torch.randn(2, 1, 64, 64)
    assert torch.equal(outputs(loaded, x), outputs(conversion.model, x))
    assert same_state(gnswap.revert(loaded), resnet)
    source = _store.saved_source(folder)
    assert source == ModelSource("timm", "resnet10t.c3_in1k", {"num_classes": 7, "in_chans": 1})


def test_a_new_classifier_after_the_swap(resnet: nn.Module, folder: Path) -> None:
    """The usual way to fine-tune: the network that is saved is no longer the one that was planned for."""
    converted = gnswap.convert(resnet).model
    converted.reset_classifier(3)
    gnswap.save(converted, folder)
    loaded = gnswap.load(folder)
    x = torch.randn(2, 1, 64, 64)
    assert torch.equal(outputs(loaded, x), outputs(converted, x))
    with pytest.raises(gnswap.PlanMismatchError, match="of another architecture"):
        gnswap.load(folder, resnet)


def test_another_pooling_is_found_out(folder: Path) -> None:
    """Max pooling has the same parameters as average pooling: a fingerprint of tensors alone would not see it."""
    model = randomise_norms(timm.create_model("resnet10t", global_pool="max")).eval()
    conversion = gnswap.convert(model)
    gnswap.save(conversion, folder)
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(outputs(gnswap.load(folder), x), outputs(conversion.model, x))


def test_a_timm_model_that_was_changed_is_not_rebuilt_by_name(folder: Path) -> None:
    model = timm.create_model("resnet10t")
    model.layer1[0].act2 = nn.SiLU()
    gnswap.save(gnswap.convert(model), folder)
    with pytest.raises(gnswap.StoreError, match=r"architecture is not known.*layer1\.0\.act2.*ReLU.*SiLU"):
        gnswap.load(folder)
    assert isinstance(gnswap.load(folder, model).layer1[0].act2, nn.SiLU)


def test_a_source_that_is_not_true_is_refused(resnet: nn.Module, folder: Path) -> None:
    with pytest.raises(gnswap.StoreError, match="does not build this network"):
        gnswap.save(gnswap.convert(resnet), folder, source=ModelSource("timm", "resnet14t"))
    assert not folder.exists()


def test_a_factory_in_a_file_is_never_called(net: nn.Module, folder: Path) -> None:
    gnswap.save(gnswap.convert(net), folder, source=ModelSource("factory", "os:abort"))
    with pytest.raises(gnswap.StoreError, match="os:abort, which is not called from a file"):
        gnswap.load(folder)


@pytest.mark.parametrize(
    "source",
    [
        {"kind": "timm", "name": "hf-hub:someone/something", "options": {}},
        {"kind": "timm", "name": "resnet10t", "options": {"checkpoint_path": "/etc/passwd"}},
        {"kind": "timm", "name": "no_such_net", "options": {}},
    ],
)
def test_a_file_cannot_make_timm_fetch_or_read(source: dict[str, Any], resnet: nn.Module, folder: Path) -> None:
    gnswap.save(gnswap.convert(resnet), folder)
    edit_json(folder / "plan.json", lambda data: data.update(source=source))
    with pytest.raises(gnswap.StoreError, match="cannot be built from its name"):
        gnswap.load(folder)


def test_without_a_model_other_networks_say_what_to_do(net: nn.Module, folder: Path) -> None:
    gnswap.save(gnswap.convert(net), folder)
    with pytest.raises(gnswap.StoreError, match=r"not known.*gnswap\.load\(directory, model\)"):
        gnswap.load(folder)


# --- what is refused when loading ------------------------------------------------------------------------------


@pytest.fixture
def saved(net: nn.Module, folder: Path) -> Path:
    gnswap.save(gnswap.convert(net), folder)
    return folder


def test_nothing_there(tmp_path: Path, net: nn.Module) -> None:
    with pytest.raises(gnswap.StoreError, match="expected the directory nowhere, found nothing"):
        gnswap.load(tmp_path / "nowhere", net)


def test_a_file_in_place_of_a_directory(tmp_path: Path, net: nn.Module) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(gnswap.StoreError, match="found a file"):
        gnswap.load(tmp_path / "file", net)


@pytest.mark.parametrize("name", ["plan.json", "model.safetensors"])
def test_a_missing_file(name: str, saved: Path, net: nn.Module) -> None:
    (saved / name).unlink()
    with pytest.raises(gnswap.StoreError, match=f"found no {name}"):
        gnswap.load(saved, net)


@pytest.mark.parametrize("keep", [0, 7, 100, 5000])
def test_cut_off_weights(keep: int, saved: Path, net: nn.Module) -> None:
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(gnswap.StoreError, match=r"weights cannot be read.*cut off"):
        gnswap.load(saved, net)


@pytest.mark.parametrize("keep", [0, 10, 1000])
def test_a_cut_off_plan(keep: int, saved: Path, net: nn.Module) -> None:
    path = saved / "plan.json"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(gnswap.StoreError, match=r"plan cannot be read.*cut off"):
        gnswap.load(saved, net)


def test_a_file_of_another_kind(saved: Path, net: nn.Module) -> None:
    torch.save(net.state_dict(), saved / "model.safetensors")
    with pytest.raises(gnswap.StoreError, match="weights cannot be read"):
        gnswap.load(saved, net)


@pytest.mark.parametrize("version", [0, 2, None, "1"])
def test_unknown_schema_versions(version: object, saved: Path, net: nn.Module) -> None:
    edit_json(saved / "plan.json", lambda data: data.update(schema_version=version))
    with pytest.raises(gnswap.StoreError, match=r"unknown schema version.*expected schema_version 1"):
        gnswap.load(saved, net)


def test_an_unknown_plan_schema_version(saved: Path, net: nn.Module) -> None:
    edit_json(saved / "plan.json", lambda data: data["plan"].update(schema_version=99))
    with pytest.raises(gnswap.StoreError, match=r"unknown schema version.*99"):
        gnswap.load(saved, net)


@pytest.mark.parametrize("content", ["[]", "{}", "null", '"x"', '{"schema_version": 1, "weights_sha256": ""}'])
def test_json_that_is_no_plan(content: str, saved: Path, net: nn.Module) -> None:
    (saved / "plan.json").write_text(content)
    with pytest.raises(gnswap.StoreError, match=r"unknown schema version|missing key"):
        gnswap.load(saved, net)


def test_another_architecture(saved: Path) -> None:
    with pytest.raises(gnswap.PlanMismatchError, match="of another architecture"):
        gnswap.load(saved, nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16)))


def test_an_already_converted_network(saved: Path, net: nn.Module) -> None:
    with pytest.raises(gnswap.PlanMismatchError, match="with its BatchNorms"):
        gnswap.load(saved, gnswap.convert(net).model)


def test_halves_of_two_conversions(saved: Path, net: nn.Module, tmp_path: Path) -> None:
    gnswap.save(gnswap.convert(net, softness=0.5), tmp_path / "other")
    shutil.copy(tmp_path / "other" / "model.safetensors", saved)
    with pytest.raises(gnswap.StoreError, match="do not belong together"):
        gnswap.load(saved, net)


def test_one_flipped_bit(saved: Path, net: nn.Module) -> None:
    path = saved / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(gnswap.StoreError, match="do not belong together"):
        gnswap.load(saved, net)


def test_an_edited_plan(saved: Path, net: nn.Module) -> None:
    edit_json(saved / "plan.json", lambda data: data["plan"]["decisions"][0].update(softness=0.3))
    with pytest.raises(gnswap.StoreError, match="plan was changed after it was saved"):
        gnswap.load(saved, net)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.update({"0.weight": torch.zeros(16, 3, 5, 5)}), r"0\.weight is \(16, 3, 5, 5\)"),
        (lambda tensors: tensors.pop("8.bias"), r"8\.bias is missing"),
        (lambda tensors: tensors.update(extra=torch.zeros(1)), "extra is not in the model"),
        (lambda tensors: tensors.pop("gnswap:origin:1.running_var"), "saved statistics do not fit"),
        (lambda tensors: tensors.pop("1.channel_gain"), r"1\.channel_gain is missing"),
    ],
)
def test_tampered_tensors(change: Any, message: str, saved: Path, net: nn.Module) -> None:
    """Even where somebody recomputed the checksum."""
    path = saved / "model.safetensors"
    tensors, metadata = _store._weights.read(path)
    change(tensors)
    save_file(tensors, path, metadata)
    edit_json(saved / "plan.json", lambda data: data.update(weights_sha256=_store._file_checksum(path)))
    with pytest.raises(gnswap.StoreError, match=message):
        gnswap.load(saved, net)


# --- what is refused when saving -------------------------------------------------------------------------------


def test_a_model_that_was_not_converted(net: nn.Module, folder: Path) -> None:
    with pytest.raises(gnswap.StoreError, match="not converted by gnswap"):
        gnswap.save(net, folder)
    assert not folder.exists()


def test_a_wrapped_model(net: nn.Module, folder: Path) -> None:
    with pytest.raises(gnswap.WrappedModelError, match="DataParallel"):
        gnswap.save(nn.DataParallel(gnswap.convert(net).model), folder)


def test_a_converted_layer_that_is_gone(net: nn.Module, folder: Path) -> None:
    converted = gnswap.convert(net).model
    converted[1] = nn.Identity()
    with pytest.raises(gnswap.StoreError, match=r"all its converted layers.*at 1\b"):
        gnswap.save(converted, folder)


class Counting(nn.Identity):
    """Keeps state that is no tensor."""

    def get_extra_state(self) -> dict[str, int]:
        return {"seen": 3}

    def set_extra_state(self, state: dict[str, int]) -> None:
        pass


def test_state_that_is_no_tensor(folder: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), Counting())
    with pytest.raises(gnswap.StoreError, match=r"state that is no tensor.*at 2.*Counting"):
        gnswap.save(gnswap.convert(model), folder)


def test_tensors_without_data(folder: Path) -> None:
    with torch.device("meta"):
        model = small_cnn()
    with pytest.raises(gnswap.StoreError, match=r"0\.weight.*no data"):
        gnswap.save(gnswap.convert(model), folder)


def test_a_dtype_that_safetensors_does_not_have(net: nn.Module, folder: Path) -> None:
    converted = gnswap.convert(net).model
    converted.register_buffer("odd", torch.zeros(2, dtype=torch.complex128))
    with pytest.raises(gnswap.StoreError, match="safetensors cannot hold"):
        gnswap.save(converted, folder)
    assert entries(folder.parent) == []


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"notes.txt": "mine"}, "also holds notes.txt"),
        ({"plan.json": "{}"}, "plan.json was not written by gnswap"),
        ({"model.safetensors": ""}, "plan.json was not written by gnswap"),
    ],
)
def test_directories_of_others_are_not_overwritten(
    files: dict[str, str], message: str, net: nn.Module, folder: Path
) -> None:
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_text(content)
    with pytest.raises(gnswap.StoreError, match=f"refusing to overwrite.*{message}"):
        gnswap.save(gnswap.convert(net), folder)
    assert {path.name: path.read_text() for path in folder.iterdir()} == files


def test_a_saved_directory_with_something_of_the_users_in_it(saved: Path, net: nn.Module) -> None:
    (saved / "model.onnx").write_text("precious")
    with pytest.raises(gnswap.StoreError, match=r"also holds model\.onnx"):
        gnswap.save(gnswap.convert(net), saved)
    assert (saved / "model.onnx").read_text() == "precious"


def test_a_file_is_not_overwritten(net: nn.Module, folder: Path) -> None:
    folder.write_text("mine")
    with pytest.raises(gnswap.StoreError, match="it is a file"):
        gnswap.save(gnswap.convert(net), folder)


def test_empty_directories_missing_parents_and_links_are_fine(net: nn.Module, tmp_path: Path) -> None:
    conversion = gnswap.convert(net)
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    gnswap.save(conversion, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    gnswap.save(conversion, tmp_path / "a" / "b [c]")
    gnswap.save(conversion, tmp_path / "a" / "b [c]")
    assert entries(tmp_path) == ["a", "empty", "link"]
    gnswap.load(tmp_path / "link", net)
    gnswap.load(tmp_path / "a" / "b [c]", net)


# --- all or nothing --------------------------------------------------------------------------------------------


@pytest.fixture
def versions(net: nn.Module) -> tuple[gnswap.Conversion, gnswap.Conversion]:
    return gnswap.convert(net, softness=0.25), gnswap.convert(net, softness=0.75)


def softness_in(folder: Path, net: nn.Module) -> float:
    return float(gnswap.load(folder, net)[1].softness)


def test_an_existing_conversion_is_replaced(versions: Any, net: nn.Module, folder: Path) -> None:
    for conversion, softness in zip(versions, (0.25, 0.75), strict=True):
        gnswap.save(conversion, folder)
        assert softness_in(folder, net) == softness
    assert entries(folder.parent) == ["saved"]


@pytest.mark.parametrize("failing", [1, 2])
@pytest.mark.parametrize("error", [OSError("disk on fire"), KeyboardInterrupt()])
def test_a_rename_that_fails(
    failing: int, error: BaseException, versions: Any, net: nn.Module, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gnswap.save(versions[0], folder)
    calls = 0
    replace = os.replace

    def broken(source: Path, target: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == failing:
            raise error
        replace(source, target)

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises((gnswap.StoreError, KeyboardInterrupt)):
        gnswap.save(versions[1], folder)
    monkeypatch.undo()
    assert calls >= failing
    assert softness_in(folder, net) == 0.25
    assert entries(folder.parent) == ["saved"]


@pytest.mark.parametrize("step", ["_weights.write", "_flush", "Saved"])
def test_an_error_while_writing(
    step: str, versions: Any, net: nn.Module, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gnswap.save(versions[0], folder)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    owner: Any = _directory if step == "_flush" else _store
    for part in step.split(".")[:-1]:
        owner = getattr(owner, part)
    monkeypatch.setattr(owner, step.split(".")[-1], full)
    with pytest.raises(gnswap.StoreError, match=r"cannot be written.*No space left.*unchanged"):
        gnswap.save(versions[1], folder)
    monkeypatch.undo()
    assert softness_in(folder, net) == 0.25
    assert entries(folder.parent) == ["saved"]


def test_killed_between_the_two_renames(versions: Any, net: nn.Module, folder: Path) -> None:
    """The old content stands under its backup name: readers find it, and the next writer puts it back."""
    gnswap.save(versions[0], folder)
    folder.rename(folder.with_name(".saved.gnswap-old"))
    assert softness_in(folder, net) == 0.25
    gnswap.save(versions[1], folder)
    assert softness_in(folder, net) == 0.75
    assert entries(folder.parent) == ["saved"]


def test_killed_before_the_backup_was_removed(versions: Any, net: nn.Module, folder: Path) -> None:
    gnswap.save(versions[1], folder)
    shutil.copytree(folder, folder.with_name(".saved.gnswap-old"))
    assert softness_in(folder, net) == 0.75
    gnswap.save(versions[0], folder)
    assert entries(folder.parent) == ["saved"]


def test_what_a_killed_writer_left_is_cleared_away(versions: Any, folder: Path) -> None:
    old, recent = (folder.parent / f".saved.gnswap-new-{name}" for name in ("dead", "live"))
    for leftover in (old, recent):
        leftover.mkdir(parents=True)
    os.utime(old, (time.time() - 7200,) * 2)
    gnswap.save(versions[0], folder)
    assert entries(folder.parent) == [recent.name, "saved"]


KILLED = """
import os, signal, sys
sys.path.insert(0, {root!r})
import gnswap
from gnswap import _directory
from tests._models import randomise_norms, small_cnn

steps, replace, fsync = 0, os.replace, os.fsync
def dying(function):
    def call(*args):
        global steps
        steps += 1
        if steps == {step}:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args)
    return call
os.replace, os.fsync = dying(replace), dying(fsync)
gnswap.save(gnswap.convert(randomise_norms(small_cnn()).eval(), softness=0.75), {folder!r})
print("survived", steps)
"""


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
@pytest.mark.parametrize("step", [5, 6])
def test_killed_by_the_system(step: int, versions: Any, net: nn.Module, folder: Path) -> None:
    """Steps: fsync of two files and the new directory, rename away (4), rename in (5), fsync of the parent (6)."""
    gnswap.save(versions[0], folder)
    root = str(Path(gnswap.__file__).parent.parent)
    script = KILLED.format(root=root, step=step, folder=str(folder))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=root)
    assert done.returncode == -signal.SIGKILL, done.stderr + done.stdout
    assert softness_in(folder, net) == (0.75 if step == 6 else 0.25)
    gnswap.save(versions[0], folder)
    assert softness_in(folder, net) == 0.25

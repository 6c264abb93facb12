"""Walking with every alias, replacing without phantoms, recognising a model again."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from _models import ZOO, AliasedNorms, NamedParents, SharedBlock, build, randomise_norms, small_cnn
from torch import nn

from gnswap._errors import ArgumentError, ModelError, WrappedModelError
from gnswap._records import Plan
from gnswap._sites import Applied, applied, digest, find_norms, fingerprint, get, replace, require_plain, walk


@pytest.mark.parametrize("name", ZOO)
def test_walk_is_named_modules_with_duplicates(name: str) -> None:
    model, _ = build(name)
    assert list(walk(model)) == list(model.named_modules(remove_duplicate=False))


def test_walk_stops_at_cycles() -> None:
    model = nn.Sequential(nn.BatchNorm2d(4))
    model.add_module("again", model)
    assert [path for path, _ in walk(model)] == ["", "0"]


def test_pitfall_9_a_phantom_of_an_earlier_tool_is_refused() -> None:
    model = nn.Sequential(nn.Sequential(nn.BatchNorm2d(4)))
    setattr(model, "0.0", nn.GroupNorm(2, 4))
    with pytest.raises(ModelError, match=r"a submodule's name holds a dot \(at \(root\)\): found '0\.0'"):
        list(walk(model))


def test_pitfall_7_a_norm_under_several_names_is_found_once_with_all() -> None:
    assert [paths for paths, _ in find_norms(AliasedNorms())] == [("bn1", "bn2", "extra.norm"), ("head.1",)]
    assert [paths for paths, _ in find_norms(SharedBlock())] == [("left.1", "right.1")]


def test_pitfall_7_all_names_get_the_same_new_module() -> None:
    model = AliasedNorms()
    (paths, _), _ = find_norms(model)
    new = nn.GroupNorm(4, 16)
    assert replace(model, paths, new) is model
    assert model.bn1 is model.bn2 is model.extra["norm"] is new


def test_pitfall_6_a_root_norm_is_replaced_by_being_returned() -> None:
    new = nn.GroupNorm(4, 16)
    assert find_norms(nn.BatchNorm2d(16))[0][0] == ("",)
    assert replace(nn.BatchNorm2d(16), [""], new) is new


@pytest.mark.parametrize("path", ["stem.norm", "by_name.norm", "listed.1"])
def test_pitfall_9_and_10_any_parent_and_no_phantom(path: str) -> None:
    model = NamedParents()
    names, parameters = [name for name, _ in walk(model)], len(list(model.parameters()))
    new = nn.GroupNorm(4, 8)
    replace(model, [path], new)
    assert get(model, path) is new
    assert [name for name, _ in walk(model)] == names, "names and order stay"
    assert len(list(model.parameters())) == parameters
    assert model(torch.randn(2, 3, 6, 6)).shape == (2, 8, 4, 4)


def test_replace_is_all_or_nothing() -> None:
    model = small_cnn()
    before = list(model.modules())
    with pytest.raises(ModelError, match=r"no module has this path \(at nowhere\.1\)"):
        replace(model, ["1", "nowhere.1"], nn.Identity())
    assert list(model.modules()) == before


def test_get() -> None:
    model = AliasedNorms()
    assert get(model, "") is model
    assert get(model, "head.1") is model.head[1]
    with pytest.raises(ModelError, match="without 'weight'"):
        get(model, "bn1.weight")


def compiled_in_place() -> nn.Module:
    model = small_cnn()
    model.compile()
    return model


def scripted() -> nn.Module:
    with pytest.warns((DeprecationWarning, FutureWarning), match="torch.jit"):
        return torch.jit.script(small_cnn())


def traced() -> nn.Module:
    with pytest.warns((DeprecationWarning, FutureWarning), match="torch.jit"):
        return torch.jit.trace(small_cnn().eval(), torch.randn(1, 3, 4, 4))


@pytest.mark.parametrize(
    ("wrap", "match"),
    [
        (lambda: nn.DataParallel(small_cnn()), r"wrapped by DataParallel \(at .*\)\. Convert its `\.module`\."),
        (
            lambda: torch.compile(small_cnn()),
            r"wrapped by torch\.compile \(at .*\)\. Convert its `\._orig_mod`",
        ),
        (compiled_in_place, r"Module\.compile\(\)"),
        (scripted, "wrapped by TorchScript"),
        (traced, "wrapped by TorchScript"),
    ],
    ids=["DataParallel", "compiled", "compiled in place", "scripted", "traced"],
)
def test_pitfall_12_wrapped_models_are_refused_with_advice(wrap: object, match: str) -> None:
    wrapped = wrap()  # type: ignore[operator]
    with pytest.raises(WrappedModelError, match=match):
        require_plain(wrapped)
    with pytest.raises(WrappedModelError, match=r"\(at 1\.inner\)"):
        require_plain(nn.Sequential(nn.ReLU(), nn.ModuleDict({"inner": wrapped})))


DISTRIBUTED = """
import os, sys, tempfile, torch
from torch import nn
import torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from gnswap._errors import WrappedModelError
from gnswap._sites import require_plain

store = os.path.join(tempfile.mkdtemp(), "store")
dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
net = lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8))
wrapped = {"DistributedDataParallel": DistributedDataParallel(net())}
sharded = net()
fully_shard(sharded[1], mesh=dist.device_mesh.init_device_mesh("cpu", (1,)))
wrapped["fully_shard"] = sharded
fsdp1 = FullyShardedDataParallel.__new__(FullyShardedDataParallel)  # its own __init__ wants an accelerator
nn.Module.__init__(fsdp1)
wrapped["FullyShardedDataParallel"] = fsdp1
for name, model in wrapped.items():
    try:
        require_plain(model)
    except WrappedModelError as error:
        assert f"wrapped by {name}" in str(error), error
        print(name)
dist.destroy_process_group()
"""


def test_pitfall_12_distributed_wrappers_are_refused() -> None:
    """In a process of its own: a process group is global."""
    out = subprocess.run(
        [sys.executable, "-c", DISTRIBUTED], capture_output=True, text=True, cwd=Path(__file__).parent.parent
    )
    assert out.returncode == 0, out.stderr
    assert out.stdout.split() == ["DistributedDataParallel", "fully_shard", "FullyShardedDataParallel"]


def test_what_is_no_model() -> None:
    with pytest.raises(
        ArgumentError, match=r"not a model \(at model\): expected a torch\.nn\.Module, found builtins\.str"
    ):
        require_plain("resnet50")  # type: ignore[arg-type]
    require_plain(small_cnn())


def test_fingerprint_knows_an_architecture_not_its_values() -> None:
    model = small_cnn()
    same = [randomise_norms(small_cnn(), 7), small_cnn().double(), small_cnn().to("meta"), copy.deepcopy(model).eval()]
    assert {fingerprint(other) for other in same} == {fingerprint(model)}


@pytest.mark.parametrize(
    "other",
    [
        small_cnn(affine=False),
        small_cnn(track_running_stats=False),
        nn.Sequential(*small_cnn(), nn.Linear(5, 5)),
        nn.SyncBatchNorm.convert_sync_batchnorm(small_cnn()),
    ],
    ids=["affine", "statistics", "another layer", "type of norm"],
)
def test_fingerprint_sees_a_difference(other: nn.Module) -> None:
    assert fingerprint(other) != fingerprint(small_cnn())


def test_fingerprint_sees_aliases() -> None:
    def net(shared: bool) -> nn.Module:
        norm = nn.BatchNorm2d(4)
        return nn.Sequential(norm, norm if shared else nn.BatchNorm2d(4))

    assert fingerprint(net(True)) != fingerprint(net(False))


def test_fingerprint_of_lazy_modules_and_caches() -> None:
    assert fingerprint(nn.LazyBatchNorm2d()) != fingerprint(nn.BatchNorm2d(4))
    with_cache = small_cnn()
    with_cache.register_buffer("cache", torch.zeros(3), persistent=False)
    assert fingerprint(with_cache) == fingerprint(small_cnn())


def test_digest_sees_every_kind_of_change() -> None:
    model = randomise_norms(small_cnn())
    before = digest(model)
    assert set(before) == set(model.state_dict())
    assert digest(copy.deepcopy(model)) == before
    for name in ("0.weight", "1.running_mean", "1.num_batches_tracked"):
        changed = copy.deepcopy(model)
        changed.state_dict()[name].add_(1)
        after = digest(changed)
        assert {key for key in before if before[key] != after[key]} == {name}


def holding(value: torch.Tensor) -> nn.Module:
    module = nn.Module()
    module.register_buffer("value", value)
    return module


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(3, 4).T,
        torch.tensor(3.5),
        torch.randn(4).bfloat16(),
        torch.tensor([True, False]),
        torch.randn(3, dtype=torch.complex64).conj(),
        torch.eye(3).to_sparse(),
    ],
    ids=["transposed", "0-dim", "bf16", "bool", "conjugated", "sparse"],
)
def test_digest_takes_any_tensor(tensor: torch.Tensor) -> None:
    assert digest(holding(tensor)) == digest(holding(tensor.clone()))
    assert digest(holding(tensor)) != digest(holding(torch.zeros_like(tensor)))


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")  # deprecated, but such models are still about
def test_digest_takes_quantised_tensors() -> None:
    one, other = (torch.quantize_per_tensor(torch.full((4,), value), 0.1, 0, torch.qint8) for value in (1.0, 2.0))
    assert digest(holding(one)) == digest(holding(one.clone()))
    assert digest(holding(one)) != digest(holding(other))


def test_digest_of_tensors_without_data() -> None:
    assert set(digest(small_cnn().to("meta")).values()) == {"meta"}
    assert digest(nn.LazyBatchNorm1d())["weight"] == "lazy"
    assert digest(holding(torch.empty(0))) == {"value": "empty"}


def test_digest_names_a_shared_tensor_once() -> None:
    assert [name for name in digest(AliasedNorms()) if name.startswith(("bn2", "extra"))] == []


def test_the_record_of_a_conversion_survives_copies() -> None:
    model = small_cnn()
    assert applied(model) is None
    vars(model)["_gnswap"] = Applied(Plan(fingerprint(model), "small_cnn", ()), digest(model))
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert applied(copied) == applied(model) is not None


def test_a_whole_resnet_is_quick() -> None:
    """Not a benchmark: a guard against something quadratic."""
    with torch.device("meta"):
        model = timm.create_model("resnet50")
    assert len(find_norms(model)) == 53
    assert len(digest(model)) == len(model.state_dict())

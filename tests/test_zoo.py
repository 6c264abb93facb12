"""A fixed sample of timm's BatchNorm networks, converted and checked as `examples/benchmarks/zoo.py` does with all."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

BENCHMARKS = Path(__file__).parent.parent / "examples" / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # the scripts import one another by their bare names
import _zoo_cases  # noqa: E402
import _zoo_checks  # noqa: E402

sys.path.remove(str(BENCHMARKS))

# The smallest of each family, and more where the smallest has not the family's every block or stem.
SAMPLE = (
    "test_byobnet",
    "test_coatnet",
    "test_efficientnet",
    "test_maxvit",
    "test_resnet",
    "botnet26t_256",
    "cpubone_nano",
    "cs3darknet_focus_s",
    "cspnext_tiny",
    "densenet121",
    "dla46x_c",
    "efficientformerv2_s0",
    "efficientvim_m1",
    "efficientvit_b0",
    "efficientvit_m0",
    "ese_vovnet19b_slim_dw",
    "fasternet_t0",
    "fastvit_t8",
    "hardcorenas_a",
    "hgnetv2_b0",
    "hrnet_w18_small",
    "inception_next_atto",
    "lcnet_035",
    "lcnetv2_small",
    "legacy_seresnet18",
    "levit_128s",
    "lowformer_b0",
    "mobilenetv3_small_050",
    "mobilenetv4_conv_small_035",
    "mobilevit_xxs",
    "mobilevitv2_050",
    "regnetx_002",
    "regnety_002",
    "repghostnet_050",
    "repvgg_a0",
    "resnest14d",
    "resnetv2_18",
    "rexnetr_100",
    "shvit_s1",
    "skresnet18",
    "starnet_s050",
    "swiftformer_xs",
    "tf_efficientnet_lite0",
    "tiny_vit_5m_224",
    "visformer_tiny",
    "xcit_nano_12_p16_224",
)
TOO_SLOW = {
    "convmixer",
    "dpn",
    "efficientformer",
    "ghostnet",  # its modules are in repghost, too
    "iformer",
    "inception_resnet_v2",
    "inception_v3",
    "inception_v4",
    "nasnet",
    "nextvit",
    "pnasnet",
    "repvit",  # its blocks fuse as those of efficientvit_msra
    "res2net",
    "selecsls",
    "tresnet",
    "vgg",
    "vision_transformer_hybrid",
    "volo",
    "xception",
    "xception_aligned",
}
"""Families of which the smallest takes too long here; the sweep has them."""


@functools.cache
def photos() -> Tensor:
    return _zoo_cases.photos()


def census() -> list[dict[str, Any]]:
    rows = map(json.loads, (BENCHMARKS / "results" / "zoo_counts.rows.jsonl").read_text().splitlines())
    return [row for row in rows if row["types"]]


@pytest.mark.parametrize("name", SAMPLE)
def test_architecture(name: str) -> None:
    row = _zoo_checks.examine(name, photos(), sizes=(64, *_zoo_cases.SIZES))
    assert not row["failed"], "\n".join(row["failed"].values())
    assert {*row["passed"], *row["does_not_apply"]} == set(_zoo_checks.CHECKS)
    assert {"features_only", "reset_classifier", "forward_features"} <= {*row["passed"]}


def test_the_sample_covers_families_and_types() -> None:
    known = {row["key"]: row for row in census()}
    families = {known[name]["family"] for name in SAMPLE}
    assert len(SAMPLE) >= 40
    assert families | TOO_SLOW == {row["family"] for row in known.values()}
    assert not families & TOO_SLOW
    types = {kind for name in SAMPLE for kind in known[name]["types"]}
    assert types == {kind for row in known.values() for kind in row["types"]}


def test_the_census_is_of_this_timm() -> None:
    """A later release has further architectures: run zoo_counts.py and zoo.py again."""
    known = {row["key"] for row in census()}
    assert {"resnet50", "mobilenetv3_small_100", *SAMPLE} <= known <= set(timm.list_models())


def test_on_the_meta_device() -> None:
    row = _zoo_checks.examine("test_resnet", None)
    assert not row["failed"]
    assert set(row["passed"]) == _zoo_checks.WITHOUT_VALUES
    assert row["layers"] == {"BatchNorm2d": 15}


def test_what_cannot_be_built_is_a_row() -> None:
    row = _zoo_checks.examine("no_such_network", photos())
    assert "Unknown model" in row["failed"]["convert"]
    assert not row["passed"]


def test_the_smallest_size_that_works() -> None:
    model = _zoo_cases.build("levit_128s")
    assert _zoo_cases.usable_size(model, photos(), (64, 96)) == (3, 224, 224)  # its positions are fixed
    model = _zoo_cases.build("test_resnet")
    assert _zoo_cases.usable_size(model, photos(), (64, 96)) == (3, 64, 64)


def test_statistics_are_those_of_the_network() -> None:
    """In eval mode the network computes on these photos what it would with statistics of the batch."""
    model = _zoo_cases.build("test_resnet")
    x = _zoo_cases.resized(photos(), 3, 64, 64)
    _zoo_cases.give_statistics(model, x)
    norms = [norm for _, norm in _zoo_cases.find_norms(model)]
    assert all(norm.momentum == 0.1 and not norm.training for norm in norms)
    assert all(norm.running_var.min() >= 0.99e-3 * norm.running_var.mean() for norm in norms)
    gammas = torch.cat([norm.weight.detach() for norm in norms])
    assert (gammas < -0.1).any()
    assert (gammas.abs() < 1e-2).any()
    found = _zoo_cases.run(model, x)
    expected = _zoo_cases.run(model.train(), x)
    assert _zoo_checks.relative_error(found, expected) < 0.1  # the batch's variance is biased, the running one not


def test_one_channel_photos() -> None:
    assert _zoo_cases.resized(photos(), 1, 32, 48).shape == (len(photos()), 1, 32, 48)

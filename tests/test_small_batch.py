"""The benchmark of tiny batches: its photos, its statistics, its rule for the learning rate, and that it goes on."""

from __future__ import annotations

import json
import math
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import gnswap
from tests._models import randomise_norms, small_cnn
from tests.test_benchmarks import script

PHOTOS = 96


def grey_cells(count: int = PHOTOS, side: int = 24) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Noise in which every third photo is brighter on the left: what `elpv_dataset.utils.load_dataset` returns."""
    generator = np.random.default_rng(0)
    photos = generator.integers(0, 128, (count, side, side))
    photos[::3, :, : side // 2] += 100
    return photos.astype(np.uint8), (np.arange(count) % 3 == 0) * 0.9, np.full(count, "mono")


def install_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    package, utils = types.ModuleType("elpv_dataset"), types.ModuleType("elpv_dataset.utils")
    utils.load_dataset = grey_cells  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "elpv_dataset", package)
    monkeypatch.setitem(sys.modules, "elpv_dataset.utils", utils)


@pytest.fixture
def elpv(monkeypatch: pytest.MonkeyPatch) -> Any:
    install_cells(monkeypatch)
    return script("_elpv", monkeypatch)


@pytest.fixture
def nets(monkeypatch: pytest.MonkeyPatch) -> Any:
    return script("_small_batch_nets", monkeypatch)


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> Any:
    return script("_small_batch_report", monkeypatch)


def test_photos_are_resized_once_and_then_read(elpv: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = elpv.load(16, tmp_path)
    assert cells.photos.shape == (PHOTOS, 16, 16)
    assert cells.photos.dtype == torch.uint8
    assert cells.labels.sum() == PHOTOS // 3
    monkeypatch.setitem(sys.modules, "elpv_dataset.utils", None)  # an import would fail now
    assert torch.equal(elpv.load(16, tmp_path).photos, cells.photos)
    assert [path.name for path in tmp_path.iterdir()] == ["elpv-16.npz"]


def test_the_split_is_fixed_fair_and_without_overlap(elpv: Any) -> None:
    labels = torch.from_numpy(grey_cells()[1] > 0.5).long()
    numbered = elpv.Cells(torch.arange(PHOTOS), labels)  # a photo is its number
    parts, again = elpv.split(numbered), elpv.split(numbered)
    assert sorted(torch.cat([part.photos for part in parts]).tolist()) == list(range(PHOTOS))
    assert [len(part) for part in parts] == [48, 12, 36]
    assert all(float(part.labels.double().mean()) == pytest.approx(1 / 3) for part in parts)
    assert all(torch.equal(one.photos, two.photos) for one, two in zip(parts, again, strict=True))


@pytest.mark.parametrize("batch", [1, 4, 7])
def test_every_batch_size_sees_the_same_photos(elpv: Any, tmp_path: Path, batch: int) -> None:
    cells = elpv.load(8, tmp_path)[:10]
    alone = list(elpv.batches(cells, 23, 1, seed=3))
    x, labels = (torch.cat(parts) for parts in zip(*elpv.batches(cells, 23, batch, seed=3), strict=True))
    assert torch.equal(x, torch.cat([one for one, _ in alone]))
    assert torch.equal(labels, torch.cat([one for _, one in alone]))
    assert not torch.equal(x, torch.cat([one for one, _ in elpv.batches(cells, 23, batch, seed=4)]))
    sums = x.double().sum(dim=(1, 2, 3))  # a turn does not change it
    assert torch.allclose(sums[:10].sort().values, sums[10:20].sort().values)  # an epoch takes every photo once


def test_other_light(elpv: Any) -> None:
    photos = torch.tensor([[[10, 30]]], dtype=torch.uint8)
    for shift, strength in elpv.NEUTRAL.items():
        assert torch.equal(elpv.shifted(photos, shift, strength), photos)
    changed = {key: elpv.shifted(photos, *key).flatten().tolist() for key in (("contrast", 2.0), ("exposure", 1.0))}
    assert changed == {("contrast", 2.0): [0, 40], ("exposure", 1.0): [20, 60]}
    assert elpv.shifted(photos, "brightness", -0.1).flatten().tolist() == [0, 4]  # black is cut, 30 - 25.5 rounds
    with pytest.raises(ValueError, match="no such change of a photo: 'hue'"):
        elpv.shifted(photos, "hue", 1.0)


def test_the_learning_rate_grows_with_the_root_of_the_batch(nets: Any) -> None:
    assert nets.learning_rate(1e-3, nets.REFERENCE_BATCH) == 1e-3
    assert [nets.learning_rate(1e-3, batch) for batch in (1, 16)] == [5e-4, 2e-3]


def test_scores_are_judged(nets: Any, report: Any) -> None:
    score = torch.tensor([2.0, -1.0, 0.5, -3.0, 1.0, -2.0, -1.0, -1.0, 3.0])
    labels = torch.tensor([1, 0, 0, 0, 1, 1, 0, 0, 1])
    row = nets.judged(score, labels)
    assert row["accuracy"] == pytest.approx(7 / 9)
    assert row["balanced_accuracy"] == pytest.approx((3 / 4 + 4 / 5) / 2)
    assert row["auc"] == pytest.approx(16 / 20)  # 16 of the 20 pairs are in order
    (found,) = report.hits([{"seed": 0, **row}]).values()
    assert found.tolist() == [1, 1, 0, 1, 1, 0, 1, 1, 1]


def trained(nets: Any, elpv: Any, net: nn.Module, **options: Any) -> list[float]:
    cells = elpv.Cells(*(torch.from_numpy(part) for part in (grey_cells(32, 8)[0], np.arange(32) % 3 == 0)))
    cells = elpv.Cells(cells.photos, cells.labels.long())
    settings = {"samples": 64, "batch": 4, "lr": 1e-2, "seed": 0, "anneal": False, **options}
    losses: list[float] = nets.fine_tune(net, cells, **settings)
    return losses


def test_fine_tuning_learns_and_takes_the_softness_to_zero(nets: Any, elpv: Any) -> None:
    net = gnswap.convert(randomise_norms(small_cnn()), groups=2, softness=1.0).model
    losses = trained(nets, elpv, net.train(), samples=240, anneal=True)
    assert len(losses) == 60
    assert np.mean(losses[-10:]) < np.mean(losses[:10])
    assert {layer.softness for layer in net.modules() if isinstance(layer, gnswap.FusedGroupNorm)} == {0.0}


def test_fine_tuning_stops_where_the_loss_is_not_finite(nets: Any, elpv: Any) -> None:
    net = small_cnn()
    with torch.no_grad():
        net[-1].weight.fill_(math.nan)
    assert len(trained(nets, elpv, net)) == 1
    assert nets.scores(net, torch.zeros(3, 8, 8, dtype=torch.uint8)).tolist() == [0.0, 0.0, 0.0]


def test_norms_have_no_weight_decay(nets: Any) -> None:
    decayed, free = nets.optimizer_of(small_cnn(), 0.1).param_groups
    assert decayed["weight_decay"] > 0
    assert free["weight_decay"] == 0
    assert {p.ndim for p in free["params"]} == {1}
    assert min(p.ndim for p in decayed["params"]) == 2


def test_intervals_cover_what_is_true(report: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of made experiments whose truth is 0.8, nearly all have it in their interval, and not one far off has."""
    monkeypatch.setattr(report, "RESAMPLES", 300)
    generator, covered = np.random.default_rng(1), 0
    for _ in range(60):
        mean, low, high = report.interval((generator.random((5, 200)) < 0.8).astype(float))
        assert low <= mean <= high
        assert not low <= 0.6 <= high
        covered += low <= 0.8 <= high
    assert covered >= 54


def test_intervals_see_both_the_seeds_and_the_photos(report: Any) -> None:
    same = np.tile(np.arange(100) < 80, (3, 1)).astype(float)  # every seed right on the same photos
    _, low, high = report.interval(same)
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt(0.8 * 0.2 / 100), rel=0.1)
    seeds = np.stack([np.full(100, value) for value in (0.7, 0.8, 0.9)])  # every photo alike, the seeds differ
    assert report.interval(seeds)[1:] == pytest.approx((0.7, 0.9), abs=0.03)
    assert report.interval(np.ones((2, 10))) == pytest.approx((1.0, 1.0, 1.0))


def test_differences_are_paired(report: Any) -> None:
    generator = np.random.default_rng(2)
    other = {seed: (generator.random(400) < 0.6).astype(float) for seed in range(3)}
    one = {seed: np.maximum(found, np.arange(400) < 40) for seed, found in other.items() if seed != 1}
    mean, low, high = report.difference(one, other)
    assert 0 < low < mean < high
    unpaired = report.interval(np.stack(list(other.values())))
    assert high - low < 0.7 * (unpaired[2] - unpaired[1])


class Command:
    """The script, run on made photos in a folder of its own; counts the runs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.patch, self.folder, self.results = monkeypatch, folder, folder / "results"
        self.script = script("small_batch", monkeypatch)
        nets, report = script("_small_batch_nets", monkeypatch), script("_small_batch_report", monkeypatch)
        for module in (script("_report", monkeypatch), self.script, report):
            monkeypatch.setattr(module, "RESULTS", self.results)
        monkeypatch.setattr(self.script, "code_version", lambda: "abc")
        monkeypatch.setattr(self.script, "SEARCHED", (1e-4, 1e-3))
        monkeypatch.setattr(nets, "UNLABELLED", 8)
        self.ran: list[tuple[str, int, int]] = []
        run = nets.Bench.run

        def counted(bench: Any, method: str, batch: int, seed: int, *rest: Any) -> Any:
            self.ran.append((method, batch, seed))
            return run(bench, method, batch, seed, *rest)

        monkeypatch.setattr(nets.Bench, "run", counted)

    def __call__(self, *arguments: str) -> list[tuple[str, int, int]]:
        given = ["small_batch.py", *arguments, "--smoke", "--cache", str(self.folder / "cache")]
        self.patch.setattr(sys, "argv", given)
        self.ran.clear()
        threads = torch.get_num_threads()
        try:
            self.script.main()
        finally:
            torch.set_num_threads(threads)
            self.patch.setattr(self.script, "_bench", None)
        return list(self.ran)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Command:
    install_cells(monkeypatch)
    return Command(monkeypatch, tmp_path)


def test_the_lowest_rate_that_is_not_worse(monkeypatch: pytest.MonkeyPatch) -> None:
    small_batch, setting = (
        script("small_batch", monkeypatch),
        script("_small_batch_nets", monkeypatch).Setting(8, 8, 8, 8),
    )
    assert small_batch.auc_error(0.893, 51, 58) == pytest.approx(0.032, abs=1e-3)  # of Hanley & McNeil's own example

    class Found:
        def __init__(self, *areas: float) -> None:
            keys = [small_batch.search_key(setting, "gnswap", base) for base in small_batch.SEARCHED]
            self.rows = {key: {"auc": auc, "photos": 328} for key, auc in zip(keys, areas, strict=True)}

    for areas, rate in (((0.863, 0.871, 0.58), 1e-4), ((0.77, 0.81, 0.83), 3e-4), ((0.5, 0.6, 0.7), 1e-3)):
        assert small_batch.best_rate(Found(*areas), setting, "gnswap", 103) == rate


def test_the_script_goes_on_and_says_what_it_found(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    some = ["--methods", "BatchNorm, frozen", "gnswap, annealed", "gnswap, healed first", "--batches", "2"]
    first = command(*some)
    assert [run for run in first if run[2] == 0] == [(name, 2, 0) for name in some[1:4]]
    assert [run[:2] for run in first if run[2]] == [("BatchNorm, frozen", 4), ("gnswap", 4)] * 2  # a search each
    rows = command.results / "small_batch.rows.jsonl"
    kept = [json.loads(line) for line in rows.read_text().splitlines()]
    assert all(row["light"].keys() == {"none", "contrast", "brightness", "exposure"} for row in kept[4:])
    rows.write_text("".join(json.dumps(row) + "\n" for row in kept[:-2]) + '{"key": "cut off')
    assert command(*some) == [("gnswap, annealed", 2, 0), ("gnswap, healed first", 2, 0)]
    again = [json.loads(line) for line in rows.read_text().splitlines()]
    for before, after in zip(kept, again, strict=True):  # the same run gives the same figures, to the last bit
        assert all(before[name] == after[name] for name in ("key", "lr", "losses", "hits", "auc"))
    said = (command.results / "small_batch.md").read_text()
    assert "seeds in a cell: 1, 3 of 8 cells measured" in said
    assert "Always the same answer has " in said
    assert "| search at batch 4: area under the curve, validation | rate 0.0001 | rate 0.001 |" in said
    assert "fresh GroupNorm |" not in said.partition("varies by")[2].partition("points above")[0]
    assert "| gnswap, annealed, batch 2 |" in said
    for name in ("small_batch.png", "small_batch_light.png"):
        assert (command.results / name).read_bytes().startswith(b"\x89PNG")
    assert command("report", *some) == []
    assert "area under the ROC curve" in capsys.readouterr().out


def test_steps_are_timed_and_weighed(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    speed = script("_small_batch_speed", monkeypatch)
    monkeypatch.setattr(speed, "TIMED", ("BatchNorm", "gnswap"))
    monkeypatch.setattr(speed, "ROUNDS", 3)
    assert command("speed", "--batches", "2") == []
    (row,) = map(json.loads, (command.results / "small_batch.rows.jsonl").read_text().splitlines())
    assert row["speed"]["BatchNorm"]["ratio"] == [1.0, 1.0, 1.0]
    assert row["speed"]["gnswap"]["peak_mb"] > 10
    assert "memory to its" in (command.results / "small_batch.md").read_text()


def test_methods_start_from_what_they_say(elpv: Any, nets: Any, tmp_path: Path) -> None:
    setting = nets.Setting(pixels=16, samples=4, judges=8, heal_steps=2)
    bench = nets.Bench(setting, elpv.split(elpv.load(16, tmp_path)), tmp_path, "abc")
    made = {method: bench.network(method, seed=5) for method in nets.METHODS if method != nets.HEALED}
    heads = [net.get_classifier().weight for net in made.values()]
    assert all(torch.equal(head, heads[0]) for head in heads)
    assert heads[0].shape[0] == 2
    for method, net in made.items():
        norms = [module for module in net.modules() if isinstance(module, (nn.BatchNorm2d, gnswap.FusedGroupNorm))]
        assert len(norms) == 49
        assert {type(norm).__name__.startswith("BatchNorm") for norm in norms} == {method.startswith("BatchNorm")}
        assert {norm.training for norm in norms} == {method != "BatchNorm, frozen"}
        assert all(norm.weight.requires_grad for norm in norms)
    first = {
        method: next(m for m in net.modules() if isinstance(m, gnswap.FusedGroupNorm))
        for method, net in made.items()
        if "BatchNorm" not in method
    }
    assert first["gnswap, pure"].softness == 0
    assert first["gnswap"].softness == first["gnswap, annealed"].softness > 0
    assert first["fresh GroupNorm"].weight.detach().unique().tolist() == [1.0]
    assert torch.equal(first["naive GroupNorm"].weight, first["gnswap"].weight)

"""The benchmarks' own parts: the reader of Qt resources, rows that survive a kill, one architecture of the zoo."""

from __future__ import annotations

import gzip
import importlib
import io
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests._models import randomise_norms, small_cnn

BENCHMARKS = Path(__file__).parent.parent / "examples" / "benchmarks"


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import a benchmark script the way its neighbours do."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module(name)


def qt_resource(files: dict[str, bytes], *, compress: bool, version: int = 3, flag: int = 0) -> bytes:
    """A resource file with one folder, `activities/erase/resource`, as Qt's rcc would lay it out."""
    folders = ["activities", "erase", "resource"]
    names, offsets = b"", []
    for name in [*folders, *files]:
        offsets.append(len(names))
        names += struct.pack(">HI", len(name), 0) + name.encode("utf-16-be")
    data, places = b"", []
    for content in files.values():
        stored = struct.pack(">I", len(content)) + zlib.compress(content) if compress else content
        places.append(len(data))
        data += struct.pack(">I", len(stored)) + stored
    time = b"" if version == 1 else bytes(8)
    tree = struct.pack(">IHII", 0, 2, 1, 1) + time
    for index in range(len(folders)):
        children = len(files) if index == len(folders) - 1 else 1
        tree += struct.pack(">IHII", offsets[index], 2, children, index + 2) + time
    for offset, place in zip(offsets[len(folders) :], places, strict=True):
        tree += struct.pack(">IHHHI", offset, flag or int(compress), 0, 0, place) + time
    start = 20 if version < 3 else 24
    header = struct.pack(">4sIIII", b"qres", version, start, start + len(tree), start + len(tree) + len(data))
    return header + bytes(start - 20) + tree + data + names


def webp(side: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (side, side), "green").save(stream, "webp")
    return stream.getvalue()


@pytest.mark.parametrize("version", [1, 3])
@pytest.mark.parametrize("compress", [False, True])
def test_qt_resources_are_read(monkeypatch: pytest.MonkeyPatch, version: int, compress: bool) -> None:
    files = {"a.webp": b"one", "Ünicode.txt": b"two" * 100}
    found = dict(script("photos", monkeypatch).read_rcc(qt_resource(files, compress=compress, version=version)))
    assert found == {f"activities/erase/resource/{name}": content for name, content in files.items()}


def test_other_resources_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    photos = script("photos", monkeypatch)
    with pytest.raises(ValueError, match="not a Qt resource file"):
        list(photos.read_rcc(b"GIF89a"))
    with pytest.raises(ValueError, match="compressed with zstd"):
        list(photos.read_rcc(qt_resource({"a": b"x"}, compress=False, flag=photos.ZSTD)))


def test_only_photos_are_unpacked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    files = {"cat.webp": webp(200), "icon.webp": webp(40), "sound.ogg": b"ogg"}
    (tmp_path / "erase.rcc").write_bytes(qt_resource(files, compress=False))
    (tmp_path / "chess.rcc").write_bytes(b"of another activity, never opened")
    assert script("photos", monkeypatch).unpack(tmp_path, tmp_path / "photos") == 1
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["erase-cat.webp"]


def test_rows_go_on_after_a_kill(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    report, path = script("_report", monkeypatch), tmp_path / "results" / "rows.jsonl"
    report.Rows(path, "abc").add("first", {"value": 1})
    with path.open("a") as file:
        file.write('{"key": "second", "code": "abc", "val')
    rows = report.Rows(path, "abc")
    assert "first" in rows
    assert "second" not in rows
    rows.add("second", {"value": 2})
    assert [json.loads(line)["value"] for line in path.read_text().splitlines()] == [1, 2]
    assert not report.Rows(path, "abc", fresh=True).rows


@pytest.mark.parametrize(("before", "now"), [("abc", "def"), ("abc", "abc+changes"), ("abc+changes", "abc+changes")])
def test_rows_of_other_code_are_measured_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, before: str, now: str
) -> None:
    """A table that went on after an update would mix what two versions did."""
    report, path = script("_report", monkeypatch), tmp_path / "rows.jsonl"
    report.Rows(path, before).add("first", {"value": 1})
    assert "first" not in report.Rows(path, now)


def test_code_version_is_a_commit_or_the_version(monkeypatch: pytest.MonkeyPatch) -> None:
    report = script("_report", monkeypatch)
    assert report.code_version()
    monkeypatch.setenv("PATH", "")
    assert report.code_version() == f"version {report.gnswap.__version__}"


def test_table_of_the_readme(monkeypatch: pytest.MonkeyPatch) -> None:
    table = script("_report", monkeypatch).markdown_table(["name", "share"], [["naive", "0.000"], ["gnswap", "–"]])
    assert table == "| name | share |\n| --- | --: |\n| naive | 0.000 |\n| gnswap | – |\n"


def test_one_architecture_of_the_zoo(monkeypatch: pytest.MonkeyPatch) -> None:
    zoo = script("zoo_counts", monkeypatch)
    rows = [{"key": name, **zoo.examine(name)[1]} for name in ("resnet18", "vit_tiny_patch16_224", "no_such_network")]
    counts = zoo.summary(rows)
    assert counts["architectures"] == 3
    assert counts["with a BatchNorm of any kind"] == counts["inspected and planned"] == 1
    assert counts["BatchNorm layers"] == counts["swapped"] == 20
    assert "build: RuntimeError" in counts["failed"]["no_such_network"]


@pytest.mark.parametrize("case", ["pure", "pure, refitted first"])
def test_healing_row(case: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    healing = script("healing", monkeypatch)
    monkeypatch.setitem(healing.CASES, case, {"groups": 4, "softness": 0})
    model = randomise_norms(small_cnn()).eval()
    with torch.no_grad():
        model[-1].weight.mul_(100)  # a network that is sure of something
    row = healing.measure(model, case, torch.randn(30, 3, 8, 8), tmp_path / "state", steps=2)
    assert (row["before"]["photos"], row["healing"]["photos"], row["healing"]["held_out"]) == (10, 15, 5)
    table = healing.as_table([{"model": "small", "case": case, "code": "abc", **row}])
    assert table.splitlines()[-1].startswith(f"| small | {case} | ")
    assert table.splitlines()[-1].count("|") == 13


def test_the_ablation_measures_every_cell_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ablation = script("fidelity", monkeypatch)
    cells = ablation.cells()
    assert len(set(map(str, cells))) == len(cells)
    plans = [cell for cell in cells if cell.baseline is None and "fidelity" not in dict(cell.options)]
    assert len(plans) == (1 + len(ablation.PHOTOS)) * len(ablation.GROUPINGS) * len(ablation.SOFTNESS)


def test_a_row_of_the_ablation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ablation = script("fidelity", monkeypatch)
    bench = ablation.Bench.__new__(ablation.Bench)
    bench.model = small_cnn().eval()
    randomise_norms(bench.model, 0)
    inputs = torch.randn(40, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    bench.judges, bench.others = list(inputs[:8].split(4)), inputs[8:]
    bench.answers = ablation.Recorded(bench.model, bench.judges)
    rows = []
    for cell in (ablation.Cell(32, (("groups", 2), ("softness", 0.5))), ablation.Cell(0, (("groups", 2),))):
        for levers, row in bench.rows(cell).items():
            rows.append({"model": "tf_efficientnet_lite0", "cell": str(cell), "levers": levers, "code": "abc", **row})
    assert [row["levers"] for row in rows] == ["order and signs", "all", "refitted", "all"]
    assert rows[0]["softness"] == 0.5
    assert 0 < rows[3]["fidelity"]["kl"] < 10
    assert ablation.as_table(rows).count("\n") == 6
    assert len(rows[2]["refit"]["layers"]) == 3
    assert ablation.by_depth(rows).splitlines()[2].count(" / ") == 3
    ablation.draw(rows, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 1000


def test_the_network_that_is_trained_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    clothes = script("_clothes", monkeypatch)
    folder = tmp_path / clothes.PACKAGE
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (130, 28, 28), np.uint8)
    for part in ("train", "t10k"):
        for name, head, content in (
            ("images-idx3", 16, pixels),
            ("labels-idx1", 8, np.arange(130, dtype=np.uint8) % 10),
        ):
            (folder / f"{part}-{name}-ubyte.gz").write_bytes(gzip.compress(bytes(head) + content.tobytes()))
    photos = clothes.inputs(tmp_path)
    assert torch.equal(photos[7, 0], torch.tensor(pixels[7]) / 127.5 - 1)
    x = clothes.enlarged(photos[:4])
    assert x.shape == (4, 1, 64, 64)
    trained = clothes.network(tmp_path)
    assert not trained.training
    gamma = trained.bn1.weight.detach()
    assert float(gamma.min()) < 0.5 < float(gamma.max()), "gammas start between 0 and 1"
    assert trained.bn1.num_batches_tracked == 3, "once through all photos"
    monkeypatch.setattr(clothes, "_train", None)
    with torch.no_grad():
        assert torch.equal(clothes.network(tmp_path)(x), trained(x)), "the second time from the cache"


def test_rows_of_any_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    report, path = script("_report", monkeypatch), tmp_path / "rows.jsonl"
    report.Rows(path, "abc").add("first", {"value": 1})
    rows = report.Rows(path, "def+changes", any_code=True)
    rows.add("second", {"value": 2})
    assert {row["key"]: row["code"] for row in rows.rows.values()} == {"first": "abc", "second": "def+changes"}
    assert "first" in report.Rows(path, "ghi", any_code=True)
    assert report.version_of(rows.rows.values()) == "of several commits"
    assert report.version_of([rows.rows["first"]]) == "abc"


def test_turns_that_waited_for_a_processor_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = script("_turns", monkeypatch)
    waits = iter([1.0, 0.0, 0.0, 1.0, 0.0, 0.0] + [1.0] * 99)
    total = 0.0
    calls: list[int] = []

    def waited() -> float:  # read before and after every turn
        nonlocal total
        if len(reads) % 2:
            total += next(waits)
        reads.append(0)
        return total

    reads: list[int] = []
    monkeypatch.setattr(turns, "waited", waited)
    quiet = turns.take_turns({"a": lambda: calls.append(1)}, (4, 4), 0.0, 2)
    assert (quiet.quiet, len(quiet.times["a"]), len(calls)) == (4, 4, 2 + 2 * 6)
    loud = turns.take_turns({"a": lambda: calls.append(1)}, (4, 4), 0.0, 2)
    assert (loud.quiet, len(loud.times["a"])) == (0, 8)


def test_the_order_of_a_turn_is_drawn_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = script("_turns", monkeypatch)
    said: list[str] = []
    turns.take_turns({name: lambda name=name: said.append(name) for name in "abc"}, (8, 8), 0.0)
    orders = {tuple(said[at : at + 6]) for at in range(6, len(said), 6)}
    assert len(orders) > 1
    # each once before its time is taken
    assert all(order[::2] == order[1::2] and len(set(order)) == 3 for order in orders)


def test_waits_are_read_where_linux_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = script("_turns", monkeypatch)
    assert turns.waited() >= 0
    if Path("/proc/self/schedstat").exists():
        assert turns.waited() > 0

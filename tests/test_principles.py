"""The eight claims of `examples/principles`: every script runs, draws and holds, and every check can fail."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

PRINCIPLES = Path(__file__).parent.parent / "examples" / "principles"
CLAIMS = sorted(path.stem for path in PRINCIPLES.glob("claim*.py"))
FROM_ROWS = "claim8_small_batches"

Script = Callable[[str], Any]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    """Imports a script the way its neighbours do."""
    monkeypatch.syspath_prepend(str(PRINCIPLES))
    return importlib.import_module


def test_there_are_eight_and_the_readme_shows_each() -> None:
    assert [name[5] for name in CLAIMS] == list("12345678")
    text = (PRINCIPLES / "README.md").read_text()
    for name in CLAIMS:
        assert f"python examples/principles/{name}.py" in text
        assert f"(figures/{name}.png)" in text
        assert (PRINCIPLES / "figures" / f"{name}.png").exists()
    for figure in (PRINCIPLES / "figures").iterdir():
        assert figure.stem in CLAIMS
        assert figure.stat().st_size < 60_000


@pytest.mark.parametrize("name", [name for name in CLAIMS if name != FROM_ROWS])
def test_a_claim_holds(script: Script, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script("_common").main(script(name), ["--smoke", "--out", str(tmp_path / "figure.png")])
    out = capsys.readouterr().out
    assert out.startswith(f"Claim {name[5]}. ")
    assert f"python examples/principles/{name}.py" in out
    assert out.endswith("The claim holds.\n")
    with Image.open(tmp_path / "figure.png") as picture:
        assert picture.format == "PNG"
    assert [path.name for path in tmp_path.iterdir()] == ["figure.png"]


def test_claim_1_can_fail(script: Script) -> None:
    claim = script("claim1_layer_and_instance_norm")
    with pytest.raises(AssertionError, match=r"LayerNorm, 64 values: d/dx off by 20.0 units"):
        claim.check([claim.Row("LayerNorm", 64, (0.5, 20.0, 0.5), (0.5, 0.5, 0.5))])


def test_claim_2_can_fail(script: Script) -> None:
    claim = script("claim2_batch_independence")
    with pytest.raises(AssertionError, match=r"3 values of GroupNorm's output have other bits in a batch of 4"):
        claim.check([claim.Row(4, (0.1,), (1e-7,), 3)])
    with pytest.raises(AssertionError, match="BatchNorm does not depend on its batch of 4"):
        claim.check([claim.Row(4, (0.0,), (0.0,), 0)])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mean": 0.5}, "the mean's error is not Var/m"),
        ({"spread": 1e-3}, "GroupNorm's output differs"),
        ({"bias": (0.5, 0.1)}, "GroupNorm's mean gradient is not the whole set's"),
        ({"noise": (1.0, 9.0)}, "GroupNorm's noise is not that of m samples averaged"),
        ({"bias": (1.0, 0.0)}, "BatchNorm's mean gradient is no less like"),
        ({"output": (1.0, 0.2)}, r"BatchNorm's output goes as m\^-?0.00"),
        ({"variance": 1.0}, r"BatchNorm's variance goes as m\^-?0.00"),
    ],
)
def test_claim_3_can_fail(script: Script, changes: dict[str, Any], message: str) -> None:
    claim = script("claim3_batch_statistics")

    def rows(**changes: Any) -> list[Any]:
        return [
            claim.Row(**({"batch": m, "mean": 1 / m, "formula": 1 / m, "variance": 1 / m, "output": (1 / m, 0.2),
                          "spread": 0.0, "bias": (1 / m, 0.0), "noise": (1.0, 1.0)} | (changes if m > 1 else {})))
            for m in (1, 2, 4)
        ]  # fmt: skip

    claim.check(rows())
    with pytest.raises(AssertionError, match=message):
        claim.check(rows(**changes))


@pytest.mark.parametrize(
    ("made", "real", "message"),
    [
        ((0.9, 1.0, 1.0), {}, "ratio 10: not what the formula says"),
        ((0.1, 0.5, 1.0), {}, "ratio 10: copied, channels sorted by loudness leaves 0.500"),
        ((0.1, 1.0, 0.5), {}, "ratio 10: standardised leaves 0.500"),
        ((0.1, 1.0, 1.0), {"copied": (1.0, 0.9, 0.5)}, "explain's prediction is off"),
        ((0.1, 1.0, 1.0), {"copied": (1.0, 0.9, 0.9)}, "the copy squashes nothing"),
        ((0.1, 1.0, 1.0), {"standardised": (0.3, 1.0, 0.5)}, "does not repair the median channel"),
        ((0.1, 1.0, 1.0), {"standardised": (0.6, 1.0, 1.0)}, "does not repair the real layer's output"),
        ((0.1, 1.0, 1.0), {"ordered": (0.4, 1.0, 1.0)}, "reordering on other photos lowers no error"),
    ],
)
def test_claim_4_can_fail(script: Script, made: tuple[float, ...], real: dict[str, Any], message: str) -> None:
    claim = script("claim4_loud_and_quiet")

    def found(made: tuple[float, ...], changes: dict[str, Any]) -> Any:
        rows = {"copied": (1.0, 0.5, 0.5), "standardised": (0.3, 1.0, 1.0), "ordered": (0.2, 1.0, 1.0), **changes}
        ways = {name: claim.Real(error, predicted, (kept,)) for name, (error, predicted, kept) in rows.items()}
        names = (claim.NAIVE, claim.STANDARDISED, claim.ORDERED)
        row = claim.Made(10.0, 0.1, dict(zip((claim.NAIVE, claim.SORTED, claim.STANDARDISED), made, strict=True)))
        return claim.Found("layer", 32, [row], dict(zip(names, ways.values(), strict=True)))

    claim.check(found((0.1, 1.0, 1.0), {}))
    with pytest.raises(AssertionError, match=message):
        claim.check(found(made, real))


@pytest.mark.parametrize(
    ("exchanged", "change", "message"),
    [
        (4, (1e-9, 0.0, 0.1, 0.05), r"BatchNorm in eval\(\) is off"),
        (4, (0.0, 1e-3, 0.1, 0.05), r"BatchNorm in train\(\) is off"),
        (None, (0.0, 0.0, 0.1, 0.0), "though the groups are kept"),
        (4, (0.0, 0.0, 1e-7, 0.05), "mixing groups changed GroupNorm by 1.0e-07 only"),
        (4, (0.0, 0.0, 0.05, 0.1), "standardised channels are no more alike"),
    ],
)
def test_claim_5_can_fail(script: Script, exchanged: int | None, change: tuple[float, ...], message: str) -> None:
    claim = script("claim5_shuffled_channels")
    claim.check([claim.Row("across groups", 4, (0.0, 0.0, 0.1, 0.05)), claim.Row("within", None, (0.0,) * 4)])
    with pytest.raises(AssertionError, match=message):
        claim.check([claim.Row("shuffle", exchanged, change)])


def test_claim_6_can_fail(script: Script) -> None:
    claim = script("claim6_damped_gradient")

    def rows(spectral: float = 1.0, frobenius: float = 1.0, single: float = 1.0) -> list[Any]:
        found = []
        for variance in (1e-9, 1e3):
            closed, largest = claim.closed_form(variance)
            found.append(claim.Row(variance, frobenius * closed, single * closed, spectral * largest, closed, largest))
        return found

    claim.check(rows())
    for changes, message in (
        ({"frobenius": 1.1}, "Frobenius norm at v"),
        ({"single": 1.1}, "Frobenius norm in fp32 at v"),
        ({"spectral": 0.9}, "spectral norm at v"),
    ):
        with pytest.raises(AssertionError, match=message):
            claim.check(rows(**changes))
    with pytest.raises(AssertionError, match="fewer than 12 decades"):
        claim.check(rows()[:1])
    above = rows()
    above[0] = above[0]._replace(spectral=400.0, closed_spectral=400.0)
    with pytest.raises(AssertionError, match="above the bound"):
        claim.check(above)


@pytest.mark.parametrize(
    ("column", "power", "message"),
    [
        (0, 0.5, r"BatchNorm in eval\(\) gives contrast\^0.500"),
        (1, 0.5, r"BatchNorm in train\(\) gives contrast\^0.500"),
        (2, 0.5, "GroupNorm's output at contrast"),
        (3, 1.0, "GroupNorm, standardised gives contrast\\^1.00: it does not damp"),
        (4, 1.0, "softness 1 gives contrast\\^1.00: it does not damp"),
    ],
)
def test_claim_7_can_fail(script: Script, column: int, power: float, message: str) -> None:
    claim = script("claim7_contrast")

    def rows(**changes: float) -> list[Any]:
        powers = {"0": 1.0, "1": 1.0, "2": 0.0, "3": 0.0, "4": 0.5, **changes}
        return [claim.Row(s, tuple(s**power for power in powers.values())) for s in (0.1, 1.0, 10.0)]

    claim.check(rows())
    with pytest.raises(AssertionError, match=message):
        claim.check(rows(**{str(column): power}))


def write_rows(path: Path, errors: dict[str, dict[int, float]], *, photos: int = 900, seeds: int = 2) -> None:
    """Rows as `examples/benchmarks/small_batch.py` writes them, with so many wrong answers."""
    lines = []
    for method, of_batch in errors.items():
        for batch, error in of_batch.items():
            for seed in range(seeds):
                hard = np.random.default_rng(seed).permutation(photos)  # the same photos are hard at every batch size
                hits = np.packbits(hard >= round(error * photos)).tobytes().hex()
                key = f"96 px, 256 samples: {method}, batch {batch}, seed {seed}"
                lines.append({"key": key, "kind": "run", "method": method, "batch": batch, "seed": seed,
                              "photos": photos, "hits": hits})  # fmt: skip
    lines.append({"key": "96 px, 256 samples: search, BatchNorm, lr 0.1", "kind": "search", "method": "BatchNorm"})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"key": "cut o')


AS_CLAIMED = {"BatchNorm": {1: 0.4, 4: 0.2, 16: 0.1}, "gnswap, pure": {1: 0.1, 4: 0.1, 16: 0.1}, "gnswap": {1: 0.1}}


def test_claim_8_holds_on_rows_that_show_it(
    script: Script, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    claim = script(FROM_ROWS)
    monkeypatch.setattr(claim, "ROWS", tmp_path / "rows.jsonl")
    write_rows(claim.ROWS, AS_CLAIMED)
    script("_common").main(claim, ["--out", str(tmp_path / "figure.png")])
    out = capsys.readouterr().out
    assert "shown:     BatchNorm's error rises: +30.0 points" in out
    assert out.endswith("The claim holds.\n")
    assert (tmp_path / "figure.png").exists()


@pytest.mark.parametrize(
    ("batchnorm", "groupnorm", "missing"),
    [
        ({1: 0.1, 16: 0.1}, {1: 0.1, 16: 0.1}, "BatchNorm's error rises: .* BatchNorm's rises more: "),
        ({1: 0.4, 16: 0.1}, {1: 0.3, 16: 0.1}, "GroupNorm's does not, or by under 2 points: .20.0 points"),
        ({1: 0.2, 16: 0.1}, {1: 0.4, 16: 0.1}, "BatchNorm's rises more: -20.0 points"),
    ],
)
def test_claim_8_says_what_the_rows_do_not_show(
    script: Script,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    batchnorm: dict[int, float],
    groupnorm: dict[int, float],
    missing: str,
) -> None:
    claim = script(FROM_ROWS)
    monkeypatch.setattr(claim, "ROWS", tmp_path / "rows.jsonl")
    write_rows(claim.ROWS, {"BatchNorm": batchnorm, "gnswap, pure": groupnorm}, seeds=1)
    with pytest.raises(AssertionError, match=f"the rows do not support the claim .*not shown is: .*{missing}"):
        claim.check(claim.measure(smoke=True))


def test_claim_8_says_which_command_makes_the_rows(
    script: Script, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    claim = script(FROM_ROWS)
    monkeypatch.setattr(claim, "ROWS", tmp_path / "rows.jsonl")
    with pytest.raises(
        SystemExit, match=r"There are no runs in .*: python examples/benchmarks/small_batch.py --evening"
    ):
        claim.measure(smoke=True)
    write_rows(claim.ROWS, AS_CLAIMED, photos=24)  # of the benchmark's own smoke run
    with pytest.raises(SystemExit, match="There are no runs"):
        claim.measure(smoke=True)
    write_rows(claim.ROWS, {"BatchNorm": {1: 0.4, 16: 0.3}, "gnswap, pure": {1: 0.1, 2: 0.1}})
    with pytest.raises(SystemExit, match=r"has no seed yet with BatchNorm and gnswap, pure at batch 1 and 16. Go on: "):
        claim.measure(smoke=True)


def test_claim_8_knows_the_benchmark(script: Script) -> None:
    """The command, and the file that it writes."""
    claim = script(FROM_ROWS)
    benchmark = PRINCIPLES.parent / "benchmarks" / "small_batch.py"
    assert claim.ROWS.parent == benchmark.parent / "results"
    assert claim.COMMAND.split()[1] == str(benchmark.relative_to(PRINCIPLES.parent.parent))


def test_the_input_of_a_layer_is_what_it_is_given(script: Script) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.BatchNorm2d(4)).eval()
    x = torch.randn(2, 3, 5, 5)
    with torch.no_grad():
        assert torch.equal(script("_common").input_of(network, "2", x), network[:2](x))
    assert not network[2]._forward_pre_hooks


def test_slope_is_an_exponent(script: Script) -> None:
    assert script("_common").slope([1, 2, 4], [3, 12, 48]) == pytest.approx(2)

"""What healing brings: converted networks before and after `gnswap.heal`, on photos that took no part in it.

    pip install -e '.[dev]'
    python examples/benchmarks/healing.py                # about ten minutes a row on two cores
    python examples/benchmarks/healing.py --only "lite0: pure" --steps 2000

Networks: EfficientNet-Lite0 and Lite1 with their ImageNet weights. Photos: 251 from a Debian package (`photos.py`) and
28 from pip packages. Two of three choose the plan and heal (a quarter of these judges on the way), every third is kept
for the table. The options of `heal` are its defaults, but for `--steps`: every number makes rows of its own. Rows are
stored as they are measured, and a row that was interrupted goes on at its last checkpoint. Every row says which commit
measured it; rows of earlier ones stay until `--fresh`.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from _report import RESULTS, Rows, code_version, environment, markdown_table, version_of, write
from data_free import MODELS, load_photos
from photos import CACHE, photos
from torch import Tensor, nn

import gnswap
from gnswap._convert import taught

CASES: dict[str, dict[str, Any]] = {
    "pure": {"softness": 0},
    "pure, refitted first": {"softness": 0},
    "8 groups, pure": {"groups": 8, "softness": 0},
    "as it comes": {},
}
REFITTED = ("pure, refitted first",)


def split(x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Batches to heal with, and batches for the table."""
    judges = torch.arange(len(x)) % 3 == 2
    return list(x[~judges].split(16)), list(x[judges].split(16))


def measure(model: nn.Module, case: str, x: Tensor, checkpoint: Path, *, steps: int) -> dict[str, Any]:
    """One row of the table."""
    photos_to_heal, judges = split(x)
    conversion = gnswap.convert(model, **CASES[case], calibration=photos_to_heal)
    before = gnswap.compare(model, conversion.model, judges, layers=False)
    conversion = taught(
        conversion, model, photos_to_heal, refitting=case in REFITTED, steps=steps, checkpoint=checkpoint
    )
    after = gnswap.compare(model, conversion.model, judges, layers=False)
    healing = conversion.report.healing
    assert healing is not None
    return {"before": before.to_dict(), "after": after.to_dict(), "healing": healing.to_dict()}


def as_table(rows: list[dict[str, Any]]) -> str:
    """The rows as markdown."""
    cells = []
    for row in rows:
        shares = [
            f"{row[when][key]:.3f}" for key in ("agreement", "agreement_sure", "kl") for when in ("before", "after")
        ]
        healing = row["healing"]
        minutes = f"{healing['looks'][-1]['seconds'] / 60:.1f}"
        cells.append(
            [row["model"], row["case"], *shares, str(healing["steps"]), str(healing["best_step"]), minutes, row["code"]]
        )
    shares = [f"{what}{when}" for what in ("agreement", "where sure", "KL") for when in ("", ", healed")]
    return markdown_table(["network", "conversion", *shares, "steps", "best", "minutes", "gnswap"], cells)


def report(rows: list[dict[str, Any]], missing: int) -> None:
    """Write the table of what is measured."""
    rows = sorted(rows, key=lambda row: [row["model"], list(CASES).index(row["case"]), row["healing"]["steps"]])
    data = {**environment(version_of(rows)), "threads": torch.get_num_threads(), "rows": rows}
    title = f"Healing, judged on {rows[0]['after']['photos']} photos that took no part in it"
    write("healing", f"{title} ({len(rows)} rows measured, {missing} missing)", as_table(rows), data)


def main() -> None:
    """Measure what is missing; after each row the table says all that is known."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--fresh", action="store_true", help="measure every row again")
    parser.add_argument("--cache", type=Path, default=CACHE, help="where photos and checkpoints are (%(default)s)")
    parser.add_argument("--steps", type=int, default=1000, help="of healing (%(default)s)")
    parser.add_argument("--only", default="", metavar="REGEX", help='rows to measure, such as "lite1: pure" (all)')
    parser.add_argument("--report", action="store_true", help="measure nothing; write the table of what is there")
    arguments = parser.parse_args()
    code, steps = code_version(), arguments.steps
    rows = Rows(RESULTS / "healing.rows.jsonl", code, fresh=arguments.fresh, any_code=True)
    keys = {(name, case): f"{name}: {case}, {steps} steps" for name in MODELS for case in CASES}

    def write_table() -> None:
        report(list(rows.rows.values()), sum(key not in rows for key in keys.values()))

    if arguments.report:
        write_table()
        return
    files = photos(arguments.cache)
    for name, build in MODELS.items():
        missing = [
            case for case in CASES if keys[name, case] not in rows and re.search(arguments.only, keys[name, case])
        ]
        if not missing:
            continue
        model = build()
        x = torch.cat([batch for batch, _ in load_photos(model, files)])
        for case in missing:
            print(f"{keys[name, case]}", file=sys.stderr)
            checkpoint = arguments.cache / f"healing-{code}-{name}-{case.replace(' ', '-')}-{steps}"
            row = measure(model, case, x, checkpoint, steps=steps)
            rows.add(keys[name, case], {"model": name, "case": case, **row})
            write_table()
            shutil.rmtree(checkpoint)


if __name__ == "__main__":
    main()

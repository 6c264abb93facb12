"""What converting costs: time beyond building the network, and peak memory.

    python examples/benchmarks/convert_cost.py

Each figure comes from a process of its own: building timm's resnet50, then the conversion, in place and as a copy.
Peak memory is the highest resident size during the conversion (Linux's VmHWM, reset before it), counted above what
the process held before.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from _report import code_version, environment, markdown_table, write
from rich.progress import track

MODEL = "resnet50"


def status(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def one_run(inplace: bool) -> dict[str, Any]:
    """Build and convert once, in this process."""
    import timm

    import gnswap

    start = time.perf_counter()
    model = timm.create_model(MODEL).eval()
    built = time.perf_counter()
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    held = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    begin = time.perf_counter()
    gnswap.apply(model, gnswap.plan(model), inplace=inplace)
    end = time.perf_counter()
    return {
        "build_s": built - start,
        "convert_s": end - begin,
        "model_bytes": size,
        "peak": (size + status("VmHWM") - held) / size,
    }


def main() -> None:
    """Run each way several times and write the medians."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeat", type=int, default=5, help="runs of each (%(default)s)")
    parser.add_argument("--one", choices=["in place", "copy"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    code = code_version()
    if arguments.one:
        print(json.dumps(one_run(arguments.one == "in place")))
        return
    rows = []
    for way in ("in place", "copy"):
        runs = []
        for _ in track(range(arguments.repeat), way, transient=True):
            out = subprocess.run([sys.executable, __file__, "--one", way], capture_output=True, text=True, check=True)
            runs.append(json.loads(out.stdout))
        middle = {key: median(run[key] for run in runs) for key in runs[0]}
        rows.append({"way": way, **middle, "worst_peak": max(run["peak"] for run in runs), "runs": runs})
    table = markdown_table(
        ["conversion of resnet50", "building [s]", "converting [s]", "peak memory / model"],
        [[row["way"], f"{row['build_s']:.2f}", f"{row['convert_s']:.2f}", f"{row['worst_peak']:.2f}"] for row in rows],
    )
    write("convert_cost", "What converting costs", table, {**environment(code), "rows": rows})


if __name__ == "__main__":
    main()

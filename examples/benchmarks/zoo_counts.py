"""Every architecture of timm with a BatchNorm of any kind: inspected and planned, on the meta device.

    python examples/benchmarks/zoo_counts.py --jobs 2

No weights and no memory are needed: the meta device has shapes only. Rows are stored as they come, so an interrupted
run goes on where it stopped. `zoo.py` takes from here which networks there are, and in which order.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import warnings
from collections import Counter
from typing import Any

from _report import RESULTS, Rows, code_version, environment, markdown_table, write
from rich.progress import track


def examine(name: str) -> tuple[str, dict[str, Any]]:
    """Build one architecture without memory, inspect it, and plan it."""
    import timm
    import torch

    import gnswap

    torch.set_num_threads(1)
    step = "build"
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of architectures that timm has deprecated or renamed
            model = timm.create_model(name)
        step = "inspect"
        inventory = gnswap.inspect(model)
        row: dict[str, Any] = {
            "family": timm.models.model_entrypoint(name).__module__.rpartition(".")[2],
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "types": Counter(site.norm_type for site in inventory.sites),
            "widths": Counter(site.num_channels for site in inventory.sites),
            "refusals": Counter(site.refusal for site in inventory.sites if site.refusal is not None),
        }
        if not inventory.sites:
            return name, row
        step = "plan"
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*another number of groups than was asked for", UserWarning)
            plan = gnswap.plan(model)
        row["swapped"], row["kept"] = len(plan.swaps), len(plan.kept)
        row["smallest_group"] = min((decision.group_size for decision in plan.swaps), default=None)
        row["reasons_kept"] = Counter(decision.reason for decision in plan.kept)
        return name, row
    except Exception as error:  # a row for it: one architecture must not end the run over all of them
        return name, {"failed": step, "error": f"{type(error).__name__}: {error}"}


def total(rows: list[dict[str, Any]], field: str) -> Counter[str]:
    """Sum the counters of all rows."""
    counts: Counter[str] = Counter()
    for row in rows:
        counts.update(row.get(field, {}))
    return counts


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The counts over all architectures."""
    failed = {row["key"]: f"{row['failed']}: {row['error']}" for row in rows if "failed" in row}
    with_norms = [row for row in rows if row.get("types")]  # a row that failed has none, and is listed as failed
    widths = total(with_norms, "widths")
    return {
        "architectures": len(rows),
        "with a BatchNorm of any kind": len(with_norms),
        "inspected and planned": sum("swapped" in row for row in with_norms),
        "failed": failed,
        "BatchNorm layers": sum(widths.values()),
        "swapped": sum(row["swapped"] for row in with_norms),
        "kept": sum(row["kept"] for row in with_norms),
        "architectures with every layer swapped": sum(not row["kept"] for row in with_norms),
        "types": dict(total(with_norms, "types").most_common()),
        "refusals": dict(total(with_norms, "refusals").most_common()),
        "reasons for keeping": dict(total(with_norms, "reasons_kept").most_common()),
        "architectures with a width that 32 does not divide": sum(
            any(int(width) % 32 for width in row["widths"]) for row in with_norms
        ),
        "layers with a width that 32 does not divide": sum(n for width, n in widths.items() if int(width) % 32),
        "layers where groups=32 is impossible or leaves under 4 channels": sum(
            count for width, count in widths.items() if int(width) % 32 or int(width) // 32 < 4
        ),
        "smallest group of the default plan": min(row["smallest_group"] for row in with_norms if row["swapped"]),
    }


def main() -> None:
    """Examine what is missing, and write the counts."""
    import timm

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (%(default)s)")
    parser.add_argument("--filter", default="", help="glob over architectures, for a try")
    parser.add_argument("--fresh", action="store_true", help="examine every architecture again")
    arguments = parser.parse_args()
    code = code_version()
    names = timm.list_models(arguments.filter)
    rows = Rows(RESULTS / "zoo_counts.rows.jsonl", code, fresh=arguments.fresh)
    missing = [name for name in names if name not in rows]
    with multiprocessing.get_context("spawn").Pool(arguments.jobs) as pool:
        for name, row in track(pool.imap_unordered(examine, missing), "architectures", total=len(missing)):
            rows.add(name, row)
    counts = summary([rows.rows[name] for name in names])
    table = markdown_table(
        ["over all architectures of timm", "count"],
        [[key, str(value)] for key, value in counts.items() if isinstance(value, int)]
        + [[f"layers of type `{kind}`", str(count)] for kind, count in counts["types"].items()]
        + [[f"kept: {reason}", str(count)] for reason, count in counts["reasons for keeping"].items()]
        + [[f"failed: {name}", reason] for name, reason in counts["failed"].items()],
    )
    write("zoo_counts", "Every architecture of timm", table, {**environment(code), **counts})


if __name__ == "__main__":
    main()

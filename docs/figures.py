"""Fills the tables of figures in README.md and docs/ from the committed results, so that none is typed by hand.

    python docs/figures.py            # --check: write nothing, and fail where a page is stale

A page marks a table with `<!-- figures: NAME -->` and `<!-- end -->`; what stands between them is replaced by what the
function of that name finds in `examples/benchmarks/results/`. The tests run `--check`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "examples" / "benchmarks" / "results"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MARKED = re.compile(r"(<!-- figures: (\w+) -->\n).*?(<!-- end -->)", flags=re.DOTALL)
LEVERS = (("", "all"), (", refitted", "refitted"))
NETWORKS = ("tf_efficientnet_lite0", "tf_efficientnet_lite1")
FIDELITY_NETWORKS = {**dict(zip(NETWORKS, ("Lite0", "Lite1"), strict=True)), "mobilenetv2_100": "clothes"}
TARGET = "fidelity={}, max_softness=32.0"


def rows_of(name: str, first: str) -> list[dict[str, str]]:
    """The rows, by column, of the table in `results/NAME.md` whose first column has this title."""
    lines = (RESULTS / f"{name}.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    start = next((i for i, row in enumerate(cells) if row[0] == first and lines[i].startswith("| ")), None)
    if start is None:
        raise LookupError(f"results/{name}.md has no table that begins with {first!r}")
    rows = []
    for line, row in zip(lines[start + 2 :], cells[start + 2 :], strict=True):
        if not line.startswith("|"):
            break
        rows.append(dict(zip(cells[start], row, strict=True)))
    return rows


def row_of(rows: list[dict[str, str]], **wanted: str) -> dict[str, str]:
    """The one row with these values, underscores standing for spaces in the columns' names."""
    found = [row for row in rows if all(row[key.replace("_", " ")] == value for key, value in wanted.items())]
    if len(found) != 1:
        raise LookupError(f"{len(found)} rows with {wanted}")
    return found[0]


def data_of(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown: the first column stands left, the others right."""
    rule = ["---"] + ["--:"] * (len(header) - 1)
    return "".join("| " + " | ".join(cells) + " |\n" for cells in (header, rule, *rows))


def source(name: str) -> str:
    data = data_of(name)
    versions = data["versions"]
    command = re.sub(r" (--)?report\b", "", data["command"])  # what measures, and not only what writes the table
    return (
        f"\n`{command}`, {data['date']}, gnswap {versions.get('gnswap', 'of several commits')}, "
        f"torch {versions['torch']} ([result](RESULTS/{name}.md)).\n"
    )


WAYS = {
    "gamma and beta copied into GroupNorm(32)": "naive: gamma, beta into GroupNorm(32)",
    "fresh GroupNorm(32)": "fresh GroupNorm(32)",
    "gnswap, 32 groups, pure GroupNorm": "gnswap, groups=32, softness=0",
    "gnswap, 8 groups, pure GroupNorm": "gnswap, groups=8, softness=0",
    "gnswap, 8 groups": "gnswap, groups=8",
    "**gnswap as it comes**": "gnswap, default",
}


def kept() -> str:
    """The README's first figures: answers kept without data and without training."""
    rows = rows_of("data_free", "network")
    lines = []
    for title, way in WAYS.items():
        both = [row_of(rows, network=network, swap=way) for network in NETWORKS]
        bold = "**" if title.startswith("**") else ""
        lines.append([title, *(f"{bold}{row[what]}{bold}" for what in ("agreement", "where sure") for row in both)])
    head = ["same top-1 answer as the original", "Lite0", "Lite1", "Lite0, where sure", "Lite1, where sure"]
    return table(head, lines) + source("data_free")


def kept_with_photos() -> str:
    """The README's figures with unlabelled photos, of those in `with_photos`."""
    ways = {
        "pure GroupNorm, no photos": ("softness=0.0; 0 photos", "all"),
        "pure GroupNorm, 64 photos": ("softness=0.0; 64 photos", "all"),
        "the same, refitted": ("softness=0.0; 64 photos", "refitted"),
        "softness 1, no photos": ("softness=1.0; 0 photos", "all"),
        "softness 1, 64 photos": ("softness=1.0; 64 photos", "all"),
        "softness 1, 183 photos": ("softness=1.0; 183 photos", "all"),
        "told to keep .97, 64 photos": (f"{TARGET.format(0.97)}; 64 photos", "all"),
    }
    rows = rows_of("fidelity", "network")
    lines = [
        [
            title,
            *(measured(rows, network, f"groups=auto, {plan}", levers, ["agreement"]) for network in FIDELITY_NETWORKS),
        ]
        for title, (plan, levers) in ways.items()
    ]
    return table(["same top-1 answer as the original", *FIDELITY_NETWORKS.values()], lines) + source("fidelity")


def with_photos() -> str:
    """What unlabelled photos add, for pure GroupNorm, a softness of 1 and a stated target."""
    rows = rows_of("fidelity", "network")
    refitted = {f"{n} photos{more}": (n, levers) for n in (64, 183) for more, levers in LEVERS}
    ways = {"no photos": (0, "all"), "16 photos": (16, "all"), **refitted}
    plans = {
        f"{title}{soft}": f"groups={groups}, softness={softness}"
        for soft, softness in (("", "0.0"), (", softness 1", "1.0"))
        for title, groups in (("groups chosen", "auto"), ("8 groups", "8"), ("32 groups", "32"))
    }
    plans["groups of 32 channels, softness 1"] = "group_size=32, softness=1.0"
    plans |= {f"target .{str(target)[2:]}": f"groups=auto, {TARGET.format(target)}" for target in (0.9, 0.97)}
    lines = []
    for network, name in FIDELITY_NETWORKS.items():
        for title, plan in plans.items():
            cells = [
                measured(rows, network, f"{plan}; {photos} photos", levers, ("agreement", "where sure", "KL"))
                for photos, levers in ways.values()
            ]
            if set(cells) != {"–"}:
                lines.append([f"{name}, {title}", *cells])
    return table(["", *ways], lines) + source("fidelity")


def measured(rows: list[dict[str, str]], network: str, conversion: str, levers: str, columns: Sequence[str]) -> str:
    """Columns of one row of fidelity.md; a dash where it is not measured."""
    wanted = (network, conversion, levers)
    found = [row for row in rows if (row["network"], row["conversion"], row["levers"]) == wanted]
    return ", ".join(found[0][column] for column in columns) if found else "–"


def healing() -> str:
    """What training on the original's answers brings."""
    lines = []
    for row in rows_of("healing", "network"):
        figures = [f"{row[column]} → {row[f'{column}, healed']}" for column in ("agreement", "where sure", "KL")]
        name = f"{row['network'].rpartition('_')[2].capitalize()}, {row['conversion']}"
        lines.append([name, *figures, row["steps"], row["minutes"]])
    head = ["converted → healed", "agreement", "where sure", "KL", "steps", "minutes on two cores"]
    return table(head, lines) + source("healing")


def small_batch() -> str:
    rows = rows_of("small_batch", "accuracy [%]")
    batches = [name for name in rows[0] if name.startswith("batch ")]
    titles = {
        "BatchNorm": "BatchNorm, training",
        "naive GroupNorm": "gamma and beta copied",
        "gnswap, pure": "gnswap, pure GroupNorm",
    }
    lines = []
    for row in rows:
        means = [row[batch].partition(" ")[0] for batch in batches]  # without the intervals
        lines.append([titles.get(row["accuracy [%]"], row["accuracy [%]"]), *means, row["varies by"]])
    for column in range(1, len(batches) + 1):
        best = max((line[column] for line in lines if line[column] != "–"), key=float)
        for line in lines:
            line[column] = f"**{best}**" if line[column] == best else line[column]
    head = ["test accuracy [%] at batch", *(name.removeprefix("batch ") for name in batches), "varies by"]
    return table(head, lines) + source("small_batch")


def zoo() -> str:
    data, planned = data_of("zoo"), rows_of("zoo_counts", "over all architectures of timm")
    count = {row["over all architectures of timm"]: row["count"] for row in planned}
    what = {
        "built, converted, checked with values": "values",
        "checked by shapes alone": "meta",
        "exported, the same in onnxruntime": "export",
    }
    lines = [
        ["inspected and planned", count["inspected and planned"]],
        ["planned with a layer that is refused", "0" if count["kept"] == "0" else f"{count['kept']} layers"],
        *([title, outcome(data[kind])] for title, kind in what.items()),
    ]
    return table([f"timm's {data['architectures']} networks with a BatchNorm", "networks"], lines) + source("zoo")


def zoo_exceptions() -> str:
    rows = rows_of("zoo", "exception")
    return table(list(rows[0]), [list(row.values()) for row in rows])


def outcome(counts: dict[str, int]) -> str:
    first = ("passed", "failed")
    names = sorted(counts, key=lambda name: (first.index(name) if name in first else len(first), name))
    return ", ".join(f"{counts[name]} {name}" for name in names if counts[name]) or "none"


def beyond_timm() -> str:
    rows = [row for row in rows_of("beyond_timm", "package") if row["norms"] != "none"]
    packages: dict[str, int] = {}
    for row in rows:
        name = {"smp": "segmentation-models-pytorch"}.get(row["package"], row["package"])
        packages[name] = packages.get(name, 0) + 1
    same = sum(row["reverted, same bits"] == row["loaded, same bits"] == "yes" for row in rows)
    pairs = [[float(x) for x in row["of a layer (median), gnswap / naive"].split(" / ")] for row in rows]
    whole = [[float(x) for x in row["error of the answers, gnswap / naive"].split(" / ")] for row in rows]
    exported = [row for row in rows if row["ONNX, relative error"] != "not tried"]
    lines = [
        ["networks with a BatchNorm", f"{len(rows)} ({', '.join(f'{n} {name}' for name, n in packages.items())})"],
        ["reverted and loaded with the same bits", str(same)],
        ["a layer's error below the naive swap's (median)", str(sum(a < b for a, b in pairs))],
        ["the answers' error below the naive swap's", str(sum(a < b for a, b in whole))],
        ["exported", f"{len(exported)}, relative error at most {largest(exported)}"],
    ]
    return table(["beyond timm", "networks"], lines) + source("beyond_timm")


def largest(rows: list[dict[str, str]]) -> str:
    return max((row["ONNX, relative error"] for row in rows), key=float)


def data_free() -> str:
    rows = rows_of("data_free", "network")
    lines = []
    for way in dict.fromkeys(row["swap"] for row in rows):
        one, two = (row_of(rows, network=network, swap=way) for network in NETWORKS)
        figures = [f"{one[column]} / {two[column]}" for column in ("agreement", "where sure", "accuracy (20 labels)")]
        lines.append([way, f"{one['converted']} / {two['converted']}", one["state kept"], *figures])
    head = ["swap", "converted, Lite0 / Lite1", "state kept", "agreement", "where sure", "accuracy (20 labels)"]
    return table(head, lines) + source("data_free")


def export() -> str:
    rows = [row for row in rows_of("export", "network") if row["threads"] == "2"]
    lines = []
    for network in dict.fromkeys(row["network"] for row in rows):
        pair = [row for row in rows if row["network"] == network]
        batches = " / ".join(row["batch"] for row in pair)
        cells = [" / ".join(row[column] for row in pair) for column in ("faster than torch's", "time / BatchNorm")]
        lines.append([network, batches, *cells, " / ".join(row["error"] for row in pair)])
    head = ["network", "batch", "torch's GroupNorm export / gnswap's", "gnswap's / BatchNorm folded", "relative error"]
    return table(head, lines) + source("export")


def kernels() -> str:
    rows = [row for row in rows_of("kernels", "allocator") if row["allocator"] == "default"]
    lines = [[row["what"], row["median"], row["worst row"] or "–", row["rows below 1"] or "–"] for row in rows]
    head = ["time of the best eager form / gnswap's, 2 threads", "median", "worst shape", "shapes that lose"]
    return table(head, lines) + source("kernels")


def cost() -> str:
    rows = rows_of("convert_cost", "conversion of resnet50")
    return table(list(rows[0]), [list(row.values()) for row in rows]) + source("convert_cost")


def counts() -> str:
    rows = rows_of("zoo_counts", "over all architectures of timm")
    return table(list(rows[0]), [list(row.values()) for row in rows]) + source("zoo_counts")


def export_range() -> str:
    """What a GroupNorm costs on a CPU, in one line."""
    ratios = [float(row["time / BatchNorm"]) for row in rows_of("export", "network")]
    return (
        f"Over {len(ratios)} pairs of network, threads and batch, a run took {min(ratios):.2f} to {max(ratios):.2f} "
        f"times that of the folded BatchNorm network.\n{source('export')}"
    )


TABLES: dict[str, Callable[[], str]] = {
    one.__name__: one
    for one in (
        *(beyond_timm, cost, counts, data_free, export, export_range, healing),
        *(kept, kept_with_photos, kernels, small_batch, with_photos, zoo, zoo_exceptions),
    )
}


def filled(page: Path) -> str:
    """The page with every marked table as it has to be.

    Raises:
        LookupError: a mark that names no table, or a result without the rows that it needs.
    """

    def fill(match: re.Match[str]) -> str:
        if match[2] not in TABLES:
            raise LookupError(f"{page.name}: there is no table {match[2]!r}; there are {', '.join(TABLES)}")
        results = ("../" if page.parent.name == "docs" else "") + "examples/benchmarks/results"
        return f"{match[1]}{TABLES[match[2]]().replace('RESULTS', results)}{match[3]}"

    return MARKED.sub(fill, page.read_text())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where a page is stale")
    check = parser.parse_args(arguments).check
    stale = [page for page in PAGES if filled(page) != page.read_text()]
    for page in stale:
        print(f"{page.relative_to(ROOT)}: " + ("stale: run python docs/figures.py" if check else "written"))
        if not check:
            page.write_text(filled(page))
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())

"""Every BatchNorm network of timm: converted, checked, and with --export written as ONNX and run.

    pip install -e '.[dev]'
    python examples/benchmarks/zoo.py --jobs 2              # the checks of `_zoo_checks.py`: hours
    python examples/benchmarks/zoo.py --jobs 2 --meta       # what is too large or not done yet, by its shapes
    python examples/benchmarks/zoo.py --jobs 2 --export     # the exports of `_zoo_export.py`: many hours

Which architectures hold a BatchNorm, and how large they are, says `zoo_counts.py`, which has to build all of timm for
it. The smallest of every family come first, then the second of each. Each runs in a process of its own with
limits on time and memory, and what it dies of is its row. Rows are stored as they come, with the version of gnswap that
they are of, so an interrupted sweep goes on where it stopped, also after a commit; `--retry-failed` runs those again
in which something failed.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import multiprocessing
import os
import resource
import signal
import sysconfig
import tempfile
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import _zoo_cases
import _zoo_checks
import _zoo_export
import timm
import torch
from _report import RESULTS, Row, Rows, code_version, environment, markdown_table, write
from rich.progress import track

EXPORTERS = (
    "networkx",
    "onnxruntime",
    "onnxscript.function_libs.torch_lib.ops",
    "torch._functorch.aot_autograd",
    "torch._inductor.decomposition",
    "torch.onnx._internal.exporter._core",
)
"""What an export imports."""

KINDS = ("values", "meta", "export")
"""What a row is of: a network with values, one on the meta device, an exported file."""

STATES = ("passed", "failed", "original fails", "not run")

Work = Callable[[str, Path], Row]

PLACES = (Path(__file__).parents[2], sysconfig.get_path("purelib"), sysconfig.get_path("stdlib"))
"""Folders of this machine, which are nobody's business in a traceback."""


def values(name: str, photos: Path) -> Row:
    """All checks."""
    return _zoo_checks.examine(name, torch.load(photos))


def meta(name: str, photos: Path) -> Row:  # noqa: ARG001 - one signature for all
    """The checks that need no values."""
    return _zoo_checks.examine(name, None)


def export(name: str, photos: Path) -> Row:
    """Export and parity."""
    return _zoo_export.examine(name, torch.load(photos))


def isolated(work: Work, name: str, photos: Path, seconds: float, gibibytes: float) -> Row:
    """One row out of a process of its own, which may hang, die, or want all memory."""
    context = multiprocessing.get_context("forkserver")
    # imported once; a fork of it takes no time
    context.set_forkserver_preload(["torch", "timm", "gnswap", *(EXPORTERS if work is export else ())])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_in_process, args=(sender, work, name, photos, gibibytes), daemon=True)
    process.start()
    sender.close()
    try:
        if receiver.poll(seconds):
            return receiver.recv()
        return {"failed": {"limits": f"not finished after {seconds:g} s"}}
    except EOFError:
        process.join()
        return {"failed": {"limits": f"the process died with exit code {process.exitcode}"}}
    finally:
        process.kill()
        process.join()
        receiver.close()


def _in_process(sender: Any, work: Work, name: str, photos: Path, gibibytes: float) -> None:
    limit = int(gibibytes * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    torch.set_num_threads(1)
    try:
        row = work(name, photos)
    except Exception:  # a row for it: one architecture must not end the sweep over all of them
        row = {"failed": {"all": traceback.format_exc()}}
    row["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    sender.send(without_places(row))


def without_places(row: Any) -> Any:
    """The same row, its texts without this machine's folders."""
    if isinstance(row, dict):
        return {key: without_places(value) for key, value in row.items()}
    if isinstance(row, str):
        for place in PLACES:
            row = row.replace(f"{place}{os.sep}", "")
    return row


def stop(number: int, _frame: FrameType | None) -> None:
    """End at once, with the processes of the rows in progress: they may hold gigabytes and go on for minutes."""
    for process in multiprocessing.active_children():
        process.kill()
    os._exit(128 + number)


def census() -> dict[str, Row]:
    """The architectures with a BatchNorm, smallest first, as `zoo_counts.py` found them.

    Raises:
        SystemExit: it has not run with this timm.
    """
    rows = Rows(RESULTS / "zoo_counts.rows.jsonl", "", any_code=True).rows
    names = timm.list_models()
    if missing := [name for name in names if "parameters" not in rows.get(name, {})]:
        raise SystemExit(f"not counted yet: {', '.join(missing[:3])} ... Run examples/benchmarks/zoo_counts.py first.")
    found = [name for name in names if rows[name]["types"]]
    return {name: rows[name] for name in sorted(found, key=lambda name: rows[name]["parameters"])}


def families_first(known: dict[str, Row]) -> list[str]:
    """The smallest of every family, then the second of each: a sweep that was stopped has seen all of them."""
    ranks: Counter[str] = Counter()
    ranked = []
    for name, row in known.items():
        ranked.append((ranks[row["family"]], name))
        ranks[row["family"]] += 1
    return [name for _, name in sorted(ranked, key=lambda pair: pair[0])]


def state(row: Row | None) -> str:
    """What came of it: one of `STATES`."""
    if row is None:
        return "not run"
    if row["failed"]:
        return "original fails" if row.get("original_fails") else "failed"
    return "passed"


def as_table(rows: dict[str, dict[str, Row]], known: dict[str, Row]) -> str:
    """A row for each family, and one for all."""
    families: dict[str, list[str]] = defaultdict(list)
    for name, row in known.items():
        families[row["family"]].append(name)
    families["**all**"] = list(known)
    cells = []
    for family, names in sorted(families.items()):
        passed, failed = (
            {kind: sum(state(rows[kind].get(name)) == wanted for name in names) for kind in KINDS}
            for wanted in ("passed", "failed")
        )
        original = sum(state(rows["export"].get(name)) == "original fails" for name in names)
        distances = sorted(
            rows["values"][name]["distance"] for name in names if "distance" in rows["values"].get(name, {})
        )
        errors = [rows["export"][name]["error"] for name in names if "error" in rows["export"].get(name, {})]
        left = sum(state(rows["values"].get(name)) == "not run" for name in names)
        cells.append(
            [
                family,
                str(len(names)),
                *(str(count[kind]) for kind in ("values", "meta") for count in (passed, failed)),
                str(left),
                f"{distances[len(distances) // 2]:.2f}" if distances else "–",
                f"{distances[-1]:.2f}" if distances else "–",
                str(passed["export"]),
                str(failed["export"]),
                str(original),
                f"{max(errors):.0e}" if errors else "–",
            ]
        )
    header = ["family", "networks", "all checks passed", "failed", "by shapes passed", "failed", "without values yet"]
    header += ["distance / naive's, median", "largest"]
    return markdown_table([*header, "exported", "failed", "original fails", "largest error"], cells)


def per_check(rows: dict[str, dict[str, Row]]) -> str:
    """How often each check passed, failed, and did not apply."""
    counts = {title: Counter[str]() for title in _zoo_checks.CHECKS}
    for kind in ("values", "meta"):
        for row in rows[kind].values():
            for outcome in ("passed", "failed", "does_not_apply"):
                for title in row.get(outcome, ()):
                    counts.setdefault(title, Counter())[f"{kind} {outcome}"] += 1
    columns = [f"{kind} {outcome}" for kind in ("values", "meta") for outcome in ("passed", "failed", "does_not_apply")]
    header = ["check", *(column.replace("_", " ").replace("meta", "shapes") for column in columns)]
    return markdown_table(header, [[title, *(str(count[c]) for c in columns)] for title, count in counts.items()])


def failures(rows: dict[str, dict[str, Row]]) -> str:
    """Everything that failed, in full, and why checks did not apply, counted."""
    text = []
    for kind in KINDS:
        for name, row in sorted(rows[kind].items()):
            for title, error in row["failed"].items():
                text.append(f"## {name}: {title} ({kind}, gnswap {row['code']})\n\n```text\n{error.strip()}\n```\n")
            if reason := row.get("original_fails"):
                text.append(f"The BatchNorm original fails as well:\n\n```text\n{reason.strip()}\n```\n")
    reasons: Counter[tuple[str, str]] = Counter()
    for row in rows["values"].values():
        reasons.update(row.get("does_not_apply", {}).items())
    table = [[title, reason.replace("|", "\\|").replace("\n", " "), str(n)] for (title, reason), n in reasons.items()]
    text.append("## Checks that the BatchNorm original does not pass either\n")
    text.append(markdown_table(["check", "the original's error", "networks"], sorted(table)))
    return "\n".join(text)


def exceptions(rows: dict[str, dict[str, Row]], known: dict[str, Row]) -> str:
    """What failed, does not apply or was not run, and why, counted: the README has this table."""
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for kind in KINDS:
        for name, row in rows[kind].items():
            for title, error in row["failed"].items():
                *_, last = error.strip().splitlines()
                why = "the BatchNorm original fails as well" if row.get("original_fails") else last
                found[f"failed: {title} ({kind})", why].append(name)
            for title, reason in row.get("does_not_apply", {}).items():
                if name not in found[f"does not apply: {title}", reason]:  # it may have a row of shapes, too
                    found[f"does not apply: {title}", reason].append(name)
    for kind in ("values", "export"):
        names = [name for name in known if state(rows[kind].get(name)) == "not run"]
        by_shapes = sum(state(rows["meta"].get(name)) == "passed" for name in names)
        why = "too little time"
        if kind == "values":
            why += f" or memory so far; {by_shapes} pass the checks of shapes"
        if names:
            found[f"not run: {kind}", why] = names
    cells = []
    for (title, why), names in sorted(found.items()):
        which = f" ({', '.join(sorted(names))})" if len(names) <= 3 else ""
        cells.append([f"{title}: {why}{which}".replace("|", "\\|"), str(len(names))])
    return markdown_table(["exception", "networks"], cells)


def summary(rows: dict[str, dict[str, Row]], known: dict[str, Row]) -> Row:
    """The counts over all architectures, and of how many rows each version of gnswap is."""
    with_values = {name for name in known if state(rows["values"].get(name)) == "passed"}
    asked = {"values": known, "meta": set(known) - with_values, "export": known}
    return {
        "architectures": len(known),
        **{kind: dict(Counter(state(rows[kind].get(name)) for name in asked[kind])) for kind in KINDS},
        "covered by values or shapes": sum(
            "passed" in (state(rows["values"].get(name)), state(rows["meta"].get(name))) for name in known
        ),
        "rows by version of gnswap": {kind: dict(Counter(r["code"] for r in rows[kind].values())) for kind in KINDS},
        "sides in pixels": dict(Counter(str(r["size"][1]) for r in rows["values"].values() if "size" in r)),
    }


def main() -> None:
    """Examine what is missing, and write the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (%(default)s)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--meta", action="store_true", help="shapes only, for networks without a row with values")
    what.add_argument("--export", action="store_true", help="export and parity")
    what.add_argument("--report", action="store_true", help="write the tables of what is there")
    parser.add_argument("--seconds", type=float, default=300, help="the most for one network (%(default)s)")
    parser.add_argument("--gibibytes", type=float, default=6, help="memory, the most for one network (%(default)s)")
    parser.add_argument("--models", nargs="*", metavar="NAME", help="only these")
    parser.add_argument("--retry-failed", action="store_true", help="also those in which something failed")
    parser.add_argument("--fresh", action="store_true", help="all again")
    arguments = parser.parse_args()
    kind = "meta" if arguments.meta else "export" if arguments.export else "values"
    code, known = code_version(), census()
    stores = {one: Rows(RESULTS / f"zoo_{one}.rows.jsonl", code, any_code=True) for one in KINDS}
    store, rows = stores[kind], {one: stores[one].rows for one in KINDS}
    names = [name for name in families_first(known) if not arguments.models or name in arguments.models]
    again = set(STATES) if arguments.fresh else {"failed", "original fails"} if arguments.retry_failed else set()
    missing = [name for name in names if state(rows[kind].get(name)) in {"not run", *again}]
    if kind == "meta":
        missing = [name for name in missing if state(rows["values"].get(name)) != "passed"]
    if not arguments.report:
        sweep(store, missing, arguments)
    data = {**environment(code, "onnx", "onnxruntime-gpu"), **summary(rows, known)}
    lines = [
        f"- {key}: {value}" for key, value in data.items() if key not in ("command", "date", "machine", "versions")
    ]
    text = "\n".join([*lines, "", as_table(rows, known), per_check(rows), exceptions(rows, known)])
    write("zoo", f"The {len(known)} BatchNorm networks of timm", text, data)
    (RESULTS / "zoo_failures.md").write_text(f"# What failed in the zoo\n\n{failures(rows)}")


def sweep(store: Rows, names: list[str], arguments: argparse.Namespace) -> None:
    """A row for each of the names, as they come."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    work = {"zoo_meta": meta, "zoo_export": export}.get(store.path.name.partition(".")[0], values)
    with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
        photos = Path(folder) / "photos.pt"
        torch.save(_zoo_cases.photos(), photos)
        limits = (arguments.seconds, arguments.gibibytes)
        waiting = {pool.submit(isolated, work, name, photos, *limits): name for name in names}
        for done in track(concurrent.futures.as_completed(waiting), "networks", total=len(waiting)):
            store.add(waiting[done], done.result())


if __name__ == "__main__":
    main()

"""What the benchmarks share: rows that survive an interruption, and results that say how they were made."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import gnswap

RESULTS = Path(__file__).parent / "results"

Row = dict[str, Any]


def code_version() -> str:
    """The last commit that touched the package, "+changes" where it was edited since.

    Fixed when a script starts: Python has loaded the package by then, whatever is edited or committed later.
    """
    package = Path(gnswap.__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(package), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        commit = git("log", "-1", "--format=%h", "--", ".")
        return commit + ("+changes" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.CalledProcessError):
        return f"version {gnswap.__version__}"  # not in a git checkout


class Rows:
    """Rows in a JSON-lines file, one for each key: what is there is not measured again.

    Only rows of the same code count, so that a table never mixes what two versions did; `any_code` is for a sweep that
    takes longer than the code stands still, and whose table says of how many versions it is. A line that was cut off by
    a kill is dropped; everything of a row lies in its line.

    Args:
        path: the file; made with its folder where there is none.
        code: the version that measures now (`code_version`).
        fresh: forget what is there.
        any_code: keep the rows of other versions.
    """

    def __init__(self, path: Path, code: str, *, fresh: bool = False, any_code: bool = False) -> None:
        self.path, self.code = path, code
        path.parent.mkdir(parents=True, exist_ok=True)
        self.rows: dict[str, Row] = {}
        if fresh:
            path.unlink(missing_ok=True)
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:
                    continue
                if any_code or (row.get("code") == code and not code.endswith("+changes")):
                    self.rows[row["key"]] = row
            self._rewrite()

    def _rewrite(self) -> None:
        fresh = self.path.with_suffix(".tmp")
        fresh.write_text("".join(json.dumps(row) + "\n" for row in self.rows.values()))
        fresh.replace(self.path)

    def __contains__(self, key: str) -> bool:
        return key in self.rows

    def add(self, key: str, row: Row) -> None:
        """Store one row, at once."""
        self.rows[key] = {"key": key, "code": self.code, **row}
        with self.path.open("a") as file:
            file.write(json.dumps(self.rows[key]) + "\n")


def version_of(rows: Iterable[Row]) -> str:
    """The commit that measured all of these rows, or that there are several."""
    commits = {str(row["code"]) for row in rows}
    return commits.pop() if len(commits) == 1 else "of several commits"


def environment(code: str, *packages: str) -> dict[str, Any]:
    """The command, the date, the machine, and the versions of gnswap (`code_version`) and others behind a result."""
    script = Path(sys.argv[0])
    return {
        "command": shlex.join(["python", f"examples/benchmarks/{script.name}", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, {platform.system()}",
        "versions": {
            "gnswap": code,
            "python": platform.python_version(),
            **{name: _version(name) for name in ("torch", "timm", *packages)},
        },
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"  # its data may lie in a cache


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table; columns of figures stand right."""
    figures = [all(row[index][:1].isdigit() or row[index] in ("", "–") for row in rows) for index in range(len(header))]
    rule = ["--:" if right else "---" for right in figures]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows)) + "\n"


def write(name: str, title: str, table: str, data: dict[str, Any], *, quiet: bool = False) -> None:
    """Write `results/NAME.json` and `results/NAME.md`, and print the table unless `quiet`."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    versions = ", ".join(f"{package} {version}" for package, version in data["versions"].items())
    text = f"# {title}\n\n{table}\n`{data['command']}` · {data['date']} · {data['machine']} · {versions}\n"
    for suffix, content in ((".json", json.dumps(data, indent=2) + "\n"), (".md", text)):
        fresh = RESULTS / f"{name}{suffix}.tmp"
        fresh.write_text(content)
        fresh.replace(RESULTS / f"{name}{suffix}")
    if not quiet:
        print(text)

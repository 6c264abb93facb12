"""Writing a report: the page, the data and the figures, each file whole or not at all."""

from __future__ import annotations

import os
import secrets
import warnings
from pathlib import Path

from gnswap._errors import MissingDependencyError, StoreError
from gnswap._record import on_few_lines
from gnswap._report.figures import NAMES, figures
from gnswap._report.html import page
from gnswap._report.records import FidelityReport

PAGE, DATA = "report.html", "report.json"
FILES = (PAGE, DATA, *NAMES)
"""Every file that a report may consist of."""


def write_report(report: FidelityReport, directory: Path) -> None:
    """Write the files of a report; those of an earlier one that this one does not have are removed.

    Without matplotlib there are no figures, which a warning says.

    Raises:
        StoreError: the directory cannot be written.
    """
    files = {PAGE: page(report).encode(), DATA: (on_few_lines(report.to_json()) + "\n").encode()}
    try:
        files |= figures(report)
    except MissingDependencyError as error:
        warnings.warn(f"the report has no PNG figures: {error}", UserWarning, stacklevel=3)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            _write(directory / name, content)
        for name in set(FILES) - files.keys():
            (directory / name).unlink(missing_ok=True)
    except OSError as error:
        raise StoreError(
            "the report cannot be written", where=str(directory), found=f"{type(error).__name__}: {error}"
        ) from error


def _write(path: Path, content: bytes) -> None:
    fresh = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with fresh.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)

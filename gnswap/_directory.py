"""A directory that is replaced as a whole: after a kill at any moment the old one can be read or the new one.

Why two renames and a backup: a directory that is not empty cannot be renamed over another one, and the Linux call
that swaps two of them (`renameat2` with `RENAME_EXCHANGE`) is neither portable nor in Python. Between the two
renames the old content stands under its backup name, which readers know (`readable`) and the next writer puts back.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from gnswap._errors import StoreError

# A temporary directory this old belongs to a writer that was killed, not to one at work beside us.
_ABANDONED_AFTER_SECONDS = 3600.0


def readable(directory: Path) -> Path:
    """Where the content of `directory` is: itself, or its backup where a writer died between its two renames."""
    backup = _backup(directory)
    return backup if not directory.exists() and backup.is_dir() else directory


@contextlib.contextmanager
def replaced(directory: Path, is_ours: Callable[[Path], str | None]) -> Iterator[Path]:
    """Fill a new directory, which takes the place of `directory` once the block has ended without an error.

    Args:
        directory: where the content is to stand; its parents are made.
        is_ours: says why an existing directory must not be replaced, or None where it may.

    Yields:
        An empty directory on the same file system, for the caller to fill.

    Raises:
        StoreError: `directory` is a file, or must not be replaced, or the operating system refuses. The old content
            is then where it was.
    """
    directory = directory.resolve()
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        _recover(directory)
        refuse_foreign(directory, is_ours)
        fresh = directory.with_name(f"{_fresh_prefix(directory)}{secrets.token_hex(4)}")
        fresh.mkdir()  # not tempfile.mkdtemp: its mode 0700 would hide the result from others
        try:
            yield fresh
            _flush(fresh)
            _swap_in(fresh, directory)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    except OSError as error:
        raise StoreError(
            "the directory cannot be written",
            where=str(directory),
            found=f"{type(error).__name__}: {error}",
            fix="Whatever was saved there before is unchanged.",
        ) from error


def _swap_in(fresh: Path, directory: Path) -> None:
    backup = _backup(directory)
    had_content = directory.exists()
    if had_content:
        directory.replace(backup)
    try:
        fresh.replace(directory)
    except BaseException:
        if had_content and not directory.exists():
            backup.replace(directory)
        raise
    _flush_entry(directory.parent)
    shutil.rmtree(backup, ignore_errors=True)


def _recover(directory: Path) -> None:
    """Put back, or clear away, what a writer that was killed has left."""
    backup = _backup(directory)
    if backup.is_dir():
        if directory.exists():
            shutil.rmtree(backup)
        else:
            backup.replace(directory)
    clear_abandoned(directory.parent, _fresh_prefix(directory))


def clear_abandoned(parent: Path, prefix: str) -> None:
    """Remove the temporary directories of this prefix whose writer was killed long ago."""
    long_ago = time.time() - _ABANDONED_AFTER_SECONDS
    for entry in parent.iterdir():
        if entry.name.startswith(prefix) and entry.stat().st_mtime < long_ago:
            shutil.rmtree(entry, ignore_errors=True)


def refuse_foreign(directory: Path, is_ours: Callable[[Path], str | None]) -> None:
    """Raise `StoreError` where `directory` exists and must not be replaced; see `replaced`."""
    if not directory.exists():
        return
    reason = is_ours(directory) if directory.is_dir() else "it is a file"
    if reason is not None:
        raise StoreError(
            "refusing to overwrite",
            where=str(directory),
            expected="a new or empty directory, or one that gnswap.save wrote",
            found=reason,
            fix="Choose another directory.",
        )


def _backup(directory: Path) -> Path:
    directory = directory.resolve()
    return directory.with_name(f".{directory.name}.gnswap-old")


def _fresh_prefix(directory: Path) -> str:
    return f".{directory.name}.gnswap-new-"


def _flush(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            _flush(path)
            continue
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    _flush_entry(folder)


def _flush_entry(folder: Path) -> None:
    """Make renames inside `folder` last through a power cut, where directories can be opened (not on Windows)."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Real photos for the benchmarks: the 251 of the Debian package gcompris-qt-data (GPL-3+ and CC licences).

The photos are never copied into the repository: this script fetches the package with `apt-get download`
(Debian or Ubuntu), unpacks it with `dpkg -x`, and reads the photos out of Qt's resource files.

    python examples/benchmarks/photos.py            # prints the folder with the photos
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

PACKAGE = "gcompris-qt-data"
CACHE = Path.home() / ".cache" / "gnswap-benchmarks"
GROUPS = ("categorization", "erase", "explore_")
COVERS = ("alphabets", "numbers")  # pictures of toy blocks that stand for drawn letters and digits
SMALLEST_SIDE = 128  # below that a 224-pixel network sees mostly interpolation

# Qt's resource format, see qtbase/src/corelib/io/qresource.cpp
ZLIB, DIRECTORY, ZSTD = 1, 2, 4


def photos(cache: Path = CACHE) -> list[Path]:
    """The photos' files, sorted; fetches and unpacks them on the first call.

    Args:
        cache: where they are kept; the photos lie in its subfolder `photos`.

    Returns:
        251 webp files, named `activity-group-name.webp`.

    Raises:
        SystemExit: this is no Debian-like machine, or apt does not know the package.
    """
    folder = cache / "photos"
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            rcc_folder = unpacked(PACKAGE, Path(scratch)) / "usr" / "share" / "gcompris-qt" / "rcc"
            fresh = Path(scratch) / "photos"
            unpack(rcc_folder, fresh)
            fresh.rename(folder)
    return sorted(folder.glob("*.webp"))


def unpack(rcc_folder: Path, folder: Path) -> int:
    """Write the photos of the `.rcc` files in `rcc_folder` to `folder`; returns how many there were."""
    folder.mkdir(parents=True)
    count = 0
    for rcc in sorted(rcc_folder.glob("*.rcc")):
        if not rcc.name.startswith(GROUPS):
            continue
        for name, content in read_rcc(rcc.read_bytes()):
            below = name.partition("activities/")[2].partition("/")[2]
            parts = [part for part in below.split("/") if part not in ("resource", "images")]
            if not name.endswith(".webp") or parts[0] in COVERS:
                continue
            with Image.open(io.BytesIO(content)) as image:
                if min(image.size) < SMALLEST_SIDE:
                    continue
            (folder / "-".join([rcc.stem, *parts])).write_bytes(content)
            count += 1
    return count


def read_rcc(blob: bytes) -> Iterator[tuple[str, bytes]]:
    """The files in one Qt resource file, as (path, content).

    The header names three places: the tree (nodes of fixed size), the data and the names. A node is the offset
    of its name and flags, followed by (number of children, index of the first child) for a folder, and by
    (language, offset of the data) for a file. All numbers are big-endian, names are UTF-16.

    Raises:
        ValueError: no resource file, or an entry is compressed with something other than zlib.
    """
    if blob[:4] != b"qres":
        raise ValueError("not a Qt resource file")
    version, tree, data, names = struct.unpack_from(">4I", blob, 4)
    node_size = 14 if version == 1 else 22  # version 2 added the time of the last change

    def walk(index: int, parents: tuple[str, ...]) -> Iterator[tuple[str, bytes]]:
        node = tree + index * node_size
        name_offset, flags = struct.unpack_from(">IH", blob, node)
        path = parents
        if index:  # the root has no name
            (length,) = struct.unpack_from(">H", blob, names + name_offset)
            start = names + name_offset + 6  # a hash of four bytes stands between
            path = (*parents, blob[start : start + 2 * length].decode("utf-16-be"))
        if flags & DIRECTORY:
            count, first = struct.unpack_from(">II", blob, node + 6)
            for child in range(first, first + count):
                yield from walk(child, path)
            return
        if flags & ZSTD:
            raise ValueError(f"{'/'.join(path)} is compressed with zstd, which this reader does not know")
        (offset,) = struct.unpack_from(">I", blob, node + 10)
        (size,) = struct.unpack_from(">I", blob, data + offset)
        content = blob[data + offset + 4 : data + offset + 4 + size]
        # the first four bytes of a compressed entry are its size when unpacked
        yield "/".join(path), zlib.decompress(content[4:]) if flags & ZLIB else content

    yield from walk(0, ())


def unpacked(package: str, scratch: Path) -> Path:
    """The tree of a Debian package, fetched into `scratch` and unpacked there.

    Raises:
        SystemExit: this is no Debian-like machine, or apt does not know the package.
    """
    for tool in ("apt-get", "dpkg"):
        if shutil.which(tool) is None:
            sys.exit(
                f"{tool} is missing: the photos come from the Debian package {package}. Run this on Debian or Ubuntu"
                + (", or unpack the package elsewhere and pass its folder with --rcc" if package == PACKAGE else "")
            )
    command = ["apt-get", "download", package]
    # apt drops root for a user that cannot write into our folder, and warns about it
    result = subprocess.run(
        [*command, "-o", "APT::Sandbox::User=root"] if os.geteuid() == 0 else command,
        cwd=scratch,
        capture_output=True,
        text=True,
        check=False,
    )
    archives = list(scratch.glob("*.deb"))
    if result.returncode or not archives:
        sys.exit(f"{' '.join(command)} failed (try `apt-get update` first): {result.stderr.strip()}")
    subprocess.run(["dpkg", "-x", archives[0], scratch / "tree"], check=True)
    return scratch / "tree"


def main() -> None:
    """Fetch the photos and print where they are."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--cache", type=Path, default=CACHE, help="where to keep them (%(default)s)")
    parser.add_argument("--rcc", type=Path, help="folder with the package's .rcc files, in place of apt")
    arguments = parser.parse_args()
    if arguments.rcc is not None:
        arguments.cache.mkdir(parents=True, exist_ok=True)
        unpack(arguments.rcc, arguments.cache / "photos")
    files = photos(arguments.cache)
    print(f"{len(files)} photos in {arguments.cache / 'photos'}")


if __name__ == "__main__":
    main()

"""From a finished graph to files: checked, the same bytes for the same graph, whole or not at all.

Why weights over the limit go to a file whose name holds their hash: the `.onnx` file names its weights, so the two can
never be mixed up, and an earlier pair stays whole until the new `.onnx` takes the old one's place in one step.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any

from gnswap._directory import clear_abandoned
from gnswap._errors import ExportError
from gnswap._onnx_graph import check

MAX_BYTES = 2**31 - 2**20
"""Weights that fit into one file: protobuf's limit, and room for the graph."""

_INLINE_BYTES = 1024  # shapes and single numbers, which shape inference has to see


def write(model: Any, path: Path, opset: int) -> tuple[Any, tuple[Path, ...]]:
    """Check an `onnx_ir.Model` and write it.

    Returns:
        the `onnx.ModelProto` that is in the file, and the files: `path`, and the weights where they are apart.

    Raises:
        ExportError: a check fails (see `check`), or the files cannot be written; `path` is as it was then.
    """
    import onnx
    import onnx_ir as ir

    prefix = f".{path.name}.gnswap-new-"
    try:
        clear_abandoned(path.parent, prefix)
        with tempfile.TemporaryDirectory(prefix=prefix, dir=path.parent) as folder:
            draft, weights = Path(folder) / path.name, Path(folder) / "weights"
            # checked without its weights, of which the checks would make several copies
            ir.save(model, draft, external_data=weights.name, size_threshold_bytes=_INLINE_BYTES)
            proto = check(onnx.load(draft, load_external_data=False), opset, draft)
            files = [path]
            if _bytes(model) > MAX_BYTES:
                files.append(path.with_name(f"{path.stem}.{_hash(weights)[:16]}.data"))
                _rename(proto, files[1].name)
            else:
                onnx.load_external_data_for_model(proto, folder)
            _save(draft, proto)
            for file in files[1:]:
                weights.replace(file)
            draft.replace(path)
    except OSError as error:
        raise ExportError("the file cannot be written", where=str(path), found=str(error)) from error
    return proto, tuple(files)


def _save(path: Path, proto: Any) -> None:
    with path.open("wb") as file:
        file.write(proto.SerializeToString(deterministic=True))
        file.flush()
        os.fsync(file.fileno())


def _bytes(model: Any) -> int:
    return sum(value.const_value.nbytes for graph in model.graphs() for value in graph.initializers.values())


def _rename(proto: Any, location: str) -> None:
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

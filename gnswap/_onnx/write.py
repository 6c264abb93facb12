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

    try:
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
            draft, weights = Path(folder) / path.name, None
            if _bytes(model) > MAX_BYTES:
                ir.save(model, draft, external_data="weights", size_threshold_bytes=_INLINE_BYTES)
                weights = Path(folder) / f"{path.stem}.{_hash(Path(folder) / 'weights')[:16]}.data"
                (Path(folder) / "weights").replace(weights)
                proto = onnx.load(draft, load_external_data=False)
                _rename(proto, weights.name)
                _save(draft, proto)
            else:
                proto = ir.to_proto(model)
            proto = check(proto, opset, draft if weights is not None else None)
            _save(draft, proto)
            files = [path]
            if weights is not None:
                files.append(path.with_name(weights.name))
                weights.replace(files[1])
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

"""The checks that stand between a finished graph and the file."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import onnx
import onnx_ir
import pytest

from gnswap import _onnx_graph
from gnswap._errors import ExportError, MissingDependencyError


@pytest.mark.parametrize("name", ["onnx", "onnx_ir", "onnxscript"])
def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'gnswap\[onnx\]'"):
        _onnx_graph.require_onnx()


def tiny_graph(operator: str = "Relu", domain: str = "", opset: int = 18, **attributes: Any) -> onnx.ModelProto:
    inputs = ["x", "w", "b"] if operator == "GroupNormalization" else ["x"]
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node(operator, inputs, ["y"], "the node", domain=domain, **attributes)],
        "tiny",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["s0", 4, "s1"])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["s0", 4, "s1"])],
        [onnx.numpy_helper.from_array(np.ones(4, np.float32), name) for name in inputs[1:]],
    )
    versions = [onnx.helper.make_opsetid(name, opset if not name else 1) for name in {"", domain}]
    return onnx.helper.make_model(graph, opset_imports=versions)


@pytest.mark.parametrize(
    ("model", "match"),
    [
        (tiny_graph("GroupNormalization", opset=21, num_groups=2), "GroupNormalization in the file.*the node"),
        (tiny_graph("FastGelu", domain="com.microsoft"), "com.microsoft::FastGelu"),
        (tiny_graph(opset=17), "wrong opset"),
        (tiny_graph("NoSuchOperator"), "checker refuses the file.*NoSuchOperator"),
    ],
)
def test_what_may_not_be_written(model: onnx.ModelProto, match: str) -> None:
    opset = 21 if "Normalization" in match else 18
    with pytest.raises(ExportError, match=match):
        _onnx_graph.check(model, opset)


def test_an_axis_that_became_fixed_is_an_error() -> None:
    graph = onnx_ir.from_proto(tiny_graph()).graph
    _onnx_graph.name_axes(graph, [{0: "batch", 2: "length"}])
    assert [str(value.shape) for value in graph.outputs] == ["[batch,4,length]"]
    with pytest.raises(ExportError, match="the height axis was fixed by the exporter"):
        _onnx_graph.name_axes(graph, [{1: "height"}])

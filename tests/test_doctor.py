"""doctor: every line says what runs, or why not."""

from __future__ import annotations

import pytest
import torch

from gnswap import _doctor, _providers
from gnswap.ops._backend import choose_backend


def test_it_names_the_code_that_runs() -> None:
    report = _doctor.examine()
    kernels = {finding.what: finding for finding in report.kernels}
    assert kernels["cpu"].uses == choose_backend("cpu", torch.float32).name
    assert all(finding.because for finding in (*report.kernels, *report.providers))
    assert report.versions["torch"].startswith(torch.__version__.partition("+")[0])
    assert _doctor.Doctor.from_json(report.to_json()) == report


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing where there is no GPU")
def test_missing_libraries_are_named() -> None:
    providers = {finding.what: finding for finding in _doctor.examine().providers}
    assert providers["cpu"].uses == "CPUExecutionProvider"
    assert providers["cuda"].uses == "-"
    assert "missing: lib" in providers["cuda"].because
    assert "libnvinfer" in providers["tensorrt"].because


def test_without_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    assert all("pip install 'gnswap[onnx]'" in finding.because for finding in _doctor.examine().providers)


def test_a_provider_that_is_not_in_the_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_providers.require_onnxruntime(), "get_available_providers", lambda: ["CPUExecutionProvider"])
    providers = {finding.what: finding.because for finding in _doctor.examine().providers}
    assert providers["cuda"] == "not in this build of onnxruntime"

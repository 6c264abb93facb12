"""gnswap: swap BatchNorm for GroupNorm in pretrained networks and keep what they know.

The one list of what is public. The verbs follow the way through: `inspect` → `plan` → `apply` (all three in one
call: `convert`) → `refit` → `heal` → `finetune`, or your own training and `save`/`load` → `export_onnx` →
`validate_onnx`; `revert` goes back.
"""

from gnswap import ops
from gnswap._apply import apply
from gnswap._benchmark import benchmark_onnx
from gnswap._calibrate import calibrate
from gnswap._convert import Conversion, ConversionReport, convert
from gnswap._errors import (
    ArgumentError,
    CalibrationError,
    ExportError,
    FinetuneError,
    GnswapError,
    HealingError,
    MissingDependencyError,
    ModelError,
    NothingToSwapError,
    PlanError,
    PlanMismatchError,
    ProviderError,
    RevertError,
    StoreError,
    ValidationError,
    WrappedModelError,
)
from gnswap._explain import explain
from gnswap._explanation import Explanation
from gnswap._export import ExportReport, export_onnx
from gnswap._fidelity import Fidelity, compare
from gnswap._finetune import finetune
from gnswap._finetuning import FinetuneReport
from gnswap._heal import heal
from gnswap._healing import HealReport
from gnswap._inspect import inspect
from gnswap._layer import FusedGroupNorm
from gnswap._moments import ChannelStatistics, Moments
from gnswap._norms import NormState, register_norm
from gnswap._opacus import grad_sample_module
from gnswap._parity import Parity
from gnswap._plan import plan
from gnswap._records import Decision, Inventory, Plan, Site
from gnswap._refit import RefitLayer, RefitReport, refit
from gnswap._report.records import FidelityReport
from gnswap._report.verb import report
from gnswap._revert import revert
from gnswap._schedule import SoftnessSchedule
from gnswap._speed import Benchmark
from gnswap._store import load, save
from gnswap._validate import validate_onnx

__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "Benchmark",
    "CalibrationError",
    "ChannelStatistics",
    "Conversion",
    "ConversionReport",
    "Decision",
    "Explanation",
    "ExportError",
    "ExportReport",
    "Fidelity",
    "FidelityReport",
    "FinetuneError",
    "FinetuneReport",
    "FusedGroupNorm",
    "GnswapError",
    "HealReport",
    "HealingError",
    "Inventory",
    "MissingDependencyError",
    "ModelError",
    "Moments",
    "NormState",
    "NothingToSwapError",
    "Parity",
    "Plan",
    "PlanError",
    "PlanMismatchError",
    "ProviderError",
    "RefitLayer",
    "RefitReport",
    "RevertError",
    "Site",
    "SoftnessSchedule",
    "StoreError",
    "ValidationError",
    "WrappedModelError",
    "apply",
    "benchmark_onnx",
    "calibrate",
    "compare",
    "convert",
    "explain",
    "export_onnx",
    "finetune",
    "grad_sample_module",
    "heal",
    "inspect",
    "load",
    "ops",
    "plan",
    "refit",
    "register_norm",
    "report",
    "revert",
    "save",
    "validate_onnx",
]

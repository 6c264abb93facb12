"""Every error gnswap raises, as one tree.

    GnswapError
    ├── ArgumentError            a value handed to a function (also a ValueError)
    ├── ModelError               the model as a whole cannot be handled
    │   └── WrappedModelError    DDP, FSDP, compiled, scripted: unwrap first
    ├── PlanError                a plan is malformed or was edited into nonsense
    │   └── PlanMismatchError    a good plan, but for another model
    ├── NothingToSwapError       no BatchNorm that could be replaced
    ├── RevertError              the original can no longer be had bit for bit
    ├── StoreError               a saved conversion that cannot be written or read
    ├── CalibrationError         photos: none, unreadable, or of the wrong shape
    ├── HealingError             healing cannot go on
    ├── FinetuneError            fine-tuning cannot begin or go on: data, a loss that is not finite, a lost process
    ├── ExportError              the ONNX file could not be made
    ├── ValidationError          the ONNX file could not be judged
    │   └── ProviderError        the execution provider asked for does not run here
    └── MissingDependencyError   an optional package; says what to install

A message always answers four questions: where, what was expected, what was found, what to do next.
"""

from __future__ import annotations


class GnswapError(Exception):
    """Base of all errors of this package.

    Args:
        problem: one sentence, what is wrong.
        where: the place: a module path, a file, an argument.
        expected: what would have been right.
        found: what was there instead.
        fix: what to do next.

    Example:
        >>> str(GnswapError("the plan does not fit", where="layer1.bn", expected="64 channels", found="32"))
        'the plan does not fit (at layer1.bn): expected 64 channels, found 32'
    """

    def __init__(
        self,
        problem: str,
        *,
        where: str | None = None,
        expected: str | None = None,
        found: str | None = None,
        fix: str | None = None,
    ) -> None:
        self.problem, self.where, self.expected, self.found, self.fix = problem, where, expected, found, fix
        super().__init__(problem)

    def __str__(self) -> str:
        comparison = [
            f"{word} {value}" for word, value in (("expected", self.expected), ("found", self.found)) if value
        ]
        text = self.problem + (f" (at {self.where})" if self.where else "")
        if comparison:
            text += ": " + ", ".join(comparison)
        if self.fix:
            text += f". {self.fix}"
        return text


class ArgumentError(GnswapError, ValueError):
    """A value handed to a function is not acceptable."""


class ModelError(GnswapError):
    """The model as a whole cannot be handled."""


class WrappedModelError(ModelError):
    """The model is wrapped (DDP, FSDP, torch.compile, TorchScript); convert the module inside."""


class PlanError(GnswapError):
    """A plan is malformed, of an unknown schema version, or contradicts itself."""


class PlanMismatchError(PlanError):
    """A well-formed plan, made for another architecture."""


class NothingToSwapError(GnswapError):
    """The model holds no BatchNorm that the plan could replace."""


class RevertError(GnswapError):
    """The original network can no longer be given back bit for bit."""


class StoreError(GnswapError):
    """A saved conversion cannot be written or read."""


class CalibrationError(GnswapError):
    """Calibration photos are missing, unreadable or of the wrong shape."""


class HealingError(GnswapError):
    """Healing cannot go on; the network has the best weights so far."""


class FinetuneError(GnswapError):
    """Fine-tuning cannot begin or go on: its data, a loss that is not finite, a process that was lost."""


class ExportError(GnswapError):
    """The ONNX file could not be made."""


class ValidationError(GnswapError):
    """The ONNX file could not be judged."""


class ProviderError(ValidationError):
    """The execution provider asked for does not run on this machine, or does not run all of the graph."""


class MissingDependencyError(GnswapError):
    """An optional package is not installed; the message says what to install."""

"""The floors of the design hold: a file imports only from lower floors, and no file grows past 400 lines."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "gnswap"

# One line a floor, lowest first. Same-floor imports are listed in SAME_FLOOR, each with its reason.
FLOORS: tuple[frozenset[str], ...] = (
    frozenset({"_errors", "_record", "_records"}),
    frozenset(
        {
            "ops._activations",
            "ops._reference",
            "ops._backend",
            "ops._cpu_library",
            "_algebra",
            "_grouping",
            "_matplotlib",
            "_progress",
            "_estimate",
            "_policy",
            "_directory",
            "_saved",
            "_trace",
            "_onnx",
            "_onnx.edit",
            "_onnx.same",
            "_providers",
            "_report",
            "_report.svg",
            "_report.levers",
            "_parity",
            "_speed",
            "_explanation",
            "_stress",
            "_onnx_scopes",
            "_pairs",
            "_lockstep",
            "_least_squares",
            "_views",
            "_processes",
            "_finetuning",
            "_photos",
        }
    ),
    frozenset(
        {
            "_order",
            "_balance",
            "ops._aten",
            "ops._cpu",
            "_onnx.norm",
            "_timing",
            "_peak_memory",
            "_speed_figure",
            "_explain_figure",
        }
    )
    | {f"ops._triton{part}" for part in ("", "._config", "._launch")}
    | {f"ops._triton._kernels_{part}" for part in ("shared", "tile", "split")}
    | {f"ops._triton._kernels_channels_last{part}" for part in ("", "_backward")},
    frozenset(
        {"ops._op", "ops._direct", "ops"}
        | {"_onnx_graph", "_onnx.lowering", "_onnx.fold", "_onnx.order", "_onnx_profile"}
    ),
    frozenset(
        {"_layer", "_norms", "_forwards", "_sites", "_survey", "_carry", "_absorb", "_fusing"}
        | {"_distill", "_couple"}
        | {
            "_running",
            "_build",
            "_trial",
            "_moments",
            "_corrections",
            "_tuned_layer",
            "_tuning",
            "_schedule",
            "_references",
            "_squash",
            "_taken_away",
        }
        | {"_datasets", "_engine", "_forgetting", "_head", "_param_groups"}
        | {f"_onnx.{part}" for part in ("plain", "targets", "compiler", "autotune", "write", "lowerings")}
        | {
            f"_onnx.lowerings.{first}_norm{then}"
            for first in ("instance", "layer")
            for then in ("", "_batch_norm", "_conv")
        }
        | {"_onnx.lowerings.two_step", "_onnx.lowerings.by_channel"}
    ),
    frozenset(
        {
            "_inspect",
            "_calibrate",
            "_refit",
            "_heal",
            "_healer",
            "_healing",
            "_plan",
            "_apply",
            "_revert",
            "_fidelity",
            "_export",
            "_validate",
            "_doctor",
            "_opacus",
            "_benchmark",
            "_plain_exports",
            "_source",
            "_weights",
            "_batches",
        }
    ),
    frozenset(
        {"_convert", "_explain", "_store", "_samples", "_baselines"}
        | {"_finetune", "_finetuner", "_finetuned"}
        | {"_cli_models", "_cli_output", "_cli_tables"}
        | {
            f"_report.{part}"
            for part in (
                "records",
                "photos",
                "spread",
                "measure",
                "charts",
                "html",
                "figures",
                "write",
                "verb",
            )
        }
    ),
    frozenset(
        {
            "_cli",
            "_cli_bench",
            "_cli_explain",
            "_cli_export",
            "_cli_options",
            "_cli_validate",
            "_demo",
            "__main__",
            "__init__",
        }
        | {"_cli_finetune"}
    ),
)
SAME_FLOOR = {
    ("ops._reference", "ops._activations"): "the definition of the norm ends with an activation",
    ("ops._triton._kernels_tile", "ops._triton._kernels_shared"): "all kernels are built from these parts",
    ("ops._triton._kernels_split", "ops._triton._kernels_shared"): "the same",
    ("ops._triton._kernels_channels_last", "ops._triton._kernels_shared"): "the same",
    ("ops._triton._kernels_channels_last_backward", "ops._triton._kernels_shared"): "the same",
    ("ops._triton._kernels_channels_last_backward", "ops._triton._kernels_channels_last"): "same blocks of work",
    ("ops._triton._launch", "ops._triton._config"): "the launcher launches what was chosen",
    ("ops._triton._launch", "ops._triton._kernels_tile"): "and has to know the kernels",
    ("ops._triton._launch", "ops._triton._kernels_split"): "the same",
    ("ops._triton._launch", "ops._triton._kernels_channels_last"): "the same",
    ("ops._triton._launch", "ops._triton._kernels_channels_last_backward"): "the same",
    ("ops._backend", "ops._cpu_library"): "whether the C++ kernels can be had decides the choice",
    ("ops._cpu", "ops._aten"): "what the C++ kernels do not take goes to ATen",
    ("ops._direct", "ops._op"): "the short way shares the op's autograd",
    ("ops", "ops._direct"): "the public function tries the short way first",
    ("ops", "ops._op"): "the public function is the checked call of the op",
    ("_record", "_errors"): "records refuse bad JSON with our errors",
    ("_records", "_record"): "the records are built on their base",
    ("_records", "_errors"): "decisions check themselves",
    ("_sites", "_norms"): "a walk has to know a norm when it sees one",
    ("_survey", "_forwards"): "a survey is put together from what these three see",
    ("_survey", "_norms"): "the same",
    ("_survey", "_sites"): "the same",
    ("_build", "_layer"): "it is what is built",
    ("_build", "_norms"): "out of what is read from the norm",
    ("_moments", "_norms"): "it listens at the norms",
    ("_moments", "_running"): "while the network runs",
    ("_moments", "_sites"): "it has to find them",
    ("_taken_away", "_layer"): "what its norms take away",
    ("_taken_away", "_running"): "while the network runs",
    ("_trial", "_build"): "the layers that are tried",
    ("_trial", "_layer"): "the same",
    ("_trial", "_running"): "while the network runs",
    ("_trial", "_sites"): "they are tried in the norms' places",
    ("_corrections", "_build"): "the layers that are corrected",
    ("_corrections", "_norms"): "and the norms they are compared with",
    ("_corrections", "_running"): "while the network runs",
    ("_corrections", "_sites"): "in the norms' places",
    ("_corrections", "_trial"): "a correction is kept where the answers get better",
    ("_tuning", "_corrections"): "the last of the choices",
    ("_tuning", "_moments"): "the statistics that choose",
    ("_tuned_layer", "_norms"): "the norm it is of",
    ("_tuned_layer", "_moments"): "its tables",
    ("_tuned_layer", "_sites"): "the norm it is of",
    ("_tuning", "_running"): "photos are read in one way",
    ("_tuning", "_tuned_layer"): "what is decided of one layer",
    ("_tuning", "_trial"): "what is chosen is tried",
    ("_squash", "_layer"): "it is what is looked at",
    ("_schedule", "_layer"): "it sets the layers' softness",
    ("_references", "_layer"): "the norms whose results are compared",
    ("_references", "_running"): "the networks run in eval mode",
    ("_references", "_sites"): "every norm is known under all its names",
    ("_distill", "_running"): "while the networks run",
    ("_couple", "_layer"): "an original has none of these",
    ("_couple", "_running"): "photos are read in one way",
    ("_couple", "_sites"): "a conversion has a record",
    ("_healing", "_weights"): "a checkpoint's tensors go into a file as a network's do",
    ("_healer", "_healing"): "its records and its checkpoint",
    ("_heal", "_healer"): "which does the work",
    ("_heal", "_healing"): "what it gives back",
    ("_forgetting", "_running"): "inputs are placed as everywhere",
    ("_forgetting", "_sites"): "it listens at a head",
    ("_head", "_sites"): "heads are found and replaced by their paths",
    ("_param_groups", "_layer"): "norms can be frozen",
    ("_param_groups", "_norms"): "the same",
    ("_param_groups", "_sites"): "the same",
    ("_finetune", "_finetuned"): "refuses early what could not be written",
    ("_finetune", "_finetuner"): "which does the work",
    ("_finetuned", "_store"): "the result is a saved network",
    ("_finetuner", "_finetuned"): "its directory",
    ("_finetuner", "_store"): "the best network so far comes from there",
    ("_benchmark", "_plain_exports"): "what is timed beside the file",
    ("_absorb", "_carry"): "an activation takes its hooks along as a norm does",
    ("_absorb", "_layer"): "hooks are seen there first",
    ("_absorb", "_norms"): "whether a norm has an activation of its own",
    ("_absorb", "_sites"): "and where both are",
    ("_fusing", "_sites"): "the modules above the norms",
    ("_carry", "_sites"): "what is carried is put in place there",
    ("_store", "_report.records"): "a saved network has its report beside it",
    ("_store", "_report.write"): "the same",
    ("_report.photos", "_report.records"): "the record is put together from what these see",
    ("_report.spread", "_report.records"): "the same",
    ("_report.measure", "_report.records"): "the same",
    ("_report.measure", "_report.photos"): "it shows the photos one by one",
    ("_report.charts", "_report.records"): "they draw the record",
    ("_report.html", "_report.charts"): "the page holds the charts",
    ("_report.html", "_report.records"): "and shows the record",
    ("_report.figures", "_report.records"): "they draw the record",
    ("_report.figures", "_report.charts"): "of the same stages",
    ("_report.write", "_report.html"): "the files are these",
    ("_report.write", "_report.figures"): "the same",
    ("_report.write", "_report.records"): "the same",
    ("_report.verb", "_convert"): "a conversion is reported on",
    ("_report.verb", "_report.measure"): "the verb puts the parts together",
    ("_report.verb", "_report.photos"): "the same",
    ("_report.verb", "_report.records"): "the same",
    ("_report.verb", "_report.spread"): "the same",
    ("_report.verb", "_report.write"): "the same",
    ("_cli", "_cli_bench"): "one of its commands",
    ("_cli", "_cli_finetune"): "one of its commands",
    ("_cli_finetune", "_cli_options"): "what several commands share",
    ("_cli_finetune", "__init__"): "it calls the verb by its public name",
    ("_cli_bench", "_cli_options"): "what several commands share",
    ("_cli_bench", "__init__"): "it calls the verb by its public name",
    ("_cli", "_cli_explain"): "one of its commands",
    ("_cli_explain", "_cli_options"): "what several commands share",
    ("_cli_explain", "__init__"): "it calls the verb by its public name",
    ("_cli", "_cli_export"): "one of its commands",
    ("_cli_export", "_cli_options"): "what several commands share",
    ("_cli_export", "__init__"): "it calls the verb by its public name",
    ("_cli", "_cli_options"): "what several commands share",
    ("_cli", "_cli_validate"): "one of its commands",
    ("_cli_validate", "_cli_options"): "what several commands share",
    ("_cli_validate", "__init__"): "it calls the verb by its public name",
    ("_onnx.plain", "_layer"): "it takes the layer's place",
    ("_onnx.lowerings.instance_norm_batch_norm", "_onnx.lowerings.instance_norm"): "the same statistics",
    ("_onnx.lowerings.instance_norm_conv", "_onnx.lowerings.instance_norm"): "the same statistics",
    ("_onnx.lowerings.layer_norm_batch_norm", "_onnx.lowerings.layer_norm"): "the same statistics",
    ("_onnx.lowerings.layer_norm_conv", "_onnx.lowerings.layer_norm"): "the same statistics",
    ("_onnx.lowerings.by_channel", "_onnx.lowerings.layer_norm"): "a layer norm's scale",
    **{
        ("_onnx.targets", f"_onnx.lowerings.{name}"): "it chooses among them"
        for name in (
            "instance_norm",
            "instance_norm_batch_norm",
            "instance_norm_conv",
            "layer_norm",
            "layer_norm_batch_norm",
            "layer_norm_conv",
            "two_step",
            "by_channel",
        )
    },
    ("_onnx.compiler", "_onnx.targets"): "the passes in a row",
    ("_onnx.autotune", "_onnx.compiler"): "it compiles every candidate",
    ("_onnx.autotune", "_onnx.targets"): "which say what the candidates are",
    ("_cli", "_demo"): "the demo is one of its commands",
    ("_cli", "__init__"): "it calls the verbs by their public names",
    ("__main__", "_cli"): "python -m gnswap is gnswap",
}


def floor_of(module: str) -> int:
    for number, names in enumerate(FLOORS):
        if module in names:
            return number
    raise AssertionError(f"{module} stands on no floor: add it to FLOORS in {Path(__file__).name}")


def module_name(path: Path) -> str:
    name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    return name.removesuffix(".__init__") if name != "__init__" else name


def imported(tree: ast.AST) -> set[str]:
    """The modules of this package that a file imports, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "gnswap":
            module = (node.module or "").removeprefix("gnswap").removeprefix(".")
            for alias in node.names:
                below = f"{module}.{alias.name}" if module else alias.name
                place = PACKAGE / Path(*below.split("."))
                is_module = place.with_suffix(".py").exists() or (place / "__init__.py").exists()
                names.add(below if is_module else module)
        elif isinstance(node, ast.Import):
            names |= {
                alias.name.removeprefix("gnswap").removeprefix(".") or "__init__"
                for alias in node.names
                if alias.name.split(".")[0] == "gnswap"
            }
    return {name for name in names if name}


def violations(module: str, tree: ast.AST) -> list[str]:
    return [
        f"{module} (floor {floor_of(module)}) imports {other} (floor {floor_of(other)})"
        for other in sorted(imported(tree))
        if other != module and (module, other) not in SAME_FLOOR and floor_of(other) >= floor_of(module)
    ]


def source_files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", source_files(), ids=module_name)
def test_imports_go_down(path: Path) -> None:
    assert not violations(module_name(path), ast.parse(path.read_text()))


def test_an_upward_import_is_seen() -> None:
    tree = ast.parse("def f():\n    from gnswap._cli import main\n")
    assert violations("_plan", tree) == ["_plan (floor 5) imports _cli (floor 7)"]


def test_a_verb_that_imports_a_verb_is_seen() -> None:
    assert violations("_plan", ast.parse("from gnswap._apply import apply"))


def test_a_file_on_no_floor_is_seen() -> None:
    with pytest.raises(AssertionError, match="stands on no floor"):
        floor_of("_nowhere")


@pytest.mark.parametrize("path", source_files(), ids=module_name)
def test_files_stay_readable(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400

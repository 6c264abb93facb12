"""What `pip install gnswap` and its extras bring is what the code imports."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path

from tests.test_architecture import PACKAGE, source_files

# torchvision: timm brings it; triton: torch brings it, where there is CUDA; markupsafe: part of jinja2's interface; the
# others: name of the package on PyPI
INDIRECT = {"torchvision": "timm", "triton": "torch", "markupsafe": "jinja2"}
DISTRIBUTIONS = {
    "onnx_ir": "onnx-ir",
    "PIL": "pillow",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
    "onnxruntime": "onnxruntime-gpu",
}


def imported(tree: ast.AST) -> set[str]:
    """The top-level names of all modules that are imported anywhere in the code, from outside of this package."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names - set(sys.stdlib_module_names) - {"gnswap"}


def declared() -> set[str]:
    """The packages that pyproject.toml asks for, in any extra but `dev`."""
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *(line for name, lines in extras.items() if name != "dev" for line in lines)]
    return {re.split(r"[^\w.-]", line)[0].lower() for line in wanted}


def undeclared(tree: ast.AST) -> set[str]:
    return {
        name for name in imported(tree) if INDIRECT.get(name, DISTRIBUTIONS.get(name, name)).lower() not in declared()
    }


def test_every_import_is_a_declared_dependency() -> None:
    for path in source_files():
        assert not undeclared(ast.parse(path.read_text())), f"{path.name} imports what pyproject.toml does not name"


def test_an_undeclared_import_is_seen() -> None:
    assert undeclared(ast.parse("def f():\n    import scipy.stats\n    from torch import nn")) == {"scipy"}


def test_the_installed_package_is_this_one() -> None:
    import gnswap

    assert Path(gnswap.__file__).parent == PACKAGE

"""What the documentation shows is run: doctests of every module and the code blocks of the README."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import gnswap

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
MODULES = sorted(
    module.name for module in pkgutil.walk_packages(gnswap.__path__, "gnswap.") if not module.name.endswith("__main__")
)


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # examples may write files
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert result.failed == 0


def test_readme_python_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other in one namespace, as a reader would type them."""
    monkeypatch.chdir(tmp_path)
    found = blocks(README, "python")
    assert found, "the README shows no Python"
    namespace: dict[str, object] = {"__name__": "readme"}
    for number, block in enumerate(found):
        exec(compile(block, f"README.md, Python block {number}", "exec"), namespace)


def test_readme_commands_are_the_ones_ci_runs() -> None:
    """`.ci/run` reads its test command out of the README, so the two cannot differ."""
    commands = "\n".join(blocks(README, "bash"))
    assert "gnswap demo" in commands
    assert re.search(r"^python3 -m venv .*pytest", commands, flags=re.MULTILINE)
    assert "README.md" in (ROOT / ".ci" / "run").read_text()


def test_readme_names_only_public_things() -> None:
    for name in re.findall(r"`gnswap\.([a-z_A-Z]+)", README):
        assert hasattr(gnswap, name), f"the README speaks of gnswap.{name}, which does not exist"

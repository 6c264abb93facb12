"""What the documentation shows is run: doctests of every module, and the blocks of the README and the guides."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import timm
import typer
from PIL import Image
from torch import nn
from typer.exceptions import TyperException
from typer.testing import CliRunner

import gnswap
from gnswap._cli import app
from tests._models import randomise_norms

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
MODULES = sorted(
    module.name for module in pkgutil.walk_packages(gnswap.__path__, "gnswap.") if not module.name.endswith("__main__")
)
# Long or only elsewhere: healing and fine-tuning have tests of their own, the demo runs in .ci/run, a GPU is not here.
# Such commands are read by the command line, every option and value, and not run.
ONLY_READ = {"--heal", "finetune", "demo", "bench", "tensorrt", "--autotune", "explain"}


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def commands(page: Path) -> list[list[str]]:
    """The words of every command that a page shows, comments and `&&` taken apart."""
    lines = "".join(blocks(page.read_text(), "bash")).splitlines()
    words = [shlex.split(part, comments=True) for line in lines for part in line.split(" && ")]
    return [one for one in words if one]


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a reader sits: an empty folder with photos of two classes, and a timm whose networks come at once.

    resnet18 is itself, with statistics that look real in place of weights, which cannot be had offline; every other
    name gives timm's smallest ResNet.
    """
    for number in range(8):
        folder = tmp_path / "photos" / ("cat" if number < 4 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((70, 70), 40 + 10 * number).convert("RGB").save(folder / f"{number}.png")
    create = timm.create_model

    def small(name: str, pretrained: bool = False, **options: Any) -> nn.Module:
        model = create("resnet18" if name.startswith("resnet18") else "test_resnet", **options)
        model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, 64, 64)}
        return randomise_norms(model) if pretrained or name != "test_resnet" else model

    monkeypatch.setattr(timm, "create_model", small)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # examples may write files
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert result.failed == 0


@pytest.mark.usefixtures("reader")
@pytest.mark.filterwarnings("ignore:Secure RNG turned off", "ignore:Optimal order is:UserWarning")  # Opacus
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_python_blocks(page: Path) -> None:
    """One after the other in one namespace, as a reader would type them."""
    namespace: dict[str, object] = {"__name__": page.stem}
    for number, block in enumerate(blocks(page.read_text(), "python")):
        exec(compile(block, f"{page.name}, Python block {number}", "exec"), namespace)


def check(words: list[str]) -> None:
    """Read one command without running it. Raises `AssertionError` or `TyperException` where it is wrong."""
    program, *arguments = words
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    if program.endswith("gnswap"):
        group: Any = typer.main.get_command(app)
        verb, *options = arguments
        assert verb in group.commands, f"there is no gnswap {verb}"
        group.commands[verb].make_context(verb, options, parent=None)
    elif program == "python":
        text = (ROOT / arguments[0]).read_text()
        assert not [one for one in arguments[1:] if one.startswith("--") and f'"{one}"' not in text]
    elif program.endswith("pip"):
        named = re.findall(r"\[([\w,]+)\]", " ".join(arguments))
        assert not [extra for names in named for extra in names.split(",") if extra not in extras]
    else:  # what .ci/run starts itself
        starts = {"python3", ".venv/bin/pytest", ".venv/bin/ruff", ".venv/bin/mypy"}
        assert program in starts, f"{program}: what is this?"
        assert not [one for one in arguments if one.endswith(".py") and not (ROOT / one).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_are_read(page: Path) -> None:
    for words in commands(page):
        check(words)


@pytest.mark.parametrize(
    "wrong",
    ["gnswap convret x -o y", "gnswap convert x --grups 3 -o y", "gnswap convert x -o y --order odd",
     "python examples/federated.py --fast", "pip install 'gnswap[everything]'", "rm -rf /"],
)  # fmt: skip
def test_a_wrong_command_is_seen(wrong: str) -> None:
    with pytest.raises((AssertionError, TyperException)):
        check(shlex.split(wrong))


def test_the_readme_commands_run(reader: Path) -> None:
    """The way through, on a small network, in the README's own words."""
    ran = []
    for words in commands(ROOT / "README.md"):
        if words[0] != "gnswap" or ONLY_READ & set(words):
            continue
        result = CliRunner().invoke(app, words[1:], catch_exceptions=False)
        assert result.exit_code == 0, f"{shlex.join(words)}: {result.output}"
        ran.append(words[1])
    assert set(ran) == {"inspect", "convert", "export", "validate"}
    assert (reader / "resnet50-gn" / "report.html").exists()


def test_readme_commands_are_the_ones_ci_runs() -> None:
    """`.ci/run` reads its test command out of the README, so the two cannot differ."""
    text = "\n".join(blocks(README, "bash"))
    assert "gnswap demo" in text
    assert re.search(r"^python3 -m venv .*pytest", text, flags=re.MULTILINE)
    assert "README.md" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_names_and_links_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    for name in re.findall(r"`gnswap\.([a-z_A-Z]+)", text):
        assert hasattr(gnswap, name), f"{page.name} speaks of gnswap.{name}, which does not exist"
    for link in re.findall(r"\]\(([^)#]+)", text):
        assert "://" in link or (page.parent / link).exists(), f"{page.name}: the link {link} leads nowhere"


@pytest.fixture(scope="module")
def reference() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "docs"))
        yield importlib.import_module("reference")


def test_the_reference_is_whole(reference: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every public name has an entry, its arguments and errors are explained, and no link leads nowhere."""
    assert reference.main(["--out", str(tmp_path / "pages")]) == 0, capsys.readouterr().out
    page = tmp_path / "pages" / "gnswap.html"
    page.write_text(page.read_text().replace('id="plan"', "").replace('href="#apply"', 'href="#aply"'))
    faults = reference.faults_in(tmp_path / "pages")
    assert "gnswap.html has no entry for plan" in faults
    assert "gnswap.html: the link #aply leads nowhere" in faults


def undocumented(x: int) -> None:
    pass


def half(x: int, y: int) -> None:
    """Does it as `gnswap.pln` does.

    Args:
        x: a number.

    Example:
        >>> half(1, 2)
    """


class Silent:
    """A class.

    Args:
        x: a number.
    """

    def __init__(self, x: int) -> None:
        self.x = x

    def method(self) -> None:
        pass


@pytest.mark.parametrize(
    ("value", "faults"),
    [
        (undocumented, ["it: no docstring"]),
        (half, ["it: y is not explained", "it: no Raises", "it: `gnswap.pln` leads nowhere"]),
        (Silent, ["it.method: no docstring"]),
        (gnswap.plan, []),
    ],
)
def test_what_is_missing_is_seen(reference: ModuleType, value: Any, faults: list[str]) -> None:
    assert reference.faults_of("it", value) == faults

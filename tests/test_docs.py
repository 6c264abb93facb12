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
import torch
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
PRINCIPLES = ROOT / "examples" / "principles" / "README.md"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")), PRINCIPLES]
MODULES = sorted(
    module.name for module in pkgutil.walk_packages(gnswap.__path__, "gnswap.") if not module.name.endswith("__main__")
)
# Commands that run elsewhere, and the file that runs them: CI makes a fresh environment, with a line of the README, and
# runs the demo and the linters in it; scripts are called by the tests that judge what they find.
ELSEWHERE = {
    "python3 -m venv": ".ci/run",
    ".venv/bin/pip": ".ci/run",
    "pip": ".ci/run",
    ".venv/bin/gnswap demo": ".ci/run",
    ".venv/bin/pytest": ".ci/run",
    ".venv/bin/ruff": ".ci/run",
    ".venv/bin/mypy": ".ci/run",
    "python docs/reference.py": "tests/test_docs.py",
    "python examples/federated.py": "tests/test_examples.py",
    "python examples/principles/claim4_loud_and_quiet.py": "tests/test_principles.py",
}


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def elsewhere(words: list[str]) -> str | None:
    """The file that runs a command which the tests of this file do not; None where there is none."""
    whole = shlex.join(words) + " "
    return next((file for start, file in ELSEWHERE.items() if whole.startswith(f"{start} ")), None)


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


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes as long as it is told to takes less: steps of healing, seconds of measuring. Figures that nobody asked
    for are not drawn."""
    taught, benchmark = gnswap._cli.taught, gnswap.benchmark_onnx

    def briefly(*those: Any, steps: int | None, **given: Any) -> Any:
        return taught(*those, steps=None if steps is None else min(steps, 4), **given)

    monkeypatch.setattr(gnswap._cli, "taught", briefly)
    monkeypatch.setattr(gnswap, "benchmark_onnx", lambda *those, **given: benchmark(*those, **given | {"seconds": 0.2}))
    monkeypatch.setattr(gnswap._finetuned, "can_draw", lambda: False)
    monkeypatch.setattr("gnswap._report.write.figures", lambda _report: {})


@pytest.mark.usefixtures("hurried")
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # timm leaves pictures open
def test_every_command_runs(reader: Path) -> None:
    """One page after the other as a reader would type it, in one folder; what was typed before is not typed again."""
    ran: list[list[str]] = []
    for words in (words for page in PAGES for words in commands(page)):
        if (file := elsewhere(words)) is not None:
            assert Path(words[1] if words[0] == "python" else words[0]).stem in (ROOT / file).read_text()
        elif words[1:] not in ran:
            ran.append(words[1:])
            result = CliRunner().invoke(app, words[1:], catch_exceptions=False)
            if "--provider" in words and "tensorrt" in words and not torch.cuda.is_available():
                assert (result.exit_code, result.stdout) == (1, "")
                assert re.search(r"error: .*TensorrtExecutionProvider", result.stderr), result.stderr
            else:
                assert result.exit_code == 0, f"{shlex.join(words)}: {result.output}"
    verbs = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert {words[0] for words in ran} == set(verbs) - {"demo"}
    written = {path.name for path in reader.iterdir()}
    assert written >= {"squash.png", "speed.png", "resnet50-gn.onnx", "resnet50-gn-fp16.onnx", "tuned.onnx"}
    for folder in ("resnet50-gn", "tuned"):
        assert (reader / folder / "plan.json").exists()
    assert (reader / "resnet50-gn" / "report.html").exists()


@pytest.mark.parametrize("verb", sorted(typer.main.get_command(app).commands))  # type: ignore[attr-defined]
def test_the_examples_of_the_help_are_read(verb: str) -> None:
    command = typer.main.get_command(app).commands[verb]  # type: ignore[attr-defined]
    examples = re.findall(r"^ *((?:gnswap|torchrun) .*)$", command.help, flags=re.MULTILINE)
    assert examples
    for example in examples:
        check(["gnswap", *shlex.split(example.partition("gnswap ")[2])])


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


def script(name: str) -> Iterator[ModuleType]:
    """A script of docs/, as the fixture of its name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "docs"))
        yield importlib.import_module(name)


@pytest.fixture(scope="module")
def figures() -> Iterator[ModuleType]:
    yield from script("figures")


@pytest.fixture(scope="module")
def reference() -> Iterator[ModuleType]:
    yield from script("reference")


def test_every_table_of_figures_is_the_committed_results(
    figures: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And a figure that was edited by hand, a table that does not exist, and a result without its row are seen."""
    assert figures.main(["--check"]) == 0, capsys.readouterr().out
    shown = {name for page in PAGES for _, name, _ in figures.MARKED.findall(page.read_text())}
    assert shown == set(figures.TABLES)
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    page = tmp_path / "README.md"
    monkeypatch.setattr(figures, "PAGES", [page])
    page.write_text(re.sub(r"\b0\.000\b", "0.999", README))
    assert figures.main(["--check"]) == 1
    assert "README.md: stale: run python docs/figures.py" in capsys.readouterr().out
    assert figures.main([]) == 0
    assert page.read_text() == README
    page.write_text("<!-- figures: speed -->\n<!-- end -->")
    with pytest.raises(LookupError, match="there is no table 'speed'"):
        figures.main([])
    with pytest.raises(LookupError, match=r"results/zoo.md has no table that begins with 'animal'"):
        figures.rows_of("zoo", "animal")
    with pytest.raises(LookupError, match="0 rows with"):
        figures.row_of([{"swap": "naive"}], swap="other")


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

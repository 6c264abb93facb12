"""What users get: wheel and sdist are built, looked into, installed in a fresh environment, and used from elsewhere.

    .venv/bin/python .ci/package.py

The new environment borrows the dependencies of this one (a .pth file with its path), so nothing is downloaded; gnswap
itself comes from the wheel, which is built from the sdist.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent

NETS = """
from torch import nn

def small():
    return nn.Sequential(nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16), nn.ReLU()).eval()
"""

USE = """
import pathlib, sys, torch, gnswap
assert pathlib.Path(sys.prefix) in pathlib.Path(gnswap.__file__).parents, gnswap.__file__
network = gnswap.load("out", __import__("nets").small())
assert network(torch.randn(1, 3, 4, 4)).shape == (1, 16, 4, 4)
print(gnswap.__version__)
"""

TYPED = """
from typing import assert_type

import torch
from torch import nn

import gnswap

model: nn.Module = nn.Sequential(nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16))
conversion = gnswap.convert(model, groups=4, softness=0.5)
assert_type(conversion, gnswap.Conversion)
assert_type(conversion.plan, gnswap.Plan)
plan: gnswap.Plan = gnswap.plan(model, groups="auto", exclude=["head.*"])
network: nn.Module = gnswap.apply(model, plan)
fidelity: gnswap.Fidelity = gnswap.compare(model, network, [torch.zeros(1, 3, 4, 4)])
agreement: float | None = fidelity.agreement
gnswap.save(conversion, "out")
"""
WRONG = 'gnswap.plan(model, groups="many")\n'


def run(*words: str | Path, cwd: Path, fails: bool = False) -> str:
    """The output of a command that has to work, or with `fails` has to fail."""
    environment = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "VIRTUAL_ENV"}}
    done = subprocess.run([*map(str, words)], cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    if bool(done.returncode) != fails:
        sys.exit(f"{' '.join(map(str, words))}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def require(what: str, expected: object, found: object) -> None:
    if expected != found:
        sys.exit(f"{what}: expected {expected}, found {found}")


def build(out: Path) -> tuple[Path, Path]:
    """The sdist, and the wheel that is built from it."""
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT, cwd=out)
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


def look_into(sdist: Path, wheel: Path) -> None:
    """Everything of the package and nothing else: C++ sources, page templates, py.typed; no tests in the wheel."""
    tracked = set(run("git", "ls-files", cwd=ROOT).split())
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if ".dist-info/" not in name}
    require("the wheel's files", sorted(name for name in tracked if name.startswith("gnswap/")), sorted(inside))
    kinds = {Path(name).suffix or name for name in inside}
    require("kinds of files in the wheel", set(), {".py", ".cpp", ".j2", ".css", ".js", ".typed"} - kinds)
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {"README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "pyproject.toml", "tests/test_docs.py"}
    require("missing from the sdist", set(), (wanted | inside) - names)


def fresh_environment(folder: Path, wheel: Path) -> Path:
    """Its `bin`, with the wheel installed."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    python = folder / "bin" / "python"
    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        wheel,
        cwd=folder,
    )
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name).resolve()
        sdist, wheel = build(scratch)
        look_into(sdist, wheel)
        programs = fresh_environment(scratch / "env", wheel)
        away = scratch / "away"
        away.mkdir()
        (away / "nets.py").write_text(NETS)
        version = run(programs / "gnswap", "--version", cwd=away)
        require("python -m gnswap --version", version, run(programs / "python", "-m", "gnswap", "--version", cwd=away))
        require("the wheel's version", version.split()[1], wheel.name.split("-")[1])
        run(programs / "gnswap", "convert", "nets:small", "-o", "out", cwd=away)
        require("gnswap.__version__", version.split()[1], run(programs / "python", "-c", USE, cwd=away).strip())

        checker = (sys.executable, "-m", "mypy", "--strict", "--python-executable", programs / "python")
        (away / "typed.py").write_text(TYPED)
        run(*checker, "typed.py", cwd=away)
        (away / "wrong.py").write_text(TYPED + WRONG)
        found = run(*checker, "wrong.py", cwd=away, fails=True)
        if 'incompatible type "Literal' not in found or "Found 1 error" not in found:
            sys.exit(f"a wrong argument is not seen from the outside:\n{found}")
        print(f"{sdist.name}, {wheel.name}: built, installed, used and type-checked from elsewhere")


if __name__ == "__main__":
    main()

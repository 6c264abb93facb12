"""The API reference, made from the docstrings with pdoc, offline; fails where something is missing or leads nowhere.

    python docs/reference.py --out build/reference

Why pdoc: one package without configuration files, which follows `__all__` and reads Google-style docstrings. What it
does not do is complain, so the complaints are here.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any

import gnswap

NAMED = re.compile(r"^(\*{0,2}\w+(?:, ?\*{0,2}\w+)*)(?: \(.*\))?:", re.MULTILINE)
LINK = re.compile(r"(?<!`)`((?:\w+\.)*\w+)(?:\(\))?`(?!`)")


def section(doc: str, title: str) -> str:
    """What a docstring has under a heading such as "Args", dedented; empty where there is no such heading."""
    found = re.search(rf"^{title}:\n((?:[ ]{{4}}.*\n?|\n)+)", doc, flags=re.MULTILINE)
    return "" if found is None else inspect.cleandoc(found[1])


def named_in(text: str) -> set[str]:
    """The arguments that a section explains: "a, b: what they are" explains both."""
    return {name.strip(" *") for names in NAMED.findall(text) for name in names.split(",")}


def public(module: ModuleType) -> Iterator[tuple[str, Any]]:
    """Every public name of a module and, for modules among them, of those too."""
    for name in module.__all__:
        value = getattr(module, name)
        yield f"{module.__name__}.{name}", value
        if isinstance(value, ModuleType):
            yield from public(value)


def faults_of(name: str, value: Any) -> list[str]:
    """What is missing from one public name's docstring."""
    if not (inspect.isfunction(value) or inspect.isclass(value) or isinstance(value, ModuleType)):
        return []  # constants are explained where they are defined
    doc = inspect.getdoc(value) or ""
    inherited = inspect.isclass(value) and not value.__dict__.get("__doc__")
    if (
        not doc or inherited or doc.startswith(f"{getattr(value, '__name__', '')}(")
    ):  # what dataclasses write themselves
        return [f"{name}: no docstring"]
    faults = []
    sections = section(doc, "Args") + "\n" + section(doc, "Attributes")
    explained = named_in(sections) | set(LINK.findall(sections))  # "affine: has gamma; `bias` whether it has beta"
    if dataclasses.is_dataclass(value):
        wanted = [field.name for field in dataclasses.fields(value) if not field.name.startswith("_")]
    elif inspect.isfunction(value) or (inspect.isclass(value) and "__init__" in value.__dict__):
        wanted = [
            one for one in inspect.signature(value).parameters if one not in {"device", "dtype"} or one in explained
        ]
    else:
        wanted = []
    faults += [f"{name}: {one} is not explained" for one in wanted if one not in explained]
    if inspect.isfunction(value):
        wanted = ["Example"] if value.__module__.startswith("gnswap.ops") else ["Raises", "Example"]
        faults += [f"{name}: no {title}" for title in wanted if not section(doc, title)]
    if inspect.isclass(value):
        for member, method in vars(value).items():
            if not member.startswith("_") and (inspect.isfunction(method) or isinstance(method, property)):
                faults += [] if inspect.getdoc(method) else [f"{name}.{member}: no docstring"]
    return faults + [f"{name}: `{link}` leads nowhere" for link in LINK.findall(doc) if not resolves(link)]


def resolves(link: str) -> bool:
    """Whether a name in backticks is there, where it says that it is ours: `gnswap.plan`, `Plan.to_json`."""
    parts = link.removeprefix("gnswap.").split(".")
    if link.startswith("gnswap."):
        place: Any = gnswap
    elif len(parts) > 1 and parts[0] in gnswap.__all__ and parts[0][0].isupper():
        place = gnswap
    else:
        return True
    for part in parts:
        fields = getattr(place, "__dataclass_fields__", {}) if inspect.isclass(place) else {}
        annotated = getattr(place, "__annotations__", {}) if inspect.isclass(place) else {}
        if not hasattr(place, part):
            return part in fields or part in annotated
        place = getattr(place, part)
    return True


class Page(HTMLParser):
    """Collects what a page names and where its links go."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.ids.add(found.get("id") or "")
        if tag == "a":
            self.links.add(found.get("href") or "")


def faults_in(folder: Path) -> list[str]:
    """Missing entries and dead links of the pages."""
    pages = {path.relative_to(folder).as_posix(): Page(path.read_text()) for path in folder.rglob("*.html")}
    faults = []
    for module, page in ((gnswap, "gnswap.html"), (gnswap.ops, "gnswap/ops.html")):
        faults += [
            f"{page} has no entry for {name}" for name in module.__all__ if name not in pages[page].ids | {"ops"}
        ]
    for name, page in pages.items():
        for link in page.links:
            target, _, anchor = link.partition("#")
            if "://" in link:
                continue
            there = (folder / name).parent.joinpath(target).resolve() if target else (folder / name).resolve()
            other = pages.get(there.relative_to(folder.resolve()).as_posix()) if there.suffix == ".html" else None
            if other is None or (anchor and anchor not in other.ids):
                faults.append(f"{name}: the link {link} leads nowhere")
    return faults


def build(folder: Path) -> None:
    """Write the pages."""
    import pdoc.render

    pdoc.render.configure(docformat="google", show_source=False, footer_text=f"gnswap {gnswap.__version__}")
    pdoc.pdoc("gnswap", output_directory=folder)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("build/reference"), help="a folder (build/reference)")
    folder = parser.parse_args(arguments).out
    build(folder)
    faults = [fault for name, value in public(gnswap) for fault in faults_of(name, value)] + faults_in(folder)
    print("\n".join(faults) or f"{folder / 'index.html'}: {len(gnswap.__all__)} names, nothing missing")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())

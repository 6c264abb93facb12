"""The records as tables for a terminal. What is printed here is also in the records: `--json` loses nothing."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from gnswap._fidelity import Fidelity
from gnswap._record import Record
from gnswap._records import Inventory, Plan


def inventory_view(inventory: Inventory) -> RenderableType:
    """Every norm of a model, what it is, and why it cannot be swapped where that is so."""
    table = _table("layer", "type", ">C", ">eps", "affine", "statistics", "fused", "swappable")
    for site in inventory.sites:
        fused = ", ".join(name.rpartition(".")[2] for name in (site.act, site.drop) if name) or "-"
        affine = ("gamma, beta" if site.bias else "gamma") if site.affine else "no"
        table.add_row(
            _names(site.paths),
            _short(site.norm_type),
            str(site.num_channels),
            f"{site.eps:g}",
            affine + (", frozen" if site.frozen and site.affine else ""),
            "running" if site.running_stats else "batch",
            fused,
            "yes" if site.refusal is None else f"[red]no:[/] {escape(site.refusal)}",
        )
    kinds = ", ".join(f"{n} {kind}" for kind, n in Counter(_short(s.norm_type) for s in inventory.sites).most_common())
    lines = [
        f"[bold]{escape(inventory.model)}[/]: {len(inventory.sites)} norm layers "
        f"({kinds or 'no BatchNorm of any kind'}), {len(inventory.swappable)} can be swapped."
    ]
    if inventory.left_alone:
        lines.append(f"Left alone: {escape(_some(inventory.left_alone))}.")
    lines += [f"[yellow]note:[/] {escape(note)}" for note in inventory.notes]
    return Group(*([table] if inventory.sites else []), *lines)


def plan_view(plan: Plan) -> RenderableType:
    """Every decision of a plan; the reasons below, since most layers share one and a column of them is unreadable."""
    table = _table("layer", "type", ">C", "action", ">G", ">D", ">softness", ">why")
    reasons = Counter(decision.reason for decision in plan.decisions)
    numbers = {reason: str(number) for number, reason in enumerate(reasons, 1)}
    for decision in plan.decisions:
        swap = decision.action == "swap"
        table.add_row(
            _names(decision.paths),
            _short(decision.norm_type),
            str(decision.num_channels),
            "swap" if swap else "[yellow]keep[/]",
            str(decision.num_groups) if swap else "-",
            str(decision.group_size) if swap else "-",
            f"{decision.softness:g}" if swap else "-",
            numbers[decision.reason],
        )
    legend = Table.grid(padding=(0, 2, 0, 0))
    for reason, count in reasons.items():
        legend.add_row(f"why {numbers[reason]}", f"{escape(reason)} [dim]({count}x)[/]")
    notes = [f"[yellow]note:[/] {escape(note)}" for note in plan.notes]
    return Group(table, legend, f"{len(plan.swaps)} of {len(plan.decisions)} norm layers swapped.", *notes)


def fidelity_view(fidelity: Fidelity, *, worst: int = 8) -> RenderableType:
    """How far the converted network's answers are from the original's, and where it comes from."""
    table = _table("converted against original", f">on {fidelity.photos} photos")
    for name, value in fidelity_rows(fidelity):
        table.add_row(name, value)
    if not fidelity.layers:
        return table
    layers = _table(f"{min(worst, len(fidelity.layers))} layers furthest off", ">relative error", ">gain")
    for layer in sorted(fidelity.layers, key=lambda layer: -layer.relative_error)[:worst]:
        layers.add_row(escape(layer.name), f"{layer.relative_error:.3f}", f"{layer.gain:.3f}")
    return Group(table, layers)


def fidelity_rows(fidelity: Fidelity) -> list[tuple[str, str]]:
    """The figures of a comparison in words; those that could not be measured are left out."""
    rows = [
        ("same top-1 answer", _share(fidelity.agreement)),
        (f"same, where the original is sure (over 50 %, {fidelity.sure} photos)", _share(fidelity.agreement_sure)),
        ("KL(original, converted) in nats", None if fidelity.kl is None else f"{fidelity.kl:.4f}"),
        ("relative error of the outputs", f"{fidelity.logit_error:.4f}"),
        ("accuracy of the original", _share(fidelity.accuracy_original)),
        ("accuracy of the converted", _share(fidelity.accuracy_converted)),
    ]
    return [(name, value) for name, value in rows if value is not None]


def record_view(record: Record, title: str) -> RenderableType:
    """Any report: its plain fields as rows, its lists of records as tables below."""
    table = _table(title, "")
    below: list[RenderableType] = []
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        if isinstance(value, tuple) and value and isinstance(value[0], Record):
            below.append(_records_table(field.name, value))
        elif value not in (None, (), {}, ""):
            table.add_row(field.name.replace("_", " "), escape(_shown(value)))
    return Group(table, *below)


def _records_table(name: str, records: tuple[Record, ...]) -> Table:
    fields = [field.name for field in dataclasses.fields(records[0])]
    table = _table(*(field.replace("_", " ") for field in fields))
    table.title, table.title_justify = name.replace("_", " "), "left"
    for record in records:
        table.add_row(*(escape(_shown(getattr(record, field))) for field in fields))
    return table


def comparison_view(title: str, columns: Iterable[str], rows: Iterable[tuple[str, ...]]) -> RenderableType:
    """Methods side by side: the first column their names, the others figures."""
    table = _table(title, *(f">{column}" for column in columns))
    for row in rows:
        table.add_row(*row)
    return table


def _table(*columns: str) -> Table:
    """A table; a column whose name starts with ">" holds numbers."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(
            column.removeprefix(">"), justify="right" if column.startswith(">") else "left", overflow="fold"
        )
    return table


def _names(paths: tuple[str, ...]) -> str:
    first = escape(paths[0] or "(root)")
    return first if len(paths) == 1 else f"{first} [dim](also {escape(', '.join(paths[1:]))})[/]"


def _short(kind: str) -> str:
    return kind.rpartition(".")[2]


def _some(items: tuple[str, ...], limit: int = 6) -> str:
    return ", ".join(items[:limit]) + (f" and {len(items) - limit} more" if len(items) > limit else "")


def _share(value: float | None) -> str | None:
    return None if value is None else f"{value:.3f}"


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_shown(item)}" for key, item in value.items())
    if isinstance(value, tuple | list):
        return ", ".join(map(_shown, value))
    return str(value)

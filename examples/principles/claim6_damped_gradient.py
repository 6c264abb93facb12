r"""Claim 6. The gradient through a group scales as 1/sqrt(v + eps).

It is damped as the variance v of the group grows, and bounded by 1/sqrt(eps) as v goes to 0.

With n = D * S values in the group and u = (x - m) / sqrt(v + eps), whose length is that of n rho, rho = v / (v + eps):

    dy/dx = (I - 1 1'/n - u u'/n) / sqrt(v + eps)
    |dy/dx|_F^2 = (n - 2 + (1 - rho)^2) / (v + eps),   |dy/dx|_2 = 1/sqrt(v + eps)

since the matrix in brackets is 0 along 1, 1 - rho along u, and 1 in the other n - 2 directions.

    python examples/principles/claim6_damped_gradient.py
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import _common
import torch

import gnswap

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZE = (6.4, 4.0)
EPS, CHANNELS, POSITIONS = 1e-5, 4, 9
VALUES = CHANNELS * POSITIONS


class Row(NamedTuple):
    """The Jacobian at one variance: measured by autograd in fp64 and fp32, and the closed form."""

    variance: float
    frobenius: float
    frobenius_fp32: float
    spectral: float
    closed_frobenius: float
    closed_spectral: float


def closed_form(variance: float) -> tuple[float, float]:
    """Frobenius and spectral norm of the Jacobian."""
    rho = variance / (variance + EPS)
    return math.sqrt((VALUES - 2 + (1 - rho) ** 2) / (variance + EPS)), 1 / math.sqrt(variance + EPS)


def measure(smoke: bool) -> list[Row]:
    layer = gnswap.FusedGroupNorm(1, CHANNELS, EPS).double()
    unit = torch.randn(1, CHANNELS, 3, 3, dtype=torch.float64)
    unit = (unit - unit.mean()) / unit.std(correction=0)
    rows = []
    for exponent in range(-9, 4, 4 if smoke else 1):
        x = unit * 10 ** (exponent / 2)
        exact, single = (
            torch.autograd.functional.jacobian(norm, value).view(VALUES, VALUES)
            for norm, value in ((layer.double(), x), (layer.float(), x.float()))
        )
        variance = float(x.var(correction=0))
        norms = [float(torch.linalg.matrix_norm(exact, kind)) for kind in ("fro", 2)]
        rows.append(Row(variance, norms[0], float(single.norm()), norms[1], *closed_form(variance)))
        layer.double()
    return rows


def table(rows: list[Row]) -> _common.Table:
    columns = (
        "Frobenius, measured",
        "closed form",
        "off by",
        "in fp32 off by",
        "spectral, measured",
        "closed form",
        "off by",
    )
    body = [
        (
            f"{row.variance:.0e}",
            f"{row.frobenius:.6g}",
            f"{row.closed_frobenius:.6g}",
            f"{abs(row.frobenius / row.closed_frobenius - 1):.0e}",
            f"{abs(row.frobenius_fp32 / row.closed_frobenius - 1):.0e}",
            f"{row.spectral:.6g}",
            f"{row.closed_spectral:.6g}",
            f"{abs(row.spectral / row.closed_spectral - 1):.0e}",
        )
        for row in rows
    ]
    return _common.Table("variance of the group", columns, body)


def draw(rows: list[Row], figure: Figure) -> None:
    axes = figure.subplots()
    exponents = [rows[0].variance * (rows[-1].variance / rows[0].variance) ** (i / 200) for i in range(201)]
    curve = [closed_form(variance) for variance in exponents]
    for place, name, colour in ((0, "Frobenius", _common.GNSWAP), (1, "spectral", _common.OTHER)):
        axes.plot(exponents, [norms[place] for norms in curve], "-", color=colour, label=f"{name} norm, formula")
    x = [row.variance for row in rows]
    axes.plot(x, [row.frobenius for row in rows], "o", color=_common.GNSWAP, mfc="white", label="Frobenius norm, fp64")
    axes.plot(x, [row.frobenius_fp32 for row in rows], "x", color=_common.BLACK, label="Frobenius norm, fp32")
    axes.plot(x, [row.spectral for row in rows], "s", color=_common.OTHER, mfc="white", label="spectral norm, fp64")
    axes.axhline(
        1 / math.sqrt(EPS), color=_common.YELLOW, linestyle="--", linewidth=1, label="its bound $1/\\sqrt{\\epsilon}$"
    )
    axes.axvline(EPS, color=_common.BLACK, linestyle=":", linewidth=1)
    axes.text(EPS * 1.3, min(row.spectral for row in rows), "$v = \\epsilon$")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("variance of the group, units of x squared")
    axes.set_ylabel("norm of the Jacobian dy/dx, 1/unit of x")
    _common.legend(figure, axes, 3)


def check(rows: list[Row]) -> None:
    assert rows[-1].variance / rows[0].variance > 0.99e12, "fewer than 12 decades of variance"
    for row in rows:
        for name, measured, closed, within in (
            ("Frobenius norm", row.frobenius, row.closed_frobenius, 1e-9),
            ("Frobenius norm in fp32", row.frobenius_fp32, row.closed_frobenius, 1e-4),
            ("spectral norm", row.spectral, row.closed_spectral, 1e-9),
        ):
            assert abs(measured / closed - 1) < within, f"{name} at v = {row.variance:.0e}: {measured} for {closed}"
        assert row.spectral <= 1 / math.sqrt(EPS), f"above the bound at v = {row.variance:.0e}"


if __name__ == "__main__":
    _common.run(__name__)

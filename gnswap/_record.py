"""Plain-data records with an exact JSON form.

Why not pydantic: records hold only str, int, float, bool, None, tuples, string-keyed dicts and other
records, and a reader that rejects everything else fits on one page and keeps the import light.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import types
import typing
from typing import Any, Self

from gnswap._errors import PlanError


@dataclasses.dataclass(frozen=True)
class Record:
    """Base of all records: frozen, compared by value, exact through JSON.

    Example:
        >>> @dataclasses.dataclass(frozen=True)
        ... class Point(Record):
        ...     x: float
        ...     name: str | None = None
        >>> Point.from_json(Point(0.1).to_json()) == Point(0.1)
        True
    """

    def to_dict(self) -> dict[str, Any]:
        """The record as dicts, lists and scalars that `json` can write."""
        return {field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)}

    def to_json(self, *, indent: int | None = 2) -> str:
        """The record as JSON text; floats are written so that they read back bit for bit."""
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False)

    @classmethod
    def from_dict(cls, data: object) -> Self:
        """Read a record; unknown keys, missing keys and wrong types raise `PlanError` with their place."""
        record = _parse(cls, data, cls.__name__)
        assert isinstance(record, cls)
        return record

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read a record from JSON text. Raises `PlanError` where the text is not that record."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise PlanError(
                "not JSON",
                where=f"{cls.__name__}, line {error.lineno}",
                found=error.msg,
                fix="The file may be cut off; write it again.",
            ) from error
        return cls.from_dict(data)


def on_few_lines(text: str) -> str:
    """JSON text with every list of numbers on one line: a channel order with a number a line is not readable."""
    return re.sub(
        r"\[\n[-\d,.e+\s]+\]", lambda found: re.sub(r",\s+", ", ", re.sub(r"\s*([\[\]])\s*", r"\1", found[0])), text
    )


def _plain(value: Any) -> Any:
    if isinstance(value, Record):
        return value.to_dict()
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": repr(value)}  # JSON has no inf and nan; a report may have measured one
    return value


def _parse(kind: Any, value: Any, where: str) -> Any:
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        return _parse_union(kind, value, where)
    if origin is typing.Literal:
        return value if value in typing.get_args(kind) else _refuse(where, kind, value)
    if origin is tuple:
        item_kind = typing.get_args(kind)[0]
        if not isinstance(value, list | tuple):
            _refuse(where, kind, value)
        return tuple(_parse(item_kind, item, f"{where}[{index}]") for index, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            _refuse(where, kind, value)
        item_kind = typing.get_args(kind)[1]
        return {key: _parse(item_kind, item, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(kind, type) and issubclass(kind, Record):
        return _parse_record(kind, value, where)
    return _parse_scalar(kind, value, where)


def _parse_union(kind: Any, value: Any, where: str) -> Any:
    for choice in typing.get_args(kind):
        try:
            return _parse(choice, value, where)
        except PlanError:
            continue
    return _refuse(where, kind, value)


def _parse_record(kind: type[Record], value: Any, where: str) -> Record:
    if not isinstance(value, dict):
        _refuse(where, kind, value)
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    if unknown := sorted(set(value) - set(fields)):
        raise PlanError(
            "unknown key",
            where=where,
            expected=f"only {', '.join(fields)}",
            found=", ".join(map(str, unknown)),
            fix="It was written by another version of gnswap, or edited: remove the key.",
        )
    missing = [
        name
        for name, field in fields.items()
        if name not in value and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise PlanError("missing key", where=where, expected=", ".join(missing), found=", ".join(value))
    return kind(**{name: _parse(hints[name], item, f"{where}.{name}") for name, item in value.items()})


def _parse_scalar(kind: Any, value: Any, where: str) -> Any:
    if kind is Any:
        return value
    if kind is types.NoneType:
        return None if value is None else _refuse(where, "null", value)
    if kind is float:
        if isinstance(value, dict) and set(value) == {"float"}:
            return float(value["float"])
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        _refuse(where, kind, value)
    # bool is an int to Python, but `"num_groups": true` is a mistake
    if kind is int and isinstance(value, bool):
        _refuse(where, kind, value)
    return value if isinstance(value, kind) else _refuse(where, kind, value)


def _refuse(where: str, kind: Any, value: Any) -> typing.NoReturn:
    name = kind.__name__ if isinstance(kind, type) else str(kind)
    raise PlanError("wrong type of value", where=where, expected=name, found=f"{value!r:.80}")


def differences(then: Record, now: Record) -> list[str]:
    """What two records of one kind do not agree on, in words."""
    before, after = then.to_dict(), now.to_dict()
    return [f"{key} {before[key]} there and {after[key]} here" for key in after if before[key] != after[key]]

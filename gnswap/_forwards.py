"""What a module's forward does with norms beyond calling them, as far as its source tells.

Two things escape a swap of modules: a functional `batch_norm` call, and a forward that reads the running
statistics of a child (quantisation-aware ConvBn does). Source is read, never run; where there is none, the names in
the byte code tell whether there was something to look for.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any
from weakref import WeakKeyDictionary

_FUNCTIONS = frozenset({"batch_norm", "native_batch_norm"})
_STATISTICS = frozenset({"running_mean", "running_var"})


@dataclasses.dataclass(frozen=True)
class Forward:
    """What stands in the forward of a class and in the methods and functions that it uses.

    Attributes:
        on_activations: a functional batch_norm call on something that is no weight.
        on_weights: such a call on a weight (weight standardisation).
        unclear: batch_norm is mentioned, but the source cannot be had.
        reads: names of children whose running statistics are read.
    """

    on_activations: bool = False
    on_weights: bool = False
    unclear: bool = False
    reads: frozenset[str] = frozenset()


_READ: WeakKeyDictionary[type, Forward] = WeakKeyDictionary()


def read_forward(kind: type) -> Forward:
    """Look through the forward of a module class; classes of torch.nn are known and not looked at."""
    if kind.__module__.startswith("torch.nn."):
        return Forward()
    if kind not in _READ:
        found = [_read_function(function) for function in _used_functions(kind)]
        _READ[kind] = Forward(
            on_activations=any(one.on_activations for one in found),
            on_weights=any(one.on_weights for one in found),
            unclear=any(one.unclear for one in found),
            reads=frozenset().union(*(one.reads for one in found)),
        )
    return _READ[kind]


def _used_functions(kind: type) -> Iterator[FunctionType]:
    """The forward, and what it names among the methods of the class and the functions around it."""
    waiting: list[Any] = [getattr(kind, "forward", None)]
    seen: set[FunctionType] = set()
    while waiting:
        function = waiting.pop()
        function = inspect.unwrap(function) if callable(function) else function
        if not isinstance(function, FunctionType) or function in seen:
            continue
        home = function.__module__ or ""
        if home == "torch" or (home.startswith("torch.") and not home.startswith("torch.ao.")):
            continue
        seen.add(function)
        yield function
        for name in _names(function.__code__):
            waiting += [inspect.getattr_static(kind, name, None), function.__globals__.get(name)]


def _names(code: CodeType) -> set[str]:
    """Every global and attribute that a function names, in nested functions and comprehensions as well."""
    return set(code.co_names).union(*(_names(const) for const in code.co_consts if isinstance(const, CodeType)))


def _read_function(function: FunctionType) -> Forward:
    names = _names(function.__code__)
    if not names & (_FUNCTIONS | _STATISTICS):
        return Forward()
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return Forward(unclear=bool(names & _FUNCTIONS))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and _is_batch_norm(node.func)]
    on_weights = [bool(call.args) and "weight" in ast.unparse(call.args[0]) for call in calls]
    reads = {name for node in ast.walk(tree) if (name := _child_whose_statistics(node)) is not None}
    return Forward(not all(on_weights), any(on_weights), reads=frozenset(reads))


def _is_batch_norm(function: ast.expr) -> bool:
    """`F.batch_norm`, `batch_norm`, `torch.ops.aten.batch_norm.default`; not `self.batch_norm`, which is a child."""
    first, *others = ast.unparse(function).split(".")
    return first in _FUNCTIONS or (first != "self" and not _FUNCTIONS.isdisjoint(others))


def _child_whose_statistics(node: ast.AST) -> str | None:
    """`bn` where the node is `self.bn.running_mean`."""
    if (
        isinstance(node, ast.Attribute)
        and node.attr in _STATISTICS
        and isinstance(node.value, ast.Attribute)
        and isinstance(node.value.value, ast.Name)
        and node.value.value.id == "self"
    ):
        return node.value.attr
    return None

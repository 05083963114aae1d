"""Evaluate a saved ML Program with numpy: op after op, each held to the type and shape that it declares."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from mmd_runtime.mil import arithmetic, layers, layout
from mmd_runtime.mil.arithmetic import Array, Rule
from mmd_runtime.mil.blobs import BITS, NUMPY
from mmd_runtime.mil.program import Op, Program, Ref, Type
from mmd_runtime.mil.wire import MalformedError

RULES: dict[str, Rule] = {**arithmetic.RULES, **layout.RULES, **layers.RULES}


class UnknownOpError(ValueError):
    """An op without a rule."""


class Evaluator:
    """The program with its weights as arrays; ``run`` computes any of its values."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.constants: dict[str, Any] = {}
        self.types: dict[str, Type] = dict(program.inputs)
        self.producer: dict[str, int] = {}
        for index, op in enumerate(program.ops):
            if op.kind != "const" and op.kind not in RULES:
                raise UnknownOpError(f"op {op.name!r} is {op.kind!r}")
            for name, declared in op.outputs:
                self.types[name], self.producer[name] = declared, index
            if op.kind == "const" or op.kind.startswith("constexpr_"):
                self.constants[op.outputs[0][0]] = self._constant(op)

    def run(self, feeds: Mapping[str, Array], goals: Iterable[str]) -> dict[str, Array]:
        """``goals`` from ``feeds``: inputs, or values in between, which then are not computed."""
        wanted = list(goals)
        indices = self._needed(wanted, feeds)
        last = {name: index for index in indices for name in _read(self.program.ops[index])}
        values: dict[str, Any] = dict(feeds)
        for index in indices:
            op = self.program.ops[index]
            for (name, declared), result in zip(op.outputs, self._results(op, values), strict=True):
                values[name] = _checked(op, name, declared, result)
            for name in _read(op):
                if last[name] == index and name not in wanted:
                    values.pop(name, None)
        return {name: values[name] for name in wanted}

    def _results(self, op: Op, values: Mapping[str, Any]) -> tuple[Any, ...]:
        results = self._apply(op, values)
        found = results if isinstance(results, tuple) else (results,)
        if len(found) != len(op.outputs):
            raise MalformedError(f"op {op.name!r} ({op.kind}) gives {len(found)} values, it declares {len(op.outputs)}")
        return found

    def _apply(self, op: Op, values: Mapping[str, Any]) -> Any:
        try:
            args = {name: self._argument(name, bound, values) for name, bound in op.inputs.items()}
            return RULES[op.kind]({**args, **op.attributes})
        except (ValueError, IndexError, KeyError) as error:  # what numpy says of shapes that do not fit
            reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
            raise MalformedError(f"op {op.name!r} ({op.kind}) cannot be computed: {reason}") from error

    def _argument(self, name: str, bound: tuple[Any, ...], values: Mapping[str, Any]) -> Any:
        found = [self._value(each, values) for each in bound]
        return found if name == "values" or len(found) != 1 else found[0]

    def _value(self, bound: Any, values: Mapping[str, Any]) -> Any:
        if not isinstance(bound, Ref):
            return bound
        return self.constants[bound.name] if bound.name in self.constants else values[bound.name]

    def _constant(self, op: Op) -> Any:
        if op.kind == "const":
            value = op.attributes.get("val")
            if value is None:
                raise MalformedError(f"const {op.name!r} has no value")
            return value if isinstance(value, str) else _checked(op, *op.outputs[0], value)
        return _checked(op, *op.outputs[0], self._apply(op, {}))

    def _needed(self, goals: list[str], feeds: Mapping[str, Array]) -> list[int]:
        """Indices of the ops between ``feeds`` and ``goals``, in order."""
        needed: set[int] = set()
        pending = [name for name in goals if name not in feeds]
        seen = set(pending)
        while pending:
            name = pending.pop()
            if name not in self.producer:
                raise MalformedError(f"value {name!r} is given by no op and no input")
            needed.add(self.producer[name])
            fresh = {each for each in _read(self.program.ops[self.producer[name]]) if each not in self.constants}
            fresh -= seen
            fresh -= feeds.keys()
            seen |= fresh
            pending.extend(fresh)
        return sorted(needed)


def _read(op: Op) -> list[str]:
    return [each.name for bound in op.inputs.values() for each in bound if isinstance(each, Ref)]


def _checked(op: Op, name: str, declared: Type, result: Any) -> Array:
    """``result``, if it is what the op says of it."""
    array = np.asarray(result)
    small = {"int4": "i1"} | dict.fromkeys(BITS.keys() - {"int4"}, "u1")
    wanted = np.dtype(NUMPY.get(declared.dtype) or small[declared.dtype])
    if array.dtype != wanted or array.shape != declared.shape:
        raise MalformedError(
            f"op {op.name!r} ({op.kind}) gives {name!r} as {array.dtype} {array.shape}, it declares {declared}"
        )
    return array

"""Settings as they are written on the command line, and what is wrong with one in the words of a user."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

_FLAGS = {"model": "MODEL", "learning_rate": "--lr", "plan_learning_rate": "--plan-lr"}
KEYS_ONLY = ("rate_decay", "ema_decay", "clip_gradient", "evaluate_every", "evaluate_count", "patience")
_BOUNDS = {
    "greater_than": ("gt", "it must be above {}"),
    "greater_than_equal": ("ge", "it must be at least {}"),
    "less_than": ("lt", "it must be below {}"),
    "less_than_equal": ("le", "it must be at most {}"),
    "literal_error": ("expected", "choose {}"),
    "too_short": ("min_length", "name at least {}"),
}
_KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "string": "text", "tuple": "a list"}


def flag_of(name: str) -> str:
    """The option that sets the field ``name``; a field without one is a key of the --config file."""
    return name if name in KEYS_ONLY else _FLAGS.get(name, "--" + name.replace("_", "-"))


def first_problem(
    error: ValidationError, known: Collection[str], given: Mapping[str, Any], config: Path | None = None
) -> str:
    """One line: the option, its value, what is allowed; a key where it stands in ``config`` and is not ``given``."""
    problem = error.errors()[0]
    name = str(problem["loc"][0]) if problem["loc"] else ""
    in_file = config is not None and given.get(name) is None
    source = f"finetune settings ({config}): " if in_file else ""
    shown = name if in_file else flag_of(name)
    if problem["type"] == "extra_forbidden":
        return f"{source or 'finetune settings: '}{name!r} is unknown; known: {', '.join(known)}"
    if problem["type"] == "missing":
        return f"{source}{flag_of(name)} is missing; {_wanted(name)}"
    reason = _reason(problem["type"], problem.get("ctx", {}), problem["msg"])
    return f"{source}{shown} is {_value(problem['input'])}{reason}" if name else f"{source}{reason.lstrip(':; ')}"


def _reason(kind: str, context: Mapping[str, Any], message: str) -> str:
    """What is allowed, behind the value."""
    if kind in _BOUNDS:
        key, text = _BOUNDS[kind]
        return f"; {text.format(_value(context[key]) if kind != 'literal_error' else context[key])}"
    expected, _, what = kind.partition("_")
    if expected in _KINDS and what in ("parsing", "type", "from_float"):
        return f"; {_KINDS[expected]} is expected"
    if kind == "value_error":
        return f": {message.removeprefix('Value error, ')}"
    return f": {message[0].lower()}{message[1:]}"


def _wanted(name: str) -> str:
    return {
        "out": "name the run folder to make",
        "model": "name the model to tune, such as digits",
    }.get(name, "give it")


def _value(value: Any) -> str:
    """Numbers as a person types them."""
    if isinstance(value, float):
        return f"{value:g}"
    return ",".join(map(str, value)) or "empty" if isinstance(value, tuple | list) else repr(value)

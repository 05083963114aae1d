"""Reference tables that come from the code itself: commands, manifest, what CI requires, and the result files."""

from __future__ import annotations

import importlib
import json
import pkgutil
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks.precision_tables import Table

ROOT = Path(__file__).parents[1]
SCHEMA = ROOT / "docs" / "manifest.schema.json"
CI = ROOT / ".ci" / "run"
RESULTS = ROOT / "benchmarks" / "results"
REQUIRED = re.compile(r'MMD_EXPORT_REQUIRED_(TARGET|RUNTIME|KIT)S="([^"]*)"')


def commands() -> str:
    """Every command with its arguments and options, as ``typer`` documents them."""
    import typer
    from typer.cli import get_docs_for_click

    from mmd_export.cli import app

    command = typer.main.get_command(app)
    text = get_docs_for_click(obj=command, ctx=typer.Context(command), name="mmd-export")
    _, _, rest = text.partition("**Commands**:")
    rest = rest[rest.index("## ") :].replace("&#x27;", "'").replace("&quot;", '"').replace(r"\[", "[")
    rest = re.sub(r"^\* `--help`: .*\n", "", rest, flags=re.MULTILINE)
    rest = re.sub(r"\*\*Usage\*\*:\n\n```console\n\$ (.*)\n```", r"```text\n\1\n```", rest)
    rest = re.sub(r"^Example: (mmd-export .*)$", r"Example: `\1`", rest, flags=re.MULTILINE)
    return re.sub(r"\n{3,}", "\n\n", rest).strip()


def manifest_rows(schema: dict[str, Any] | None = None) -> Table:
    """Every field of the manifest with its type; nested ones under dotted names."""
    schema = json.loads(SCHEMA.read_text(encoding="utf-8")) if schema is None else schema
    return ("field", "type", "required"), list(_fields(schema, schema["$defs"], ""))


def _fields(model: dict[str, Any], models: dict[str, Any], prefix: str) -> Iterator[tuple[str, str, str]]:
    for name, field in model["properties"].items():
        required = "yes" if name in model.get("required", ()) else ""
        yield f"`{prefix}{name}`", _type(field), required
        nested, several = _nested(field)
        if nested is not None:
            yield from _fields(models[nested], models, f"{prefix}{name}{'[]' if several else ''}.")


def _nested(field: dict[str, Any]) -> tuple[str | None, bool]:
    """The model that a field holds, and whether it holds a list of them."""
    several = field.get("type") == "array"
    options = [field.get("items", {}) if several else field, *field.get("anyOf", ())]
    found = [option["$ref"].rsplit("/", 1)[1] for option in options if "$ref" in option]
    return (found[0] if found else None), several


def _type(field: dict[str, Any]) -> str:
    """A short name of what may stand in a field."""
    if "anyOf" in field:
        return " or ".join(dict.fromkeys(_type(option) for option in field["anyOf"]))
    if "items" in field:
        return f"list of {_type(field['items'])}"
    if isinstance(field.get("additionalProperties"), dict):
        return f"object of {_type(field['additionalProperties'])}"
    if "const" in field or "enum" in field:
        return ", ".join(f"`{value}`" for value in field.get("enum", [field.get("const")]))
    kind = "object" if "$ref" in field else str(field["type"]) if "type" in field else "list"
    pattern = f" `{field['pattern']}`".replace("|", "\\|") if "pattern" in field else ""
    bound = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<="}
    return " ".join([kind + pattern, *(f"{sign} {field[key]}" for key, sign in bound.items() if key in field)])


def required_rows() -> Table:
    """Every target, runtime and kit that the code has, and whether a test of it may be skipped in CI."""
    required = {kind: names.split() for kind, names in REQUIRED.findall(CI.read_text(encoding="utf-8"))}
    rows: list[tuple[str, ...]] = []
    for kind, names in discovered().items():
        must = [name for name in names if name in required[kind.upper()]]
        rest = [name for name in names if name not in must]
        rows.append((f"{kind}s", _code(must), _code(rest)))
    return ("", "tested in CI, where a skip is a failure", "not required there"), rows


def discovered() -> dict[str, list[str]]:
    """The names of all targets, runtimes and kits."""
    from mmd_export import kits, targets
    from mmd_runtime.registry import runtime_names

    return {"target": _plugins(targets, "TARGET"), "runtime": list(runtime_names()), "kit": list(kits.kit_names())}


def _plugins(package: ModuleType, constant: str) -> list[str]:
    modules = [module.name for module in pkgutil.iter_modules(package.__path__)]
    found = [getattr(importlib.import_module(f"{package.__name__}.{name}"), constant, None) for name in modules]
    return sorted(plugin.name for plugin in found if plugin is not None)


def _code(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def result_rows() -> Table:
    """Every result file: the script that wrote it, on which machine, with which libraries; by part if they differ."""
    rows: list[tuple[str, ...]] = []
    for path in sorted(RESULTS.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        script = str(result.get("script", "")).removesuffix(".py").replace("/", ".")
        parts_by_place: dict[tuple[str, str], list[str]] = {}
        for part, environment in result.get("environments", {"all": result.get("environment", {})}).items():
            parts_by_place.setdefault(_place(environment), []).append(part)
        cells = result.get("cells", {}).values() if isinstance(result.get("cells"), dict) else ()
        machines = sorted({cell["where"] for cell in cells if isinstance(cell.get("where"), str)})
        if len(machines) > 1:  # the environment is that of the last cell
            rows.append(
                (f"`{path.name}`", f"`{script}`", f"cell by cell, as its table says: {'; '.join(machines)}", "")
            )
            continue
        for place, parts in parts_by_place.items():
            of_parts = f": {', '.join(parts)}" if len(parts_by_place) > 1 else ""
            rows.append((f"`{path.name}`{of_parts}", f"`{script}`" if script else "", *place))
    return ("file", "script", "machine", "with"), rows


def _place(environment: Mapping[str, Any]) -> tuple[str, str]:
    """Machine and libraries."""
    packages = environment.get("packages", {})
    named = [f"{name} {packages[name]}" for name in ("torch", "onnxruntime", "openvino") if name in packages]
    machine = f"a CPU, {environment.get('threads', 2)} threads"
    if "cpu" in environment:
        machine = f"{environment['cpu']}, {environment['cores']} cores"
    return str(environment.get("gpu") or machine), ", ".join(named)


def tool_rows(speed: dict[str, Any], artefacts: dict[str, Any]) -> Table:
    """What the usual ways take, in times of the one graph of the same run; digits and the ddpm-cifar10 architecture."""
    from benchmarks.speed_tables import interval

    architecture = "ddpm-cifar10 architecture"
    of_artefacts = {model: values["latency"]["ratios"] for model, values in artefacts["models"].items()}
    takes = speed["models"][architecture]["takes"]
    digits = of_artefacts["digits"]
    return ("way", "digits", architecture), [
        ("one network call exported, called K times, sampler outside", interval(digits["per-step"]),
         interval(of_artefacts[architecture]["per-step"])),
        ("torch eager, the same sampler", interval(digits["torch"]), interval(of_artefacts[architecture]["torch"])),
        ("diffusers' pipeline, against the graph of `--device cpu`", "not measured",
         interval(takes["diffusers pipeline"])),
    ]  # fmt: skip

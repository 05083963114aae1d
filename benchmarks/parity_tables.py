"""Rows of the tables in docs/parity.md, from the results of the parity benchmarks and the tolerances themselves."""

from __future__ import annotations

from collections import Counter
from typing import Any

from benchmarks.precision_tables import Table
from mmd_export.tolerance import BASES, BY_GAIN


def tolerance_rows() -> Table:
    """Every tolerance with what it allows for and the largest measured error."""
    rows: list[tuple[str, ...]] = []
    for (target, precision), basis in {**BASES, ("any", "fp32, by factor"): BY_GAIN}.items():
        because, _, more = basis.because.partition("; ")
        cited = ", ".join(
            f"{each.value:.1e} `{each.file}`" + (f" for {each.of}" if each.of else "") for each in basis.measured
        )
        note = f"{because}; {more}" if cited and more else because
        rows.append((f"`{target}` {precision}", f"{basis.atol:g}", note, cited or more))
    return ("target, precision", "atol", "allows for", "largest measured"), rows


def fault_rows(result: dict[str, Any]) -> Table:
    """Each kind of fault: how many were planted, caught, and blamed on the right rung and step."""
    planted, caught, right = Counter[str](), Counter[str](), Counter[str]()
    targets: dict[str, set[str]] = {}
    for case in result["faults"].values():
        kind = case["kind"]
        planted[kind] += 1
        caught[kind] += case["caught"]
        right[kind] += case["right"]
        targets.setdefault(kind, set()).add(case["target"])
    rows: list[tuple[str, ...]] = [
        (kind, ", ".join(sorted(targets[kind])), f"{planted[kind]}", f"{caught[kind]}", f"{right[kind]}")
        for kind in planted
    ]
    rows.append(("**all**", "", *(f"**{sum(count.values())}**" for count in (planted, caught, right))))
    return ("fault", "targets", "planted", "caught", "blamed right"), rows


def honest_rows(result: dict[str, Any]) -> Table:
    """Honest verifications: how many, how many failed, how near the worst came to the tolerance."""
    rows: list[tuple[str, ...]] = []
    for key, run in result["honest"].items():
        errors = (f"{run['worst']:.1e}", f"{run['atol']:g}", f"{run['worst_mean']:.1e}", f"{run['mean_tolerance']:g}")
        rows.append((key, f"{run['runs']}", f"{run['alarms']}", *errors))
    total = result["summary"]
    rows.append(("**all**", f"**{total['honest_verifications']}**", f"**{total['false_alarms']}**", "", "", "", ""))
    heads = ("digits, 5 steps", "verifications", "false alarms", "worst error", "tolerance", "worst mean", "tolerance")
    return heads, rows


def verify_time_rows(result: dict[str, Any]) -> Table:
    """Seconds of one command."""
    found, names = result["summary"], ("fastest", "median", "slowest")
    rows: list[tuple[str, ...]] = [
        (how, *(f"{found[key][name]:.2f}" for name in names))
        for how, key in (("by the clock", "wall_seconds"), ("of the processor", "cpu_seconds"))
    ]
    imported = ", ".join(found["imported"]) or "no torch"
    head = f"`verify` of digits, {result['steps']} steps, {found['runs']} fresh processes, {imported} imported"
    return (head, *(f"{name}, s" for name in names)), rows


def distribution_rows(result: dict[str, Any]) -> Table:
    """False alarms and power of rung 7."""
    found = result["summary"]
    setting = f"{result['count']} samples a side, {result['features']}"
    rows: list[tuple[str, ...]] = []
    for what, repeats, by_test in (
        (f"honest, {setting}", found["honest_repeats"], found["alarms_by_test"]),
        ("a sampler without one of its steps", found["power_repeats"], found["found_by_test"]),
    ):
        failed = found["false_alarms"] if by_test is found["alarms_by_test"] else round(found["power"] * repeats)
        rows.append((what, f"{repeats}", f"{failed}", f"{100 * failed / repeats:.1f} %"))
        for noise, count in by_test.items():
            rows.append((f"of them by the test on {noise} noise", "", f"{count}", f"{100 * count / repeats:.1f} %"))
    return (f"digits, {result['steps']} steps, level {100 * result['level']:.0f} %", "repeats", "failed", ""), rows


def bisect_rows(result: dict[str, Any]) -> Table:
    """Planted operators: found, and in what time."""
    rows: list[tuple[str, ...]] = []
    for kind in dict.fromkeys(case["planted"]["kind"] for case in result["cases"]):
        cases = [case for case in result["cases"] if case["planted"]["kind"] == kind]
        hybrids = max(case["found"]["evaluations"] for case in cases)
        seconds = max(case["seconds"] for case in cases) + result["reference_seconds"]
        found = sum(case["right"] for case in cases)
        rows.append((kind, f"{len(cases)}", f"{found}", f"{hybrids}", f"{seconds:.0f}"))
    return ("operator spoilt", "cases", "found", "most hybrids run", "longest search, s"), rows

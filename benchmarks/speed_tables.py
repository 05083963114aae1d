"""Rows of the tables of times, from benchmarks/results/: forms.json, speed.json, latency_gate.json."""

from __future__ import annotations

from typing import Any

from benchmarks.precision_tables import Table


def interval(ratio: dict[str, Any]) -> str:
    """Median with its 95 % interval, if there were rounds enough for one."""
    median = f"{ratio['median']:.2f}"
    return median if ratio["low"] is None else f"{median} [{ratio['low']:.2f}, {ratio['high']:.2f}]"


OWN_SGEMM = "sgemm in onnxruntime"


def guidance_rows(result: dict[str, Any]) -> Table:
    """The two forms of guidance."""
    rows: list[tuple[str, ...]] = [
        (f"{row['parameters'] / 1e6:.1f} M", str(row["batch"]), interval(row["doubled_over_two_calls"]))
        for row in result["rows"]
    ]
    return ("parameters", "batch", "one doubled batch takes, times two calls"), rows


def form_rows(result: dict[str, Any]) -> Table:
    """Unrolled graph and loop by step count."""
    rows = []
    for row in result["rows"]:
        cells = [str(row["steps"])]
        for key, shown in (("nodes", "{:,}"), ("bytes", "{:,}"), ("compile_cpu_seconds", "{:.1f}"),
                           ("load_cpu_seconds", "{:.2f}")):  # fmt: skip
            cells += [shown.format(row[form][key]) for form in ("unrolled", "loop")]
        rows.append((*cells, interval(row["loop_takes"]) if "loop_takes" in row else "not run"))
    growth = [
        f"{result['growth_exponent'][form][key]:.2f}"
        for key in ("bytes", "compile_cpu_seconds", "load_cpu_seconds")
        for form in ("unrolled", "loop")
    ]
    rows.append(("*growth exponent*", "", "", *growth, ""))
    units = ("nodes", "bytes", "compile, CPU s", "load, CPU s")
    heads = ("K", *(f"{unit}: {form}" for unit in units for form in ("unrolled", "loop")), "a run of the loop takes")
    return heads, rows


def pipeline_rows(result: dict[str, Any]) -> Table:
    """What everything else takes, as times of the one graph; and the one graph against the roofline."""
    names = [name for values in result["models"].values() for name in values["takes"]]
    rows = [
        (name, *(interval(values["takes"][name]) for values in result["models"].values()))
        for name in dict.fromkeys(names)
    ]
    fractions = [f"{100 * values['fraction_of_sgemm_roofline']:.0f} %" for values in result["models"].values()]
    rows.append(("*one graph, of the sgemm roofline*", *fractions))
    rates = [values["best_gflops"] for values in result["models"].values()]
    own = [rate["one graph"] / rate[OWN_SGEMM] for rate in rates]
    rows.append(("*one graph, of onnxruntime's own sgemm*", *(f"{100 * part:.0f} %" for part in own)))
    counted = [values.get("reorders", {}) for values in result["models"].values()]
    variants = dict.fromkeys(name for counts in counted for name in counts)
    rows += [(f"*layout reorders: {name}*", *(f"{counts[name]:,}" for counts in counted)) for name in variants]
    return ("takes, times the one graph", *result["models"]), rows


def layer_rows(result: dict[str, Any]) -> Table:
    """What a whole convolution takes of the split one, by size and threads, and what the split costs in accuracy."""
    rows = [
        (
            f"{row['channels']} to {row['outputs']} channels, {row['side']} x {row['side']}",
            f"{row['products'] / 1e6:.0f}",
            *(interval(take) for take in row["whole_takes_of_split"].values()),
            *(f"{row['relative_error'][name]:.0e}" for name in ("whole", "split")),
        )
        for row in result["rows"]
    ]
    threads = [f"{count} thread{'s' * (count != '1')}" for count in result["rows"][0]["whole_takes_of_split"]]
    return ("layer", "products, M", *threads, "error: whole", "error: split"), rows


def gate_rows(result: dict[str, Any]) -> Table:
    """What real gates decided, and how long they took."""
    rows = []
    for kind, values in result["results"].items():
        counts = [str(values[key]) for key in ("gates", "pass", "fail", "undecided")]
        low, high = values["load_1_minute"]
        times = (f"{values['median_seconds']:.0f}", f"{values['longest_seconds']:.0f}")
        rows.append((kind, *counts, f"{values['median_ratio']:.3f}", *times, f"{low:.1f} to {high:.1f}"))
    heads = ("", "gates", "pass", "fail", "undecided", "median ratio", "median s", "longest s", "load average")
    return heads, rows

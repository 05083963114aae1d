"""The numbers of a bundle as rows of text: one wording for the terminal, the model card, CI and the report. No torch.

They are made from the JSON of ``verify`` and ``bench``, so what was written to a file says the same as what was
measured a moment ago. A key that is missing makes a row or a cell that is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Row = tuple[str, ...]
LATENCY_HEADS = ("", "p50 ms", "p90 ms", "p99 ms", "ratio")
THROUGHPUT_HEADS = ("", "batch", "images a second")
COLD_HEADS = ("", "start to first image s", "load s", "first image s", "host MiB", "device MiB")
PARITY_HEADS = ("rung", "checks", "worst", "tolerance", "verdict")


def latency_rows(bench: Mapping[str, Any]) -> list[Row]:
    """Name, percentiles in ms with their intervals, and how many times the first candidate it takes."""
    first = first_candidate(bench)
    rows: list[Row] = []
    for name, summary in bench["summary"].items():
        cells = [in_ms(summary.get(key)) for key in ("p50", "p90", "p99")]
        ratio = "1" if name == first else with_interval(ratio_of(bench, name, first), "median")
        rows.append((name, *cells, ratio))
    return rows


def measured_as(artefact_sha256: str, bench: Mapping[str, Any]) -> str | None:
    """The name of an artefact in a measurement of ``bench``, None if it is not in it."""
    artefacts = bench.get("artefacts", {})
    return next((name for name, sha256 in artefacts.items() if sha256 == artefact_sha256), None)


def first_candidate(bench: Mapping[str, Any]) -> str:
    """What all others are held against."""
    return str(next(iter(bench.get("candidates") or bench["summary"])))


def ratio_of(bench: Mapping[str, Any], candidate: str, against: str) -> Mapping[str, Any] | None:
    """The ratio of two candidates, if it was measured that way round."""
    pairs = ((ratio["candidate"], ratio["against"], ratio) for ratio in bench.get("ratios", ()))
    return next((ratio for one, other, ratio in pairs if (one, other) == (candidate, against)), None)


def in_ms(percentile: Mapping[str, Any] | None) -> str:
    """Milliseconds [low, high]."""
    if percentile is None:
        return "-"
    scaled = {
        key: None if (value := percentile.get(key)) is None else 1e3 * value for key in ("seconds", "low", "high")
    }
    return with_interval(scaled, "seconds")


def with_interval(values: Mapping[str, Any] | None, key: str, form: str = ".2f") -> str:
    """``median [low, high]``, without the bracket where there is no interval."""
    if values is None or values.get(key) is None:
        return "-"
    low, high = values.get("low"), values.get("high")
    interval = "" if low is None or high is None else f" [{low:{form}}, {high:{form}}]"
    return f"{values[key]:{form}}{interval}"


def throughput_rows(bench: Mapping[str, Any]) -> list[Row]:
    """Name, batch, images a second."""
    return [
        (str(row["name"]), str(row["batch"]), with_interval(row, "images_per_second", ".1f"))
        for row in bench.get("throughput", ())
    ]


def cold_rows(bench: Mapping[str, Any]) -> list[Row]:
    """Fresh processes: seconds and MiB."""
    rows: list[Row] = []
    for name, cold in bench.get("cold", {}).items():
        seconds = [f"{cold[key]:.2f}" for key in ("process", "load", "first")]
        memory = ["-" if cold.get(key) is None else f"{cold[key]:.0f}" for key in ("host_mib", "device_mib")]
        rows.append((name, *seconds, *memory))
    return rows


def bench_conditions(bench: Mapping[str, Any]) -> str:
    """Batch, rounds, processor: what the table below it was measured under."""
    environment = bench.get("environment", {})
    facts = [f"Batch {bench['batch']}, {bench['rounds']} interleaved rounds, {environment.get('cpu', 'CPU')}"]
    if (gpu := environment.get("gpu")) is not None:
        facts.append(str(gpu.get("name")))
    if environment.get("cores_usable") is not None:
        facts.append(f"{environment['cores_usable']} cores")
    bound = " Inputs and outputs of the bundles stay on the device, the others copy theirs." if bench["bound"] else ""
    return f"{', '.join(facts)}; 95 % intervals in brackets.{bound}"


def parity_rows(verify: Mapping[str, Any]) -> list[Row]:
    """One row a rung."""
    rows: list[Row] = []
    for rung in verify.get("rungs", ()):
        worst = "-" if rung.get("skipped") or rung.get("worst") is None else f"{rung['worst']:.1e}"
        atol = "-" if rung.get("tests") or not rung.get("atol") else f"{rung['atol']:g}"
        rows.append((str(rung.get("rung", "")), str(rung.get("title", "")), worst, atol, str(rung.get("verdict", ""))))
    return rows


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; a bar in a cell is escaped."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def latency_markdown(bench: Mapping[str, Any]) -> str:
    """Conditions, latency, and what else was measured, as in the model card."""
    heads = (*LATENCY_HEADS[:-1], f"times {first_candidate(bench)}")
    parts = [bench_conditions(bench), markdown(heads, latency_rows(bench))]
    if len({row["batch"] for row in bench.get("throughput", ())}) > 1:
        parts.append(markdown(THROUGHPUT_HEADS, throughput_rows(bench)))
    if bench.get("cold"):
        parts.append(markdown(COLD_HEADS, cold_rows(bench)))
    return "\n\n".join(parts)


def parity_markdown(verify: Mapping[str, Any]) -> str:
    """What was checked, in which runtime, and what was not."""
    head = f"Measured in {verify.get('runtime')}: {verify.get('detail')}."
    return "\n\n".join(
        [
            head,
            markdown(PARITY_HEADS, parity_rows(verify)),
            *(f"Not checked: {line}." for line in verify.get("not_checked", ())),
        ]
    )

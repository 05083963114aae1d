"""What CI systems read: JUnit XML, and a Markdown summary that is appended to. No torch.

The XML is the part of the JUnit schema that Jenkins, GitLab and GitHub's reporters share: testsuites, testsuite,
testcase with failure, skipped and system-out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

from mmd_export import numbers
from mmd_export.errors import UsageError
from mmd_export.folders import write_text
from mmd_export.parity_report import ARTEFACT

_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True)
class Case:
    """One check. ``failure`` and ``skipped`` are messages; neither means that it passed."""

    name: str
    detail: str = ""
    failure: str = ""
    skipped: str = ""


def junit_xml(suite: str, cases: Sequence[Case]) -> str:
    """One suite. What XML 1.0 cannot hold becomes a question mark."""
    counts = {
        "tests": len(cases),
        "failures": sum(bool(case.failure) for case in cases),
        "errors": 0,
        "skipped": sum(bool(case.skipped) for case in cases),
    }
    numbers_of = {key: str(value) for key, value in counts.items()}
    root = ET.Element("testsuites", numbers_of)
    element = ET.SubElement(root, "testsuite", {"name": _text(suite), **numbers_of})
    for case in cases:
        one = ET.SubElement(element, "testcase", {"classname": _text(suite), "name": _text(case.name)})
        for tag, message in (("failure", case.failure), ("skipped", case.skipped)):
            if message:
                ET.SubElement(one, tag, {"message": _text(message)}).text = _text(message)
        if case.detail:
            ET.SubElement(one, "system-out").text = _text(case.detail)
    ET.indent(root)
    return ET.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _text(value: str) -> str:
    return _NOT_XML.sub("?", value)


def verify_cases(report: Mapping[str, Any]) -> list[Case]:
    """One case a rung of ``verify``'s JSON, and one a comparison of the rungs that failed."""
    cases = []
    for rung in report.get("rungs", ()):
        in_runtime = rung["rung"] >= ARTEFACT and "runtime" in report
        where = f" ({report['runtime']})" if in_runtime else ""
        name = f"rung {rung['rung']}: {rung['title']}{where}"
        worst = "tests" if rung.get("tests") else f"worst {rung.get('worst')}, tolerance {rung.get('atol')}"
        off = [
            f"{each['name']} {each['max_abs']} (tolerance {each['atol']:g})"
            for each in rung.get("comparisons", ())
            if not each["passed"]
        ]
        off += [
            f"{test['noise']} noise, p {test['p_value']:.3g} at level {test['level']:g}"
            for test in rung.get("tests", ())
            if not test["passed"]
        ]
        named = f"{worst}; off: {', '.join(off[:3])}" if off else worst
        failure = named if rung.get("verdict") == "failed" else ""
        detail = f"{worst}; {report['detail']}" if in_runtime else worst
        cases.append(Case(name, detail, failure, str(rung.get("skipped") or "")))
    return cases


def bench_cases(report: Mapping[str, Any]) -> list[Case]:
    """One case a gate; a limit that could not be decided is skipped, which CI shows. Without gates, one a candidate."""
    found = []
    for gate in report.get("gates", ()):
        name = f"{gate['candidate']} against {gate['against']}, at most {gate['limit']:.3f}"
        why = {"fail": "failure", "undecided": "skipped"}.get(gate["verdict"])
        found.append(Case(name, gate["message"], **({why: gate["message"]} if why else {})))
    if found:
        return found
    return [Case(f"{row[0]}: measured", ", ".join(row[1:])) for row in numbers.latency_rows(report)]


def verify_summary(report: Mapping[str, Any]) -> str:
    """Markdown for the page of a CI run."""
    mark = "passed" if report.get("passed") else "FAILED"
    return f"## Parity of {report.get('bundle')}: {mark}\n\n{numbers.parity_markdown(report)}\n"


def bench_summary(report: Mapping[str, Any]) -> str:
    """Markdown for the page of a CI run."""
    gates = "\n".join(f"- **{gate['verdict']}**: {gate['message']}" for gate in report.get("gates", ()))
    notes = "\n".join(f"- {note}" for note in report.get("notes", ()))
    parts = [f"## Latency of {', '.join(report.get('candidates', ()))}", gates, numbers.latency_markdown(report), notes]
    return "\n\n".join(part for part in parts if part) + "\n"


def write_ci_files(junit: Path | None, summary: Path | None, suite: str, cases: Sequence[Case], text: str) -> None:
    """Write the XML, and append the Markdown: several commands share one summary."""
    if junit is not None:
        write_text(junit, junit_xml(suite, cases), "--junit")
    if summary is None:
        return
    try:
        summary.absolute().parent.mkdir(parents=True, exist_ok=True)
        with summary.open("a", encoding="utf-8", newline="\n") as file:
            file.write(text + "\n")
    except OSError as error:
        raise UsageError(f"--summary {summary} cannot be written: {error.strerror or error}") from error

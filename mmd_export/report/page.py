"""The page: values and charts into the template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from mmd_export import numbers
from mmd_export.errors import NotAvailableError
from mmd_export.report import model
from mmd_export.report.model import BundleFacts

INSTALL = "pip install 'mmd-export[report]'"
TEMPLATE = "report.html.j2"


def render(all_facts: Sequence[BundleFacts], bench: Mapping[str, Any]) -> str:
    """One self-contained HTML page; ``bench`` is its JSON, empty where nothing was measured."""
    try:
        import jinja2

        from mmd_export.report import charts
    except ImportError as error:
        raise NotAvailableError(f"a report needs jinja2 and matplotlib ({error}); {INSTALL}") from error
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mmd_export", "report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page: str = environment.get_template(TEMPLATE).render(
        title=", ".join(facts.bundle.name for facts in all_facts),
        targets={"heads": model.TARGET_HEADS, "rows": model.target_rows(all_facts, bench)},
        bundles=[_bundle(facts, charts) for facts in all_facts],
        latency=_latency(bench, charts) if bench else None,
    )
    return page


def _bundle(facts: BundleFacts, charts: ModuleType) -> dict[str, Any]:
    pictures, name = model.pictures_of(facts), facts.bundle.name
    latent = "the sample is a latent, which no picture can show" if facts.bundle.gives_latents else ""
    return {
        "name": name,
        "verdict": facts.verdict,
        "runtime": f"{facts.verify.get('runtime', '')}: {facts.verify.get('detail', '')}" if facts.verify else "",
        "fraction": facts.verify.get("verified_fraction"),
        "pictures": None if pictures is None else charts.picture_uris(pictures),
        "largest": None if pictures is None else f"{pictures.largest:.2g}",
        "not_drawn": facts.not_drawn or latent,
        "curve": charts.parity_svg(model.parity_curve(facts), name),
        "parity": {"heads": numbers.PARITY_HEADS, "rows": numbers.parity_rows(facts.verify)},
        "budget": {"heads": model.BUDGET_HEADS, "rows": model.budget_rows(facts)},
        "distribution": {"heads": model.DISTRIBUTION_HEADS, "rows": model.distribution_rows(facts)},
        "not_checked": model.not_checked(facts),
        "provenance": {"heads": (), "rows": model.provenance_rows(facts)},
    }


def _latency(bench: Mapping[str, Any], charts: ModuleType) -> dict[str, Any]:
    heads = (*numbers.LATENCY_HEADS[:-1], f"times {numbers.first_candidate(bench)}")
    return {
        "conditions": numbers.bench_conditions(bench),
        "violins": charts.violins_svg(bench["seconds"]),
        "table": {"heads": heads, "rows": numbers.latency_rows(bench)},
        "throughput": {"heads": numbers.THROUGHPUT_HEADS, "rows": numbers.throughput_rows(bench)},
        "cold": {"heads": numbers.COLD_HEADS, "rows": numbers.cold_rows(bench)},
        "gates": [gate["message"] for gate in bench.get("gates", ())],
        "notes": list(bench.get("notes", ())),
        "environment": {"heads": (), "rows": model.environment_rows(bench)},
    }

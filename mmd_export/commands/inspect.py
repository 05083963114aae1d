"""``mmd-export inspect``: what something is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmd_export.bundle import Bundle
from mmd_export.commands.sample import is_bundle
from mmd_export.errors import UsageError
from mmd_export.network_options import AS_IT_IS, NetworkOptions
from mmd_export.plan import StepPlan
from mmd_export.plan_options import PlanOptions

if TYPE_CHECKING:
    from mmd_export.checkpoint import Checkpoint


def inspect(source: str, options: PlanOptions, network: NetworkOptions = AS_IT_IS) -> dict[str, Any]:
    """Facts of a bundle, run folder or model; ``plan`` is there whenever one is known."""
    if is_bundle(source):
        bundle = Bundle.open(source)
        options.require_bundle(bundle.name, len(bundle.manifest.plan["steps"]))
        return _inspect_bundle(bundle)
    from mmd_export.checkpoint import load_checkpoint

    checkpoint = load_checkpoint(source, network=network)
    facts: dict[str, Any] = {
        "kind": "run folder" if checkpoint.plan else "model",
        "name": checkpoint.name,
        "sha256": checkpoint.sha256,
        "parameters": sum(p.numel() for p in checkpoint.denoiser.parameters()),
        "sample_shape": list(checkpoint.shape),
        "classes": checkpoint.classes,
        "latent": checkpoint.latent or None,
        "decoder": _decoder_facts(checkpoint),
        "conditions": [
            {"name": told.name, "dtype": told.dtype, "shape": ["batch", *told.shape]} for told in checkpoint.conditions
        ],
        "options": dict(checkpoint.options),
        "scheduler": {key: value for key, value in vars(checkpoint.scheduler).items() if key != "trained_betas"},
        "licence": checkpoint.licence,
        "warnings": list(checkpoint.warnings),
        "tuned_precision": None if checkpoint.tuned_precision is None else checkpoint.tuned_precision.to_dict(),
    }
    if checkpoint.plan or options.steps is not None or options.timesteps is not None:
        plan = checkpoint.plan_for(**options.wanted)
        facts["plan"] = plan.to_dict()
        facts["plan_learned_from"] = plan.settings.get("learned_from")
    return facts


def _decoder_facts(checkpoint: Checkpoint) -> dict[str, Any] | str | None:
    """Of a latent model: the decoder that --decode would put into the graph, or why there is none."""
    if not checkpoint.latent:
        return None
    if checkpoint.decoder is None:
        return f"none: {checkpoint.no_decoder}"
    return {**checkpoint.decoder.facts(), "parameters": sum(p.numel() for p in checkpoint.decoder.parameters())}


def _inspect_bundle(bundle: Bundle) -> dict[str, Any]:
    manifest = bundle.manifest.model_dump(mode="json")
    size = sum(entry.size for entry in bundle.manifest.files)
    return {"kind": "bundle", "bytes": size, **manifest}


def plan_rows(plan: StepPlan) -> list[tuple[str, ...]]:
    """A row a call: number, timestep and input scale, alpha and sigma of the input, the clean guess, the update."""
    rows: list[tuple[str, ...]] = []
    for k, step in enumerate(plan.steps):
        clean = "" if step.clean is None else f"clamp({step.clean[0]:+.4f} x {step.clean[1]:+.4f} out)"
        terms = [f"{term.weight:+.4f} {_symbol(term.source, term.index, k)}" for term in step.update]
        timestep = f"{step.timestep:g}" if step.scale == 1.0 else f"{step.timestep:g} (sees {step.scale:.4g} x)"
        rows.append((str(k + 1), timestep, f"{step.alpha:.4f}", f"{step.sigma:.4f}", clean, " ".join(terms)))
    return rows


def require_plan(facts: dict[str, Any]) -> None:
    """Raise UsageError if ``inspect``'s facts hold no plan to draw."""
    if "plan" not in facts:
        raise UsageError(f"{facts['name']}: no plan is known to draw; give --steps or --timesteps")


def plot_plan(facts: dict[str, Any], path: Path) -> None:
    """Draw the plan of ``inspect``'s facts as a PNG; raises UsageError if no plan is known."""
    from mmd_export.plan_picture import save_plan_picture

    require_plan(facts)
    save_plan_picture(StepPlan.from_dict(facts["plan"]), path)


def _symbol(source: str, index: int, k: int) -> str:
    """x, out and clean of this step without a number, of an earlier one with it."""
    short = {"state": "x", "output": "out", "clean": "clean", "noise": "z"}[source]
    return f"{short}{index}" if source == "noise" or index != k else short

"""The model card of a bundle: what it is, where it comes from, how exact and how fast it was measured. No torch."""

from __future__ import annotations

from collections.abc import Mapping

from mmd_export.manifest import ManifestDraft

PARITY, LATENCY, LINEAGE = "Parity as measured", "Latency", "Lineage"
_REFERENCE = "Parity with the float64 reference"
LATENCY_UNKNOWN = "Not measured on this bundle yet: `mmd-export bench BUNDLE --update-card`."


def model_card(manifest: ManifestDraft, verified: str = "not verified", latency: str = LATENCY_UNKNOWN) -> str:
    """Markdown. ``verified`` says where parity was measured; ``latency`` is a paragraph or a table."""
    plan, weights = manifest.plan, manifest.graph.unique_weight_bytes
    graph = f"{manifest.graph.nodes:,} nodes, {weights / 1e6:.2f} MB of weights, stored once"
    out = "latent" if _gives_latents(manifest) else "image"
    timesteps = ", ".join(f"{step['timestep']:g}" for step in plan["steps"])
    lines = [
        f"# {manifest.name}",
        "",
        f"A {len(plan['steps'])}-step {str(plan['solver']).upper()} sampler as one static graph: noise in, {out} out.",
        "",
        "| | |",
        "|---|---|",
        f"| checkpoint | {manifest.checkpoint.name}, SHA-256 `{manifest.checkpoint.sha256[:16]}` |",
        *_options(manifest),
        f"| licence of the weights | {manifest.checkpoint.licence or 'not stated by the checkpoint'} |",
        f"| timesteps | {timesteps} |",
        f"| batch | {manifest.batch} |",
        f"| inputs | {_specs(manifest.inputs)} |",
        f"| outputs | {_specs(manifest.outputs)} |",
        f"| precision | {manifest.precision}; the sampler state is float32 |",
        *_decoder(manifest),
        f"| graph | {graph} |",
        *_compiled(manifest),
        f"| built with | {', '.join(f'{name} {version}' for name, version in sorted(manifest.toolchain.items()))} |",
        "",
        f"## {_REFERENCE}",
        "",
        *_parity(manifest, verified),
        "",
        "## Latency",
        "",
        latency,
        "",
        "## Check it where it runs",
        "",
        "`mmd-export verify .` compares it with `golden.safetensors`; `mmd-export sample . --out ../grid.png` draws.",
        "",
    ]
    return "\n".join(lines)


def with_section(card: str, title: str, body: str, before: str = "") -> str:
    """``card`` with the section ``## title`` replaced, or put in before another if there is none yet."""
    head, found, rest = card.partition(f"## {title}\n")
    if found:
        following = rest.find("\n## ")
        rest = "" if following < 0 else rest[following + 1 :]
    else:
        head, found, rest = card.partition(f"## {before}\n")
        rest = found + rest
    return f"{head}## {title}\n\n{body}\n\n{rest}".rstrip("\n") + "\n"


def with_lineage(card: str, lineage: Mapping[str, str]) -> str:
    """``card`` with what the weights were made of, if that is known."""
    lines = [f"- {what}: {text}" for what, text in lineage.items()]
    return with_section(card, LINEAGE, "\n".join(lines), before=_REFERENCE) if lines else card


def with_lineage_of(card: str, earlier: str) -> str:
    """``card`` with the lineage that an earlier card of the same weights has, if it has one."""
    _, found, rest = earlier.partition(f"## {LINEAGE}\n")
    return with_section(card, LINEAGE, rest.partition("\n## ")[0].strip(), before=_REFERENCE) if found else card


def _gives_latents(manifest: ManifestDraft) -> bool:
    return manifest.decoder is None and manifest.plan.get("clamp_output") is False


def _decoder(manifest: ManifestDraft) -> list[str]:
    """The row of a latent model."""
    if (decoder := manifest.decoder) is not None:
        shift = f" + {decoder.shift:g}" if decoder.shift else ""
        formula = f"image = D(latent / {decoder.scale:g}{shift})"
        if decoder.std:
            formula = f"image = D(latent std / {decoder.scale:g} + mean), a std and a mean for each channel"
        return [f"| decoder | {decoder.autoencoder}, in the graph; {formula}; {decoder.precision} |"]
    return ["| decoder | none in the graph; the sample is a latent |"] if _gives_latents(manifest) else []


def _compiled(manifest: ManifestDraft) -> list[str]:
    """The row of an engine, which runs on what it was compiled for only, or of one that is still to be compiled."""
    if manifest.deferred is not None:
        chosen = ", ".join(f"{name} {value}" for name, value in sorted(manifest.deferred.options.items()))
        how = f" with {chosen}" if chosen else ""
        return [f"| to be compiled | for {manifest.target}{how}, where it will run: `mmd-export finalize .` |"]
    facts = {name: value for name, value in (manifest.hardware or {}).items() if value not in ("none", "any", "no")}
    text = ", ".join(f"{name} {value[:16] if len(value) == 64 else value}" for name, value in facts.items())
    return [f"| runs on | {text} |"] if text else []


def _options(manifest: ManifestDraft) -> list[str]:
    """What was chosen about the network, if anything was."""
    chosen = manifest.checkpoint.options
    return [f"| network | {', '.join(f'{name} {value}' for name, value in sorted(chosen.items()))} |"] if chosen else []


def _specs(specs: object) -> str:
    assert isinstance(specs, tuple)
    return "; ".join(f"`{spec.name}` {spec.dtype} ({', '.join(map(str, spec.shape))})" for spec in specs)


def _parity(manifest: ManifestDraft, verified: str) -> list[str]:
    if manifest.parity is None:
        return [f"Tolerance {manifest.tolerance.atol:g}. **{verified}**."]
    rows = [f"| {name} | {value:.0e} |" for name, value in manifest.parity.items()]
    head = f"Largest absolute error, rounded up; {verified}. Tolerance {manifest.tolerance.atol:g}."
    return [head, "", "| compared | at most |", "|---|---|", *rows]

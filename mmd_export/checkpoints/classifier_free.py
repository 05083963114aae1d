"""Classifier-free guidance put into a checkpoint, so that everything behind it sees one guided network."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace

from mmd_export.checkpoints.base import Checkpoint
from mmd_export.conditions import CLASS_LABELS, Condition, names_of
from mmd_export.errors import UsageError
from mmd_export.guidance import TWO_CALLS, GuidedDenoiser
from mmd_export.network_options import Choice, NetworkOptions

# What --guidance-form auto means. Measured by benchmarks/guidance.py (benchmarks/results/guidance.json), the doubled
# batch over two calls in onnxruntime on a CPU: 1.03 and 1.14 at 1.6 M parameters, which decide, 0.85 and 1.00 at 0.2 M.
FASTER = TWO_CALLS


def apply_options(checkpoint: Checkpoint, options: NetworkOptions) -> Checkpoint:
    """The checkpoint with guidance, if it is asked for, and with a hash that covers all that was chosen."""
    embedded = "guidance_scale" in checkpoint.options
    guided = checkpoint if embedded or options.guidance_scale in (None, 1.0) else _guided(checkpoint, options)
    if guided is checkpoint and (stray := _stray(options)):
        why = "the guidance scale is embedded in the network" if embedded else "there is no --guidance-scale but 1"
        raise UsageError(f"{checkpoint.name}: {stray} has no meaning, {why}; leave it out")
    of_network = checkpoint.network_sha256
    return replace(
        guided,
        sha256=_covering(checkpoint.sha256, guided.options),
        network_sha256=None if of_network is None else _covering(of_network, guided.options),
    )


def _stray(options: NetworkOptions) -> str:
    """An option that only guidance reads."""
    if options.guidance_form != "auto":
        return f"--guidance-form {options.guidance_form}"
    return "" if options.null_label is None else f"--null-label {options.null_label}"


def _guided(checkpoint: Checkpoint, options: NetworkOptions) -> Checkpoint:
    """uncond + S (cond - uncond) as the network, with the inputs that the unconditional side takes."""
    scale, form = options.guidance_scale, options.guidance_form
    assert scale is not None
    unconditional = _unconditional(checkpoint, options)
    form = FASTER if form == "auto" else form
    negatives = {
        name: Condition(name, each.dtype, each.shape, each.below)
        for each in checkpoint.conditions
        if isinstance(name := unconditional.get(each.name), str)
    }
    chosen: dict[str, Choice] = {"guidance_scale": scale, "guidance_form": form}
    if isinstance(null := unconditional.get(CLASS_LABELS), int):
        chosen["null_label"] = null
    return replace(
        checkpoint,
        denoiser=GuidedDenoiser(checkpoint.denoiser, scale, unconditional, form).eval(),
        conditions=(*checkpoint.conditions, *negatives.values()),
        unconditional={},
        options={**checkpoint.options, **chosen},
    )


def _unconditional(checkpoint: Checkpoint, options: NetworkOptions) -> Mapping[str, int | str]:
    """What takes the conditions' place; raises UsageError if nothing can."""
    where, scale = checkpoint.name, options.guidance_scale
    if not checkpoint.conditions:
        raise UsageError(f"{where}: --guidance-scale is {scale}, but the model is unconditional; leave it out")
    found, null = dict(checkpoint.unconditional), options.null_label
    if null is not None:
        _require_null_label(checkpoint, null)
        found[CLASS_LABELS] = null
    if not found:
        raise UsageError(
            f"{where}: --guidance-scale is {scale}, but nothing says what stands for no "
            f"{names_of(checkpoint.conditions)[0]}; pass --null-label N, the class that was trained without a label"
        )
    return found


def _require_null_label(checkpoint: Checkpoint, null: int) -> None:
    labels = next((each for each in checkpoint.conditions if each.name == CLASS_LABELS), None)
    if labels is None or labels.below is None:
        raise UsageError(
            f"{checkpoint.name}: --null-label is {null}, but the model takes no class numbers; leave it out"
        )
    own = checkpoint.unconditional.get(CLASS_LABELS)
    if not (0 <= null < labels.below or null == own):
        last = own if isinstance(own, int) else labels.below - 1
        raise UsageError(f"{checkpoint.name}: --null-label is {null}; the model knows 0 to {last}")


def _covering(sha256: str, options: Mapping[str, Choice]) -> str:
    """The hash of weights and configs, and of what was chosen if anything was."""
    if not options:
        return sha256
    return hashlib.sha256(json.dumps([sha256, dict(options)], sort_keys=True).encode()).hexdigest()

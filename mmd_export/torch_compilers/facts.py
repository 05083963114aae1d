"""What a manifest says of a program, whatever compiles it."""

from __future__ import annotations

from mmd_export.program import SamplerProgram


def weight_facts(program: SamplerProgram) -> dict[str, int]:
    """Bytes of the weights, each once, and of what the time grid made constant; the fields of GraphInfo."""
    calls = [program.step, *([] if program.decoder is None else [program.decoder.call])]
    weights = {id(value): value.nbytes for call in calls for value in (*call.state_dict.values(),)}
    folded = [value for k in range(program.plan.step_count) for value in program.constants(k)]
    folded_bytes = sum(value.nbytes for value in folded)
    return {
        "unique_weight_bytes": sum(weights.values()) + folded_bytes,
        "folded_values": len(folded),
        "folded_bytes": folded_bytes,
    }

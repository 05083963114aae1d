"""The lower precision that a run folder was tuned in, with the ranges it was tuned with. Standard library only."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from typing import Any

from mmd_export.errors import UsageError

QUANTISATION_FILE = "quantisation.json"
# Targets whose arithmetic is that of the ONNX graph, which is what tuning imitates.
FROM_THE_GRAPH = ("onnx", "tensorrt", "tensorrt-rtx")


@dataclass(frozen=True)
class TunedLayer:
    """One quantised product: the weight's name and number of values, and the scale of its activation in each call."""

    name: str
    size: int
    scales: tuple[float, ...]


@dataclass(frozen=True)
class TunedPrecision:
    """``layers``: the quantised ones in the order of the graph; empty where activations have no grid.

    ``images``: how many trajectories of the model before tuning set the scales.
    """

    precision: str
    images: int | None = None
    layers: tuple[TunedLayer, ...] = ()

    def __post_init__(self) -> None:
        for layer in self.layers:
            if not all(math.isfinite(scale) and scale > 0.0 for scale in layer.scales):
                raise UsageError(f"layer {layer.name}: a scale of {layer.scales} is not positive; tune again")

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str) -> TunedPrecision:
        """The value in ``data``; raises UsageError that names the file."""
        try:
            layers = tuple(
                TunedLayer(str(row["name"]), int(row["size"]), tuple(map(float, row["scales"])))
                for row in data["layers"]
            )
            return cls(**{**data, "layers": layers})
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(f"{where} is damaged ({error}); tune again into another --out") from error

    def digest(self) -> str:
        """SHA-256 of everything."""
        return sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()

    def warning(self, name: str, target: str, precision: str) -> str | None:
        """What the user should hear who builds ``name`` in another arithmetic than it was tuned in."""
        if precision != self.precision:
            return (
                f"{name} was tuned for --precision {self.precision}, --precision is {precision}: its weights answer to "
                f"the rounding of {self.precision}; build that, or tune again for {precision}"
            )
        if target not in FROM_THE_GRAPH:
            return (
                f"{name} was tuned for {precision} as target onnx computes it; target {target} rounds in its own way, "
                "and the recorded ranges are not used"
            )
        return None

    def require_fit(self, sizes: Sequence[int], steps: int) -> None:
        """Raise UsageError unless the layers are those of a graph: their weights' sizes, and a scale for each call."""
        if len(sizes) != len(self.layers):
            raise UsageError(
                f"{QUANTISATION_FILE} holds ranges of {len(self.layers)} layers, the graph quantises {len(sizes)}; "
                "tune again with this version, or remove the file to calibrate anew"
            )
        for layer, size in zip(self.layers, sizes, strict=True):
            if (layer.size, len(layer.scales)) != (size, steps):
                raise UsageError(
                    f"{QUANTISATION_FILE}: layer {layer.name} has {layer.size} weights and {len(layer.scales)} scales, "
                    f"the graph has {size} and {steps} calls; tune again, or remove the file to calibrate anew"
                )

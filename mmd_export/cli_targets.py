"""Options of ``build`` that only some targets take; the fields of TargetOptions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_PANEL = "Options of single targets"

Workspace = Annotated[
    int | None,
    typer.Option(
        help="TensorRT: scratch memory the builder may plan with, MiB", show_default=False, rich_help_panel=_PANEL
    ),
]
MemoryLimit = Annotated[
    int | None,
    typer.Option(help="TensorRT: memory of the builder's process, MiB", show_default=False, rich_help_panel=_PANEL),
]
HardwareCompat = Annotated[
    str | None,
    typer.Option(
        help="TensorRT: ampere+ or same-compute-capability: an engine for more GPUs than this one",
        show_default=False,
        rich_help_panel=_PANEL,
    ),
]
VersionCompat = Annotated[
    bool | None,
    typer.Option(
        "--version-compat",
        help="TensorRT: an engine that newer TensorRT loads too",
        show_default=False,
        rich_help_panel=_PANEL,
    ),
]
Refit = Annotated[
    bool | None,
    typer.Option(
        "--refit", help="TensorRT: an engine whose weights can be replaced", show_default=False, rich_help_panel=_PANEL
    ),
]
StripWeights = Annotated[
    bool | None,
    typer.Option(
        "--strip-weights",
        help="TensorRT: an engine without weights; they are refitted from the ONNX beside it",
        show_default=False,
        rich_help_panel=_PANEL,
    ),
]
Compress = Annotated[
    bool | None,
    typer.Option(
        "--compress",
        help="TensorRT-RTX: keep the engine packed, as model.plan.xz",
        show_default=False,
        rich_help_panel=_PANEL,
    ),
]
ComputeCapability = Annotated[
    str | None,
    typer.Option(help="TensorRT: GPUs to compile for, such as 8.9,12.0", show_default=False, rich_help_panel=_PANEL),
]
CacheFolder = Annotated[
    Path | None,
    typer.Option(
        "--cache",
        help="TensorRT: folder of timing caches and finished engines",
        show_default=False,
        rich_help_panel=_PANEL,
    ),
]
DeploymentTarget = Annotated[
    str | None,
    typer.Option(
        help="Core ML: oldest system that shall run it, such as iOS17 or macOS14",
        show_default=False,
        rich_help_panel=_PANEL,
    ),
]
ComputeUnits = Annotated[
    str | None,
    typer.Option(help="Core ML: all, cpu, cpu-gpu or cpu-ane", show_default=False, rich_help_panel=_PANEL),
]
Calibration = Annotated[
    int | None,
    typer.Option(
        help="quantised: images whose trajectories set the ranges of quantised values",
        show_default=False,
        rich_help_panel=_PANEL,
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        help="torch: cpu or cuda; onnx, openvino: cpu for a form of fp32 with fewer products",
        show_default=False,
        rich_help_panel=_PANEL,
    ),
]

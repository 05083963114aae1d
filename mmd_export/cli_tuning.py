"""Options of ``finetune`` that say what is tuned; fields of FinetuneSettings."""

from __future__ import annotations

from typing import Annotated

import typer

_PANEL = "What is tuned"

Tune = Annotated[
    str | None,
    typer.Option(
        "--tune",
        help="weights: all (default), lora, norm-bias, or none with --learn plan",
        show_default=False,
        rich_help_panel=_PANEL,
    ),
]
LoraRank = Annotated[
    int | None, typer.Option(help="rank of the adapters; default: 8", show_default=False, rich_help_panel=_PANEL)
]
LoraAlpha = Annotated[
    int | None,
    typer.Option(
        help="adapters are scaled by alpha / rank; default: the rank", show_default=False, rich_help_panel=_PANEL
    ),
]
LoraTargets = Annotated[
    str | None,
    typer.Option(
        help="ends of layers' names, as in to_q,to_v; default: every linear and convolutional layer",
        show_default=False,
        rich_help_panel=_PANEL,
    ),
]
Learn = Annotated[
    str | None,
    typer.Option(
        help="weights (default), coefficients: the sampler's too, plan: its timesteps too",
        show_default=False,
        rich_help_panel=_PANEL,
    ),
]
PlanRate = Annotated[
    float | None,
    typer.Option("--plan-lr", help="learning rate of the plan's numbers", show_default=False, rich_help_panel=_PANEL),
]
TunedIn = Annotated[
    str | None,
    typer.Option(
        "--precision",
        help="tune in the arithmetic of build --precision: fp16, bf16, int8, fp8, w8, w4",
        show_default=False,
        rich_help_panel=_PANEL,
    ),
]
TunedCalibration = Annotated[
    int | None,
    typer.Option(
        "--calibration",
        help="int8, fp8: images whose trajectories set the ranges, up to 4096",
        show_default=False,
        rich_help_panel=_PANEL,
    ),
]

"""Options of ``finetune`` that choose the estimator and how it is computed, under the names of the settings."""

from __future__ import annotations

from typing import Annotated

import typer

_PANEL = "Estimator and computation"

Kernel = Annotated[
    str | None,
    typer.Option(
        help="gaussian, laplace, rational-quadratic, energy, cubic, polynomial:DEGREE or linear; gaussian:0.1,1 lists "
        "bandwidths as multiples of the median",
        show_default=False,
        rich_help_panel=_PANEL,
    ),
]
Estimator = Annotated[str | None, typer.Option(help="unbiased or biased", show_default=False, rich_help_panel=_PANEL)]
Reference = Annotated[
    str | None,
    typer.Option(
        help="real side of the loss: bank (all images), batch, or nystrom (landmarks)",
        show_default=False,
        rich_help_panel=_PANEL,
    ),
]
Landmarks = Annotated[
    int | None, typer.Option(help="of --reference nystrom", show_default=False, rich_help_panel=_PANEL)
]
BatchSize = Annotated[
    int | None,
    typer.Option(help="images of one MMD estimate, over all processes", show_default=False, rich_help_panel=_PANEL),
]
MicroBatchSize = Annotated[
    int | None,
    typer.Option(
        help="images in memory at once; the gradient stays that of the batch",
        show_default=False,
        rich_help_panel=_PANEL,
    ),
]
CheckpointCalls = Annotated[
    bool | None,
    typer.Option(
        "--checkpoint-calls/--keep-calls",
        help="recompute network calls: memory flat in the steps",
        show_default=False,
        rich_help_panel=_PANEL,
    ),
]
Autocast = Annotated[
    str | None,
    typer.Option(help="bf16 or off: arithmetic of the network's calls", show_default=False, rich_help_panel=_PANEL),
]
ChannelsLast = Annotated[
    bool | None,
    typer.Option(
        "--channels-last/--channels-first",
        help="memory format of the network",
        show_default=False,
        rich_help_panel=_PANEL,
    ),
]
Compile = Annotated[
    bool | None,
    typer.Option(
        "--compile/--eager", help="run the network through torch.compile", show_default=False, rich_help_panel=_PANEL
    ),
]
Device = Annotated[str | None, typer.Option(help="auto, cpu or cuda", show_default=False, rich_help_panel=_PANEL)]

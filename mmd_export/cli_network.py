"""The options of the network that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

GuidanceScale = Annotated[
    float | None,
    typer.Option(
        help="S of uncond + S (cond - uncond), put into the graph; 1 for none; distilled models: the embedded scale",
        show_default=False,
    ),
]
GuidanceForm = Annotated[
    str, typer.Option(help="doubled (one batch of both sides), two-calls, or auto (what was measured faster)")
]
NullLabel = Annotated[
    int | None,
    typer.Option(help="class that stands for no class in guidance; DiT knows its own", show_default=False),
]
TextLength = Annotated[
    int | None,
    typer.Option(help="tokens of the text embeddings; default: the tokenizer's or the class's", show_default=False),
]
Conditions = Annotated[
    list[str] | None,
    typer.Option(
        "--condition",
        help="name=FILE.npy or .safetensors, as encoder_hidden_states=text.npy; repeatable. build sets the ranges of a "
        "lower precision and verifies with it",
        show_default=False,
    ),
]

"""The command ``embed``; registered in ``cli``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmd_export.cli_options import BundleFolder, Overwrite
from mmd_export.cli_output import show

EMBED_EXAMPLES = "Example: mmd-export embed digits-5.bundle --kit cpp --out digits-cpp"


def embed(
    bundle: BundleFolder,
    kit: Annotated[
        str, typer.Option(help="cpp, executorch, node, python, ray, swift, triton or web", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="project folder to make", show_default=False)],
    overwrite: Overwrite = False,
) -> None:
    """Write a small project that runs the bundle in an app: sources, bundle, README, licence notes, self-test."""
    from mmd_export.commands.embed import EmbedOptions
    from mmd_export.commands.embed import embed as write

    written = write(EmbedOptions(bundle, kit, out, overwrite))
    show(f"{out}: {written.summary}")
    show("\n".join(["next:", f"  cd {out}", *(f"  {line}" for line in written.lines)]))

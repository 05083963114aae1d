"""The arguments and options that several commands share, as annotated types, and what their text means."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Annotated
from urllib.parse import urlencode

import typer

from mmd_export.errors import UsageError
from mmd_export.folders import why_nothing_is_made
from mmd_export.plan_options import parse_timesteps
from mmd_export.scheduler_keys import CLASSES

WITH_AVERAGES = ("ddim", "guided")
_MODEL = (
    "digits, a diffusers folder, a run folder, a hub id owner/name, ddim:FILE, guided:FILE or "
    "python:package.module:attribute; docs/checkpoints.md"
)

Model = Annotated[str, typer.Argument(help=_MODEL, show_default=False)]
TunedModel = Annotated[
    str | None,
    typer.Argument(
        help="digits, a diffusers folder, a run folder, a hub id owner/name, ddim:FILE or guided:FILE",
        show_default=False,
    ),
]
Source = Annotated[str, typer.Argument(help=f"a bundle, or a model: {_MODEL}", show_default=False)]
BundleFolder = Annotated[Path, typer.Argument(help="a bundle folder", show_default=False)]
Steps = Annotated[int | None, typer.Option(help="network calls K; a run folder knows its own", show_default=False)]


def solver_of(sampler: str | None) -> str | None:
    """A sampler's own name where it is given as diffusers calls its class."""
    return None if sampler is None else CLASSES.get(sampler, sampler)


Sampler = Annotated[
    str | None,
    typer.Option(
        callback=solver_of,
        help="ddim, ddpm, euler, dpmsolver, unipc, lcm, ...: all are in docs/schedulers.md; default: the class in "
        "scheduler_config.json",
        show_default=False,
    ),
]
Eta = Annotated[
    float | None,
    typer.Option(help="DDIM: 0 deterministic (default), 1 as noisy as DDPM; TCD: its gamma", show_default=False),
]
Spacing = Annotated[
    str | None,
    typer.Option(
        help="leading, trailing, linspace or mmd-ddm (MMD-DDM's own grid); default: as in scheduler_config.json",
        show_default=False,
    ),
]
Timesteps = Annotated[
    str | None,
    typer.Option(
        help="the timestep of every call, descending, as in 999,749,499,249; instead of --steps and --spacing",
        show_default=False,
    ),
]
Ema = Annotated[
    str | None,
    typer.Option(
        help="of a ddim: or guided: file: true the average (default), false the plain weights, or the entry's name",
        show_default=False,
    ),
]
RuntimeName = Annotated[
    str | None,
    typer.Option("--runtime", help="NAME or onnxruntime:PROVIDER; default: the first that fits", show_default=False),
]
CheckpointOption = Annotated[
    str | None, typer.Option("--checkpoint", help="the model or run folder a bundle was built from", show_default=False)
]

TorchDevice = Annotated[
    str | None,
    typer.Option(
        "--device", help="of a model: auto (CUDA where there is one), cpu, cuda or cuda:NUMBER", show_default=False
    ),
]


def can_be_written(option: typer.CallbackParam, path: Path | None) -> Path | None:
    """``path``, of a file; raises UsageError now for what could not be written once the work is done."""
    if path is None or (path == Path("-") and "--json" in option.opts):
        return path
    try:
        reason = _why_not(path)
    except OSError as error:
        reason = error.strerror or str(error)
    if reason:
        raise UsageError(f"{max(option.opts, key=len)} {path} cannot be written: {reason}; name another file")
    return path


def _why_not(path: Path) -> str:
    """Why no file can be written at ``path``, whose folders are made; "" if nothing speaks against it."""
    if path.is_dir():
        return "it is a folder"
    place = Path(os.path.realpath(path))  # where a link leads, which need not be there; of one to itself too
    if bundle := next(filter(_holds_a_bundle, place.parents), None):
        return f"{bundle} is a bundle, which takes no other files"
    there = next(each for each in (place, *place.parents) if each.exists())
    if there == place:
        return "" if os.access(there, os.W_OK) else f"{there} is read-only"
    if not there.is_dir():
        return f"{there} is no folder"
    reason = why_nothing_is_made(there)
    return f"{there}: {reason}" if reason else ""


def _holds_a_bundle(folder: Path) -> bool:
    """Whether whatever else is put there makes a bundle one that is refused."""
    from mmd_export.manifest import GOLDEN_NAME, MANIFEST_NAME

    return (folder / MANIFEST_NAME).is_file() and (folder / GOLDEN_NAME).is_file()


JsonFile = Annotated[
    Path | None,
    typer.Option(
        "--json",
        help="also write the numbers to this file (- for stdout)",
        show_default=False,
        callback=can_be_written,
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace what stands at --out")]
SkipVerify = Annotated[bool, typer.Option("--skip-verify", help="write the bundle without measuring parity")]


def listed(timesteps: str | None) -> tuple[float, ...] | None:
    """``--timesteps``, if it was given."""
    return None if timesteps is None else parse_timesteps(timesteps)


def with_ema(model: str, ema: str | None) -> str:
    """``model`` with ``--ema`` behind it, as ``ddim:FILE?ema=NAME`` says the same."""
    if ema is None:
        return model
    kind, colon, place = model.partition(":")
    if not colon or kind not in WITH_AVERAGES:
        raise UsageError(f"--ema {ema} chooses an entry of a ddim: or guided: file; the model is {model}; leave it out")
    query = urlencode({"ema": ema})
    return f"{model}&{query}" if "?" in place and not Path(place).exists() else f"{model}?{query}"


def with_ema_if_given(model: str | None, ema: str | None) -> str | None:
    """The same where the model may stand in a TOML file instead."""
    if model is None and ema is not None:
        raise UsageError(f'--ema {ema} goes with a MODEL on the command line; in a file write model = "...?ema={ema}"')
    return None if model is None else with_ema(model, ema)


def positive(flag: str, value: int | None) -> None:
    """Raise UsageError for a number below 1."""
    at_least(flag, value, 1)


def at_least(flag: str, value: float | None, least: int) -> None:
    """Raise UsageError for a number below ``least``, and for one that is not finite."""
    if value is not None and not least <= value < math.inf:
        raise UsageError(f"{flag} is {value:g}; it must be at least {least}")


def png(flag: str, path: Path | None) -> None:
    """Raise UsageError for a picture that is to be called something else than what it is."""
    if path is not None and path.suffix.lower() not in ("", ".png"):
        raise UsageError(f"{flag} is {path}, pictures are written as PNG; name it {path.with_suffix('.png')}")


JunitFile = Annotated[
    Path | None,
    typer.Option("--junit", help="also write JUnit XML", show_default=False, callback=can_be_written),
]
SummaryFile = Annotated[
    Path | None,
    typer.Option(
        "--summary",
        help="append a Markdown summary, as to $GITHUB_STEP_SUMMARY",
        show_default=False,
        callback=can_be_written,
    ),
]

"""Read weights from disk: MODEL -> denoiser, scheduler settings, shapes, hash. torch and diffusers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from mmd_export.checkpoints.base import Checkpoint, describe
from mmd_export.checkpoints.classifier_free import apply_options
from mmd_export.checkpoints.diffusers_folder import NETWORKS, PLAN_FILE, download, read_folder
from mmd_export.checkpoints.folder_card import RECORD
from mmd_export.checkpoints.weights import PICKLE, SAFETENSORS
from mmd_export.errors import UsageError
from mmd_export.manifest import MANIFEST_NAME, CheckpointRef
from mmd_export.network_options import AS_IT_IS, NetworkOptions

__all__ = ["BUILT_IN", "PICKLE", "PLAN_FILE", "SAFETENSORS", "Checkpoint", "describe", "load_checkpoint",
           "load_matching"]  # fmt: skip

BUILT_IN = {"digits": Path(__file__).parent / "models" / "digits"}
FORMATS = ("ddim", "guided", "python")
_TRUTH = {  # what str2bool of guided-diffusion's commands knows
    **dict.fromkeys(("true", "t", "yes", "y", "1"), True),
    **dict.fromkeys(("false", "f", "no", "n", "0"), False),
}


def load_checkpoint(
    model: str | Path,
    *,
    ema: bool | str | None = None,
    sample_size: int | tuple[int, int] | None = None,
    network: NetworkOptions = AS_IT_IS,
) -> Checkpoint:
    """The network that ``model`` names.

    Args:
        model: ``digits``, a diffusers folder (pipeline or bare model), a run folder, a hub id ``owner/name``,
            ``ddim:FILE``, ``guided:FILE`` or ``python:package.module:attribute``. A file may be followed by
            ``?name=value&...``, as in ``ddim:ckpt.pth?ema=false&sample_size=64``: what the other arguments say.
        ema: of a file with several entries: True the average, False the plain weights, a name that entry; None the
            average if there is one.
        sample_size: of a file whose layout does not tell the size of the images.
        network: guidance, and the length of the text.

    Raises UsageError that names the file and what is wrong with it. Only a hub id uses the network.
    """
    return apply_options(_read(model, ema, sample_size, network), network)


def _read(
    model: str | Path, ema: bool | str | None, sample_size: int | tuple[int, int] | None, network: NetworkOptions
) -> Checkpoint:
    """The network as its source has it."""
    source = _parse(str(model))
    options = source.options | {
        name: value for name, value in (("ema", ema), ("sample_size", sample_size)) if value is not None
    }
    if source.format == "ddim":
        from mmd_export.checkpoints.ddim import read_ddim

        return read_ddim(source.path, **source.require(options, "ema", "sample_size", "scheduler"))
    if source.format == "guided":
        from mmd_export.checkpoints.guided import OPTIONS, read_guided

        return read_guided(source.path, **source.require(options, "ema", "sample_size", "scheduler", *OPTIONS))
    if source.format == "python":
        from mmd_export.checkpoints.python_module import read_python

        return read_python(source.place, **source.require(options, "sample_size"))
    source.require(options)
    local, folder = Path(source.place), _locate(source.place)
    if source.place in BUILT_IN:
        return read_folder(folder, source.place, "Apache-2.0", network)
    if local.is_dir():
        return read_folder(folder, local.resolve().name, options=network)
    return replace(read_folder(folder, local.name, options=network), hub_id=source.place)


def load_matching(
    model: str,
    wanted: CheckpointRef,
    *,
    ema: bool | str | None = None,
    sample_size: int | tuple[int, int] | None = None,
) -> Checkpoint:
    """The checkpoint that a bundle was built from, told apart by its hash; raises UsageError with both hashes.

    It has the guidance of the bundle, and its decoder only if the bundle has one.
    """
    network = NetworkOptions.from_dict(wanted.options)
    checkpoint = load_checkpoint(model, ema=ema, sample_size=sample_size, network=network)
    if checkpoint.network_sha256 == wanted.sha256:
        return checkpoint.ending_in(image=False)
    if checkpoint.sha256 != wanted.sha256:
        raise UsageError(
            f"checkpoint {checkpoint.name} has hash {checkpoint.sha256[:12]}, the bundle was built from {wanted.name} "
            f"with {wanted.sha256[:12]}; pass the folder it was built from"
        )
    return checkpoint


@dataclass(frozen=True)
class _Source:
    """``format:place?options``; ``format`` is empty for a folder, a hub id or a built-in name."""

    format: str
    place: str
    options: dict[str, Any]

    @property
    def path(self) -> Path:
        """``place`` as a file that exists."""
        path = Path(self.place)
        if not path.is_file():
            what = "is a folder" if path.is_dir() else "does not exist"
            raise UsageError(f"model {self.format}:{self.place}: the file {what}; a checkpoint file is expected")
        return path

    def require(self, options: dict[str, Any], *known: str) -> dict[str, Any]:
        """``options``, all of them known to this kind of source."""
        if unknown := sorted(set(options) - set(known)):
            kind = f"{self.format}: takes {', '.join(known)}" if known else "a diffusers folder takes none"
            raise UsageError(f"model {self.place}: option {unknown[0]}={options[unknown[0]]} has no meaning; {kind}")
        return options


def _parse(model: str) -> _Source:
    kind, colon, place = model.partition(":")
    if not colon or kind not in FORMATS:
        return _Source("", model, {})
    options: dict[str, Any] = {}
    if not Path(place).exists() and "?" in place:
        place, _, query = place.rpartition("?")
        for name, text in parse_qsl(query, keep_blank_values=True):
            options[name] = _value(model, name, text)
    return _Source(kind, place, options)


def _value(model: str, name: str, text: str) -> Any:
    """A word of ``_TRUTH``, a whole number, a size as HEIGHTxWIDTH, else the text itself."""
    if name == "scheduler":
        return text
    if name == "ema":
        return _TRUTH.get(text.lower(), text) if len(text) > 1 else text  # an entry may have such a name
    if name in ("sample_size", "image_size"):
        parts = text.lower().split("x")
        if not all(part.isdecimal() for part in parts) or len(parts) > 2:
            raise UsageError(f"model {model}: {name} is {text!r}; a number or HEIGHTxWIDTH is expected")
        return int(parts[0]) if len(parts) == 1 else (int(parts[0]), int(parts[1]))
    return int(text) if text.removeprefix("-").isdecimal() else _TRUTH.get(text.lower(), text)


def _locate(model: str) -> Path:
    if model in BUILT_IN:
        return BUILT_IN[model]
    if not model:
        raise UsageError(f"no model is given; name one: {', '.join(BUILT_IN)}, a folder or a hub id")
    folder = Path(model)
    if folder.is_dir():
        _require_network(folder)
        return folder
    if folder.exists():
        raise UsageError(
            f"model {model} is a file; a diffusers folder, a hub id or one of {', '.join(BUILT_IN)} is expected; "
            "an original DDIM or DDPM checkpoint is ddim:FILE, one of guided-diffusion guided:FILE"
        )
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        near = get_close_matches(model, BUILT_IN, 1)
        meant = f"; did you mean {near[0]}?" if near else f"; built in: {', '.join(BUILT_IN)}"
        raise UsageError(f"model {model} does not exist{meant}")
    return download(model)


def _require_network(folder: Path) -> None:
    """Raise UsageError for a folder that is something else, or that holds no network yet."""
    if any((folder / name).is_dir() for name in NETWORKS) or (folder / "config.json").is_file():
        return
    if (folder / MANIFEST_NAME).is_file():
        raise UsageError(f"{folder} is a bundle; give the model or the run folder that it was built from")
    if (folder / RECORD).is_file():
        raise UsageError(
            f"{folder} is the folder of a run that is not finished; go on with finetune --resume --out {folder}, or "
            "end it with --finish too"
        )
    parts = " nor ".join(f"{name}/" for name in NETWORKS)
    raise UsageError(
        f"{folder} holds no network: {folder / 'config.json'} does not exist, nor {parts}; give the folder that has one"
    )

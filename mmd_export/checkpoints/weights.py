"""Tensors from files: safetensors, sharded safetensors, pickles by ``weights_only=True``; which entry; which hash."""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmd_export.errors import UsageError
from mmd_export.schedule import SchedulerConfig

StateDict = dict[str, Tensor]
SAFETENSORS, PICKLE = "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"
INDEX, HALF = f"{SAFETENSORS}.index.json", "diffusion_pytorch_model.fp16.safetensors"
HALF_INDEX = f"{SAFETENSORS}.index.fp16.json"
DATA_PARALLEL = "module."
SHOWN = 4  # keys in a message
# Where files and trainers keep the plain weights, in the order of preference: DDIM's and MMD-DDM's lists, then dicts.
_PLAIN = ("0", "model", "state_dict", "model_state_dict", "net_model", "net", "unet")
_OF_OPTIMIZER = {"state", "param_groups"}
# How diffusers named the attention of its first UNets and autoencoders; its own loader renames them too
# (ModelMixin._convert_deprecated_attention_blocks, diffusers/models/modeling_utils.py, 0.42).
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}

_FOUND = re.compile(r"(Trying to load |Unsupported |GLOBAL )", re.IGNORECASE)  # of torch's unpickler


@dataclass(frozen=True)
class Entry:
    """One state dict of a file: ``name`` is its key or its place in the list, empty for a file that is one."""

    name: str
    weights: StateDict

    @property
    def is_ema(self) -> bool:
        """An exponential moving average by its name, or by its place: DDIM's list has five entries, EMA the last."""
        return "ema" in re.split(r"[^a-z]+", self.name.lower()) or self.name == "4"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; raises UsageError that names the file."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist; a diffusers folder holds it") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UsageError(f"{path} is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise UsageError(f"{path} holds {type(data).__name__}, not a JSON object")
    return data


def read_safetensors(path: Path) -> StateDict:
    """All tensors of one file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UsageError(f"weights {path} cannot be read ({error}); copy or download them again") from error


def read_shards(index: Path) -> StateDict:
    """All tensors of a ``*.safetensors.index.json`` and the files beside it that its ``weight_map`` names."""
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not listed or not all(isinstance(name, str) for name in listed.values()):
        raise UsageError(f"weights {index}: weight_map is missing or is not a list of tensor -> file")
    weights: StateDict = {}
    for name in sorted(set(listed.values())):
        if Path(name).name != name or name in (".", ".."):
            raise UsageError(f"weights {index}: weight_map names {name!r}; only files beside it are read")
        if not (index.parent / name).is_file():
            raise UsageError(f"weights {index}: the shard {name} does not exist; copy or download it again")
        weights |= read_safetensors(index.parent / name)
    if differs := sorted(set(weights) ^ set(listed)):
        where = "in no shard" if differs[0] in listed else "not in weight_map"
        raise UsageError(f"weights {index}: {len(differs)} tensors do not match, {differs[0]!r} is {where}")
    return weights


def read_pickle(path: Path) -> Any:
    """What torch.load gives with ``weights_only=True``; nothing else is ever tried."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the pickle's protocol; the outcome says more
            return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise UsageError(
            f"weights {path} are refused by weights_only=True or damaged ({_reason(error)}); convert to safetensors"
        ) from None


def _reason(error: Exception) -> str:
    """What torch.load found, without its advice to load the file nonetheless."""
    lines = [line.strip().removeprefix("WeightsUnpickler error:").strip() for line in str(error).splitlines()]
    found = next((line for line in lines if _FOUND.match(line)), "")
    return found.split(" was not an allowed")[0].rstrip(".") or next(filter(None, lines), type(error).__name__)


def pickle_warning(path: Path) -> str:
    """What the user hears of every pickle."""
    return f"{path.name} is a pickle, read with weights_only=True; prefer safetensors"


def read_weights(folder: Path) -> tuple[StateDict, tuple[str, ...]]:
    """Tensors by name, float32: one safetensors file, else shards, else the fp16 variant, else a pickle."""
    for name, read in (
        (SAFETENSORS, read_safetensors),
        (INDEX, read_shards),
        (HALF, read_safetensors),
        (HALF_INDEX, read_shards),
    ):
        if (folder / name).is_file():
            return as_float32(read(folder / name))
    if (path := folder / PICKLE).is_file():
        data = read_pickle(path)
        if not is_state_dict(data):
            raise UsageError(f"weights {path} hold {type(data).__name__}, not a state dict of tensors")
        weights, warnings = as_float32(dict(data))
        return weights, (pickle_warning(path), *warnings)
    raise UsageError(f"weights {folder / SAFETENSORS} do not exist")


def is_state_dict(value: Any) -> bool:
    """Names to tensors, and at least one."""
    return (
        isinstance(value, Mapping)
        and bool(value)
        and all(isinstance(key, str) and isinstance(tensor, Tensor) for key, tensor in value.items())
    )


def read_entries(path: Path) -> tuple[list[Entry], tuple[str, ...]]:
    """Every state dict in a checkpoint file, ``module.`` of DataParallel taken off, and the warnings."""
    if not path.is_file():
        raise UsageError(f"weights {path} do not exist")
    if path.suffix == ".safetensors":
        return [Entry("", without_prefix(read_safetensors(path)))], ()
    data = read_pickle(path)
    warnings = (pickle_warning(path),)
    if is_state_dict(data):
        return [Entry("", without_prefix(dict(data)))], warnings
    if isinstance(data, list | tuple):
        parts: dict[str, Any] = {str(place): part for place, part in enumerate(data)}
    elif isinstance(data, Mapping):
        parts = {str(key): part for key, part in data.items()}
    else:
        raise UsageError(f"weights {path} hold {type(data).__name__}, not a state dict of tensors")
    entries = [Entry(name, without_prefix(dict(part))) for name, part in parts.items() if is_state_dict(part)]
    if not entries:
        found = ", ".join(f"{name}: {_kind(part)}" for name, part in list(parts.items())[:SHOWN])
        raise UsageError(f"weights {path} hold no state dict of tensors, but {found or 'nothing'}")
    return entries, warnings


def _kind(value: Any) -> str:
    if isinstance(value, Mapping) and set(value) >= _OF_OPTIMIZER:
        return "an optimizer"
    return type(value).__name__


def without_prefix(weights: StateDict) -> StateDict:
    """``module.`` off every key, if every key has it."""
    if not all(name.startswith(DATA_PARALLEL) for name in weights):
        return weights
    return {name.removeprefix(DATA_PARALLEL): tensor for name, tensor in weights.items()}


def choose_entry(entries: list[Entry], ema: bool | str | None, path: Path) -> Entry:
    """The entry that ``--ema`` names: True the average, False the plain weights, None the average if there is one."""
    named = {entry.name: entry for entry in entries}
    names = ", ".join(name or "the file itself" for name in named)
    if isinstance(ema, str):
        if ema not in named:
            raise UsageError(f"weights {path}: --ema is {ema!r}; the file has {names}")
        return named[ema]
    averages = [entry for entry in entries if entry.is_ema]
    plain = [entry for entry in entries if not entry.is_ema]
    if len(averages) > 1 and ema is not False:
        found = ", ".join(entry.name for entry in averages)
        raise UsageError(f"weights {path}: {len(averages)} entries are averages ({found}); name one with --ema NAME")
    if averages and ema is not False:
        return averages[0]
    if ema is True:
        raise UsageError(f"weights {path}: --ema asks for an average; the file has {names}")
    preferred = [entry for name in _PLAIN for entry in plain if entry.name == name]
    chosen = preferred or plain
    if not chosen or (len(chosen) > 1 and not preferred):
        raise UsageError(f"weights {path}: which weights are meant is not clear, it has {names}; name one: --ema NAME")
    return chosen[0]


def as_float32(weights: StateDict) -> tuple[StateDict, tuple[str, ...]]:
    """Half-precision tensors upcast, exact; float64 ones rounded, with a warning."""
    kinds = {str(tensor.dtype).removeprefix("torch.") for tensor in weights.values() if tensor.is_floating_point()}
    other = sorted(kinds - {"float32"})
    converted = {
        name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in weights.items()
    }  # fmt: skip
    verb = "rounded" if "float64" in other else "upcast"
    return converted, (f"weights are {', '.join(other)}; {verb} to float32",) if other else ()


def load_strictly(network: nn.Module, weights: Mapping[str, Tensor], where: str) -> None:
    """Copy ``weights`` into ``network``; raises UsageError for a name, a shape or a value that does not fit."""
    expected = network.state_dict()
    weights = _with_new_names(weights, expected)
    if missing := sorted(set(expected) - set(weights)):
        strays = sorted(set(weights) - set(expected))
        other = f"; unexpected: {listed(strays)}" if strays else ""
        raise UsageError(f"weights in {where} do not fit the config; missing: {listed(missing)}{other}")
    if unexpected := sorted(set(weights) - set(expected)):
        raise UsageError(f"weights in {where} do not fit the config; unexpected: {listed(unexpected)}")
    for name, tensor in weights.items():
        if tensor.shape != expected[name].shape:
            raise UsageError(
                f"weights in {where}: {name} is {tuple(tensor.shape)}, the config says {tuple(expected[name].shape)}"
            )
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise UsageError(f"weights in {where}: {name} holds NaN or infinity")
    network.load_state_dict(dict(weights))


def _with_new_names(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Attention tensors under today's names, where the network has those and not the old ones."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        block, _, rest = name.rpartition(".")
        owner, _, layer = block.rpartition(".")
        new = f"{owner}.{_OLD_ATTENTION.get(layer, layer)}.{rest}"
        renamed[new if name not in expected and new in expected and new not in weights else name] = tensor
    return renamed


def hash_weights(
    weights: Mapping[str, Tensor], config: Mapping[str, Any], scheduler: SchedulerConfig | None = None
) -> str:
    """SHA-256 over names, types, shapes and bytes of all tensors and over both configs; free of paths and formats.

    Of the scheduler's, what its own class reads: what a file says for others, the digest of a plan tells.
    """
    digest = hashlib.sha256()
    public = {key: value for key, value in config.items() if not key.startswith("_")}
    digest.update(json.dumps([public, repr(scheduler)], sort_keys=True).encode())
    for name in sorted(weights):
        tensor = weights[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.view(torch.uint8).numpy().tobytes() if tensor.dim() else tensor.numpy().tobytes())
    return digest.hexdigest()


def listed(names: list[str]) -> str:
    """A few of many keys, for a message."""
    return ", ".join(names[:SHOWN]) + (f", ... ({len(names)} in all)" if len(names) > SHOWN else "")

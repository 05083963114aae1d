"""``python:package.module:attribute``: any nn.Module, or a function without arguments that makes one.

The module is called as ``network(x, timestep)``, or ``network(x, timestep, class_labels)`` if it has ``num_classes``:
x (B, C, H, W), timestep (1,), class_labels int64 (B). It returns the prediction (B, C, H, W). ``sample_shape`` (or
``shape``) is (C, H, W); ``scheduler_config`` is what a scheduler_config.json would hold; ``conditions`` names what it
takes besides, by keyword; ``latent`` says that x is a latent, which is not clamped; ``preconditioned`` that it is EDM's
D, called as ``network(x, sigma)``. Importing runs its code.
"""

from __future__ import annotations

import hashlib
import importlib
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from mmd_export.checkpoints.agreement import require_stated_prediction
from mmd_export.checkpoints.base import Checkpoint
from mmd_export.checkpoints.diffusers_folder import PICTURES
from mmd_export.checkpoints.families import NEGATIVE
from mmd_export.checkpoints.gradient import GradientDenoiser
from mmd_export.checkpoints.static import Signature, first_line, require_static
from mmd_export.checkpoints.weights import hash_weights
from mmd_export.conditions import CLASS_LABELS, Condition, class_condition
from mmd_export.denoiser import EdmRaw, ModuleDenoiser
from mmd_export.errors import UsageError
from mmd_export.schedule import SchedulerConfig

TIMESTEP, C_NOISE = 500, 0.25  # where a module is tried out: in the middle, and at sigma = e of an EDM network
RESERVED = ("x", "timestep", "noise", "step_noise", "sample")  # names of the network's and the graph's own


def read_python(place: str, *, sample_size: int | tuple[int, int] | None = None) -> Checkpoint:
    """The network that ``place`` names; raises UsageError with what it lacks or does that a graph cannot."""
    where = f"model python:{place}"
    module, attribute = _import(place, where)
    network = _network(attribute, where)
    shape = _shape(network, sample_size, where)
    classes, latent = _classes(network, where), _flag(network, "latent", where)
    conditions = (*class_condition(classes), *_conditions(network, classes, where))
    scheduler, warnings = _scheduler(network, where)
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise UsageError(f"{where}: {name} holds NaN or infinity")
    called, timestep = _called(network, scheduler, where)
    signature = Signature(shape, conditions, timestep)
    denoiser: nn.Module = ModuleDenoiser(called)
    if require_static(called, signature, where):
        denoiser = GradientDenoiser(called, signature, where)
        denoiser.require_equal()
    file = Path(module.__file__) if module.__file__ else None
    source = hashlib.sha256(file.read_bytes()).hexdigest() if file and file.is_file() else ""
    own = {"class": type(network).__qualname__, "source": source, "shape": list(shape), "classes": classes}
    if latent or conditions != class_condition(classes):
        own |= {"latent": latent, "conditions": repr(conditions)}
    if called is not network:
        own |= {"preconditioned": True}
    if not latent and shape[0] not in PICTURES and not hasattr(network, "latent"):
        warnings += (f"{where} has {shape[0]} channels: taken for pixels in [-1, 1] and clamped; or say latent = True",)
    return Checkpoint(
        name=place.rpartition(":")[2].rpartition(".")[2],
        folder=file.parent if file else Path(),
        denoiser=denoiser.eval().requires_grad_(False),
        scheduler=scheduler,
        shape=shape,
        sha256=hash_weights(network.state_dict(), own, scheduler),
        conditions=conditions,
        unconditional={each.name: NEGATIVE[each.name] for each in conditions if each.name in NEGATIVE},
        warnings=warnings,
        latent=latent,
        no_decoder="a Python module has none",
    )


def _import(place: str, where: str) -> tuple[ModuleType, Any]:
    """The module and the attribute; the working folder is looked in too, as ``python -m`` does."""
    name, colon, path = place.partition(":")
    if not colon or not name or not path:
        raise UsageError(f"{where}: package.module:attribute is expected, as in python:mynets.unet:make_unet")
    here = str(Path.cwd())
    added = here not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(name)
    except Exception as error:  # importing runs the module's own code
        raise UsageError(f"{where}: {name} cannot be imported: {first_line(error)}") from error
    finally:
        if added and here in sys.path:
            sys.path.remove(here)
    attribute: Any = module
    for part in path.split("."):
        if not hasattr(attribute, part):
            known = sorted(key for key, value in vars(module).items() if callable(value) and not key.startswith("_"))
            raise UsageError(f"{where}: {name} has no {path}; it has {', '.join(known[:8]) or 'nothing callable'}")
        attribute = getattr(attribute, part)
    return module, attribute


def _network(attribute: Any, where: str) -> nn.Module:
    """The nn.Module, made if need be; on the CPU, in float32, evaluating, no gradients for its weights."""
    if not isinstance(attribute, nn.Module):
        if not callable(attribute):
            raise UsageError(
                f"{where} is {type(attribute).__name__}; an nn.Module or a function that makes one is expected"
            )
        try:
            attribute = attribute()
        except Exception as error:  # the factory is foreign code
            raise UsageError(f"{where}: calling it without arguments fails: {first_line(error)}") from error
    if not isinstance(attribute, nn.Module):
        raise UsageError(f"{where} makes {type(attribute).__name__}; an nn.Module is expected")
    return attribute.cpu().float().eval().requires_grad_(False)


def _shape(network: nn.Module, size: int | tuple[int, int] | None, where: str) -> tuple[int, int, int]:
    stated = next((getattr(network, name) for name in ("sample_shape", "shape") if hasattr(network, name)), None)
    try:
        channels, height, width = (int(side) for side in stated)  # type: ignore[union-attr]
    except (TypeError, ValueError):
        raise UsageError(f"{where}: sample_shape is {stated!r}; (channels, height, width) is expected") from None
    if size is not None:
        height, width = (size, size) if isinstance(size, int) else size
    if min(channels, height, width) < 1:
        raise UsageError(f"{where}: sample_shape is {(channels, height, width)}; positive numbers are expected")
    return channels, height, width


def _classes(network: nn.Module, where: str) -> int | None:
    classes = getattr(network, "num_classes", None)
    if classes is not None and (not isinstance(classes, int) or isinstance(classes, bool) or classes < 1):
        raise UsageError(f"{where}: num_classes is {classes!r}; a positive whole number or None is expected")
    return classes


def _flag(network: nn.Module, name: str, where: str) -> bool:
    flag = getattr(network, name, False)
    if not isinstance(flag, bool):
        raise UsageError(f"{where}: {name} is {flag!r}; True or False is expected")
    return flag


def _called(network: nn.Module, scheduler: SchedulerConfig, where: str) -> tuple[nn.Module, float]:
    """What the plan calls, F where the module is EDM's D, and the timestep to try it at."""
    edm = scheduler.predicts.startswith("edm")
    if not _flag(network, "preconditioned", where):
        return network, C_NOISE if edm else TIMESTEP
    if scheduler.predicts != "edm":
        raise UsageError(
            f"{where}: preconditioned is True, {scheduler.class_name} expects {scheduler.predicts}; D(x; sigma) goes "
            "with EDMEulerScheduler or EDMDPMSolverMultistepScheduler of prediction_type epsilon"
        )
    return EdmRaw(network, scheduler["sigma_data"]), C_NOISE


def _conditions(network: nn.Module, classes: int | None, where: str) -> tuple[Condition, ...]:
    """What ``conditions`` names besides the class labels of ``num_classes``."""
    stated = getattr(network, "conditions", {})
    if not isinstance(stated, Mapping):
        raise UsageError(f"{where}: conditions is {type(stated).__name__}; a dict of name -> shape is expected")
    taken = {*RESERVED, *NEGATIVE.values(), *(() if classes is None else (CLASS_LABELS,))}
    for name in stated:
        if not isinstance(name, str) or not name.isidentifier() or name in taken:
            raise UsageError(f"{where}: conditions names {name!r}, which is taken or no identifier; rename it")
    return tuple(_condition(name, facts, where) for name, facts in stated.items())


def _condition(name: str, facts: Any, where: str) -> Condition:
    """Float32 values of the shape ``facts``, or what a dict of dtype, shape and below says."""
    given = dict(facts) if isinstance(facts, Mapping) else {"shape": facts}
    dtype, shape, below = given.pop("dtype", "float32"), given.pop("shape", None), given.pop("below", None)
    sized = isinstance(shape, list | tuple) and all(isinstance(side, int) and side > 0 for side in shape)
    bounded = isinstance(below, int) and below > 0 if dtype == "int64" else below is None
    if given or not sized or not bounded or dtype not in ("float32", "int64"):
        raise UsageError(
            f"{where}: conditions[{name!r}] is {facts!r}; a shape without the batch is expected, as (77, 768), or of "
            'whole numbers {"dtype": "int64", "shape": (77,), "below": 2}'
        )
    return Condition(name, dtype, tuple(shape), below)


def _scheduler(network: nn.Module, where: str) -> tuple[SchedulerConfig, tuple[str, ...]]:
    stated = getattr(network, "scheduler_config", None)
    if stated is None:
        scheduler = SchedulerConfig()
        assumed = (
            f"{where} states no scheduler_config; taken as {scheduler.class_name}, {scheduler.beta_schedule} betas "
            f"{scheduler.beta_start:g} to {scheduler.beta_end:g}, {scheduler.prediction_type} prediction"
        )
        return scheduler, (assumed,)
    if not isinstance(stated, Mapping):
        raise UsageError(f"{where}: scheduler_config is {type(stated).__name__}, not a dict")
    try:
        scheduler = SchedulerConfig.from_dict({"_class_name": "DDIMScheduler", **stated})
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from error
    require_stated_prediction(getattr(network, "prediction_type", None), scheduler, where)
    return scheduler, ()

"""Faults planted in a bundle, one at a time, and the ladder's answer; ``benchmarks.fault_injection`` runs them all.

The model is a random 8x8 network of 3 channels with attention that predicts v, sampled by DDIM with eta 0.5, so that
every part of a plan is in use. A fault of an artefact is sealed again with the honest golden file, so that no hash but
only parity can see it.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mmd_export import ladder
from mmd_export.build import BuildOptions, build
from mmd_export.bundle import Bundle, ManifestDraft, write_bundle
from mmd_export.checkpoint import Checkpoint, load_checkpoint
from mmd_export.onnx_compose import Composer
from mmd_export.parity import ParityReport, Rung, check_artefact
from mmd_export.plan import Step, StepPlan, Term
from mmd_export.program import SamplerProgram, export_program
from mmd_export.reference import golden_arrays
from mmd_export.runtime import RunOptions
from mmd_export.targets import CompileOptions, get_target
from mmd_runtime.registry import runtime_for

STEPS = 3
ETA = 0.5
NETWORK: dict[str, Any] = {
    "sample_size": 8, "in_channels": 3, "out_channels": 3, "layers_per_block": 1, "block_out_channels": (16, 32),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 4, "attention_head_dim": 8,
}  # fmt: skip
WILD = 1e6  # times the first convolution: activations beyond half precision
WEIGHT_FILES = {"onnx": "model.onnx", "openvino": "model.bin", "coreml": "weight.bin"}


def save_network(folder: Path, wild: float = 1.0, layer: str = "conv_in") -> Path:
    """A flat diffusers folder; ``wild`` scales the weights of one layer."""
    from diffusers import DDIMScheduler, UNet2DModel

    torch.manual_seed(11)
    unet = UNet2DModel(**NETWORK)
    for parameter in list(unet.parameters()):  # zero biases and unit norms would hide swapped tensors
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    unet.get_parameter(f"{layer}.weight").data.mul_(wild)
    unet.save_pretrained(folder)
    DDIMScheduler(prediction_type="v_prediction").save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Lab:
    """Honest bundles by target, and what it takes to plant faults in them."""

    scratch: Path
    made: dict[str, Bundle] = field(default_factory=dict)
    stages: dict[str, tuple[Rung, ...]] = field(default_factory=dict)

    @cached_property
    def model(self) -> Path:
        """The checkpoint's folder."""
        return save_network(self.scratch / "network")

    @cached_property
    def checkpoint(self) -> Checkpoint:
        return load_checkpoint(str(self.model))

    @cached_property
    def plan(self) -> StepPlan:
        return self.checkpoint.plan_for(STEPS, eta=ETA)

    def honest(self, target: str, output: str = "float32") -> Bundle:
        """The bundle as ``build`` makes it."""
        key = f"{target}-{output}"
        if key not in self.made:
            options = BuildOptions(str(self.model), target, self.scratch / key, output=output, steps=STEPS, eta=ETA)
            self.made[key] = build(options)
        return self.made[key]

    def place(self) -> Path:
        """A folder for one more bundle; the one before is gone."""
        out = self.scratch / "faulty"
        shutil.rmtree(out, ignore_errors=True)
        return out

    def sealed(self, good: Bundle, write: Callable[[Path], object], **changes: Any) -> Bundle:
        """A whole bundle with the golden file of ``good`` (or ``golden=``) and an artefact of its own."""
        arrays = changes.pop("golden", None) or golden_of(good)
        fields = {name: getattr(good.manifest, name) for name in ManifestDraft.model_fields} | changes

        def artefact(folder: Path) -> None:
            write(folder)

        return write_bundle(self.place(), ManifestDraft(**fields), artefact, arrays, good.card)

    def compiled(
        self, target: str, denoiser: nn.Module | None = None, plan: StepPlan | None = None, output: str = "float32"
    ) -> Callable[[Path], object]:
        """Writes the artefact of another network or plan."""
        network = self.checkpoint.denoiser if denoiser is None else denoiser
        program = export_program(network, plan or self.plan, self.checkpoint.shape, 1)
        return lambda folder: get_target(target).compile(program, folder, CompileOptions(output=output))

    def judge(self, bundle: Bundle, *, upstream: bool = False) -> ParityReport:
        """The whole ladder; rungs 1 to 5 once for all bundles that have only another artefact."""
        key = "honest" if not upstream else ""
        rungs = self.stages.get(key) or self._stages(bundle)
        if key:
            self.stages[key] = rungs
        runtime = runtime_for(bundle.manifest.format)
        artefact = check_artefact(bundle, runtime, RunOptions(1))
        return ParityReport(bundle.name, runtime.name, (*rungs, artefact))

    def _stages(self, bundle: Bundle) -> tuple[Rung, ...]:
        plan, scheduler = StepPlan.from_dict(bundle.manifest.plan), self.checkpoint.scheduler
        of_plan = ladder.exact_rung(plan, scheduler), ladder.scheduler_rung(plan, scheduler)
        return (*of_plan, *ladder.stage_rungs(bundle, self.checkpoint, plan))


def golden_of(bundle: Bundle) -> dict[str, NDArray[Any]]:
    """The arrays of a golden file."""
    golden = bundle.golden()
    states = {f"state.{k}": state for k, state in enumerate(golden.states, start=1)}
    return dict(golden.inputs) | {"sample": golden.sample} | states


# --- faults of the bytes


def convolutions(network: nn.Module) -> list[Tensor]:
    """Weights that every target stores as they are."""
    return [module.weight.detach() for module in network.modules() if isinstance(module, nn.Conv2d)]


def patched(
    lab: Lab, good: Bundle, draw: np.random.Generator, change: Callable[[np.ndarray[Any, Any]], None]
) -> Bundle:
    """One weight of one convolution changed where it lies in the artefact's file."""
    weights = convolutions(lab.checkpoint.denoiser)
    weight = weights[int(draw.integers(len(weights)))].numpy().copy()
    flat = np.abs(weight).reshape(-1)
    place = int(draw.choice(np.flatnonzero(flat >= np.median(flat))))
    before = weight.tobytes()
    change(weight.reshape(-1)[place : place + 1])

    def write(folder: Path) -> None:
        copy_artefact(good, folder)
        (path,) = folder.rglob(WEIGHT_FILES[good.manifest.target])
        data = path.read_bytes()
        if data.count(before) != 1:
            raise ValueError(f"{path.name} holds a weight {data.count(before)} times, not once")
        path.write_bytes(data.replace(before, weight.tobytes()))

    return lab.sealed(good, write)


def copy_artefact(good: Bundle, folder: Path) -> None:
    """Every file but the golden one, the card and the manifest."""
    for entry in good.manifest.files:
        if entry.path not in ("golden.safetensors", "README.md"):
            (folder / entry.path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(good.folder / entry.path, folder / entry.path)


def flip(bit: int) -> Callable[[np.ndarray[Any, Any]], None]:
    """Flips a bit of a float32; 31 is the sign, 30 to 23 the exponent."""

    def change(value: np.ndarray[Any, Any]) -> None:
        value.view(np.uint32)[:] ^= np.uint32(1 << bit)

    return change


def to_nan(value: np.ndarray[Any, Any]) -> None:
    """No number."""
    value[:] = np.nan


# --- faults of the network


def with_activation(network: nn.Module, place: int, activation: nn.Module) -> nn.Module:
    """The network with one of its nonlinearities swapped, or dropped (``nn.Identity``)."""
    changed = copy.deepcopy(network)
    found = [
        (parent, name)
        for parent in changed.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.SiLU) and name == "nonlinearity"
    ]
    parent, name = found[place % len(found)]
    setattr(parent, name, activation)
    return changed


def perturbed(network: nn.Module, seed: int, size: float = 0.01) -> nn.Module:
    """Weights of another training step."""
    changed, draw = copy.deepcopy(network), torch.Generator().manual_seed(seed)
    for parameter in changed.parameters():
        parameter.data.mul_(1.0 + size * torch.randn(parameter.shape, generator=draw))
    return changed


class FlippedChannels(nn.Module):
    """The channels in reverse order, as a BGR mix-up leaves them."""

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        output: Tensor = self.denoiser(x.flip(1), timestep)
        return output.flip(1)


class Saturated(nn.Module):
    """Gives a number so large that every clean guess is clamped at the same end."""

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        output: Tensor = 1e-3 * self.denoiser(x, timestep) - 1e4
        return output


class Louder(nn.Module):
    """An exported program that gives a little more than it should."""

    def __init__(self, inner: nn.Module, factor: float) -> None:
        super().__init__()
        self.inner, self.factor = inner, factor

    def forward(self, x: Tensor, k: int, **conditions: Tensor) -> Tensor:
        output: Tensor = self.factor * self.inner(x, k, **conditions)
        return output


# --- faults of the plan


def wrong_coefficient(plan: StepPlan, k: int, draw: np.random.Generator, size: float = 0.01) -> StepPlan:
    """One weight of step k off by ``size``."""
    update = list(plan.steps[k].update)
    i = int(draw.integers(len(update)))
    update[i] = Term(update[i].source, update[i].index, update[i].weight + size)
    return changed_step(plan, k, update=tuple(update))


def changed_step(plan: StepPlan, k: int, **changes: Any) -> StepPlan:
    step: Step = replace(plan.steps[k], **changes)
    return replace(plan, steps=(*plan.steps[:k], step, *plan.steps[k + 1 :]))


def consistent(lab: Lab, wrong: StepPlan) -> ParityReport:
    """A bundle all of whose parts agree on a wrong plan: only the plan's own rungs can tell."""
    golden = golden_arrays(lab.checkpoint, wrong, 4)
    bundle = lab.sealed(lab.honest("onnx"), lab.compiled("onnx", plan=wrong), plan=wrong.to_dict(), golden=golden)
    return lab.judge(bundle, upstream=True)


# --- faults inside a stage


@contextmanager
def wrong_table(k: int) -> Iterator[None]:
    """One channel of the folded time path of call k is off."""

    def export(*arguments: Any) -> SamplerProgram:
        program = export_program(*arguments)
        buffers = dict(program.denoiser.named_buffers())
        with torch.no_grad():
            buffers[f"time_{k}_0"].flatten()[0] += 0.1
        return program

    with mock.patch.object(ladder, "export_program", export):
        yield


@contextmanager
def wrong_program(factor: float) -> Iterator[None]:
    """The exported program gives ``factor`` times its output."""
    runner = SamplerProgram.runner
    with mock.patch.object(SamplerProgram, "runner", lambda self: Louder(runner(self), factor)):
        yield


@contextmanager
def truncating() -> Iterator[None]:
    """Bytes made by Floor in the place of Round."""
    op = Composer.op

    def floored(self: Composer, op_type: str, *arguments: Any, **attributes: Any) -> Any:
        return op(self, "Floor" if op_type == "Round" else op_type, *arguments, **attributes)

    with mock.patch.object(Composer, "op", floored):
        yield


@contextmanager
def without_islands() -> Iterator[None]:
    """Half precision everywhere, whatever the ranges: what a naive converter does."""
    from mmd_export.coreml import probe
    from mmd_export.precision import lower

    with (
        mock.patch.object(lower, "islands", return_value={}),
        mock.patch.object(probe, "find_islands", return_value=frozenset()),
    ):
        yield


def overflowing(lab: Lab, target: str) -> ParityReport:
    """Half precision without islands of a network whose activations leave it."""
    wild = save_network(lab.scratch / "wild", WILD)
    options = BuildOptions(str(wild), target, lab.place(), "fp16", verify=False, steps=STEPS, eta=ETA)
    if target == "openvino":
        bundle = _with_infinite_weights(lab, replace(options, precision="w16", out=lab.scratch / "wild-w16"))
    else:
        with without_islands():
            bundle = build(options)
    runtime = runtime_for(bundle.manifest.format)
    return ParityReport(bundle.name, runtime.name, (check_artefact(bundle, runtime, RunOptions(1)),))


def _with_infinite_weights(lab: Lab, options: BuildOptions) -> Bundle:
    """Weights beyond half precision stored in it all the same; OpenVINO by itself leaves those in float32."""
    good = build(replace(options, overwrite=True))
    halved = copy.deepcopy(load_checkpoint(options.model).denoiser)
    for parameter in halved.parameters():
        parameter.data = parameter.data.half().float()
    return lab.sealed(good, lab.compiled(options.target, denoiser=halved))


def with_golden(lab: Lab, changes: Mapping[str, NDArray[Any]]) -> ParityReport:
    """The honest artefact with other golden tensors."""
    good = lab.honest("onnx")
    golden = golden_of(good) | dict(changes)
    bundle = lab.sealed(good, lambda folder: copy_artefact(good, folder), golden=golden)
    return lab.judge(bundle, upstream=True)

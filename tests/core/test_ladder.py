"""The whole ladder on a real bundle, and on bundles that are wrong in one place each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from benchmarks.faults import FlippedChannels
from mmd_export import ladder
from mmd_export.build import BuildOptions, build
from mmd_export.bundle import Bundle, ManifestDraft, write_bundle
from mmd_export.checkpoint import Checkpoint, load_checkpoint
from mmd_export.commands.verify import verify
from mmd_export.errors import ParityError, UsageError
from mmd_export.parity import ParityReport, Rung, artefact_rung
from mmd_export.plan import StepPlan, Term
from mmd_export.program import SamplerProgram, export_program
from mmd_export.runtime import RunOptions
from mmd_export.targets import CompileOptions, get_target
from mmd_export.tolerance import artefact_tolerance
from mmd_runtime.registry import runtime_for
from tests.models import TWO_CHANNELS, save_model

STEPS = 3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("ladder") / "two", seed=4, **TWO_CHANNELS)


@pytest.fixture(scope="module")
def checkpoint(model: Path) -> Checkpoint:
    return load_checkpoint(model)


@pytest.fixture(scope="module")
def good(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    out = tmp_path_factory.mktemp("good") / "two-3"
    return build(BuildOptions(model=str(model), target="onnx", out=out, steps=STEPS, eta=0.5))


@pytest.fixture(scope="module")
def plan(good: Bundle) -> StepPlan:
    return StepPlan.from_dict(good.manifest.plan)


def tampered(good: Bundle, out: Path, write: Callable[[Path], object], **changes: Any) -> Bundle:
    """A whole and sealed bundle with the golden file and manifest of ``good`` but an artefact of its own."""
    fields = {name: getattr(good.manifest, name) for name in ManifestDraft.model_fields}
    golden = good.golden()
    arrays = dict(golden.inputs) | {"sample": golden.sample}
    arrays |= {f"state.{k}": state for k, state in enumerate(golden.states, start=1)}

    def artefact(folder: Path) -> None:
        write(folder)

    return write_bundle(out, ManifestDraft(**(fields | changes)), artefact, arrays, good.card)


def compiled(denoiser: nn.Module, plan: StepPlan) -> Callable[[Path], object]:
    """Writes the artefact of another network or plan."""
    program = export_program(denoiser, plan, (2, 8, 12), 1)
    return lambda folder: get_target("onnx").compile(program, folder, CompileOptions())


def rung_6(bundle: Bundle) -> Rung:
    runtime = runtime_for(bundle.manifest.format)
    return artefact_rung(bundle, runtime.open(bundle, RunOptions(1)), runtime.open_chain(bundle, RunOptions(1)))


def failed_names(rung: Rung) -> list[str]:
    return [comparison.name for comparison in rung.failures]


def changed_step(plan: StepPlan, k: int, **changes: Any) -> StepPlan:
    return replace(plan, steps=(*plan.steps[:k], replace(plan.steps[k], **changes), *plan.steps[k + 1 :]))


def test_a_good_bundle_passes_every_rung(good: Bundle, model: Path) -> None:
    report = verify(good, checkpoint=str(model))
    report.require()
    assert [rung.number for rung in report.rungs] == [1, 2, 3, 4, 5, 6]
    assert [rung.verdict for rung in report.rungs] == ["passed"] * 6
    compared = [comparison.name for comparison in report.rungs[5].comparisons]
    names = [name for name in compared if not name.startswith("fresh ")]
    assert compared == [*names, *(f"fresh {name}" for name in names)]
    states = [f"state.{k}" for k in range(1, STEPS + 1)]
    assert names == ["sample", *states, *(f"{state} teacher-forced" for state in states)]
    assert all(rung.worst < 1e-5 for rung in report.rungs)
    assert good.golden().count >= 4  # on several noises
    assert good.manifest.parity is not None
    assert set(good.manifest.parity) == set(names)


def test_without_its_checkpoint_the_artefact_is_still_compared(good: Bundle) -> None:
    report = verify(good)
    assert report.passed
    assert [rung.verdict for rung in report.rungs] == ["not checked"] * 5 + ["passed"]


def test_another_checkpoint_is_refused(good: Bundle, tiny: Path) -> None:
    with pytest.raises(UsageError, match=r"checkpoint tiny has hash [0-9a-f]{12}, the bundle was built from two with"):
        verify(good, checkpoint=str(tiny))


@pytest.mark.parametrize(("k", "source"), [(0, "output"), (1, "clean"), (1, "noise"), (2, "state")])
def test_a_wrong_coefficient_in_the_artefact(
    good: Bundle, checkpoint: Checkpoint, plan: StepPlan, k: int, source: str, tmp_path: Path
) -> None:
    """The teacher-forced comparison blames that step and no other."""
    terms = [term for term in plan.steps[k].update if term.source == source] or [plan.steps[k].update[0]]
    wrong = [Term(t.source, t.index, t.weight + 0.01) if t is terms[0] else t for t in plan.steps[k].update]
    writer = compiled(checkpoint.denoiser, changed_step(plan, k, update=tuple(wrong)))
    rung = rung_6(tampered(good, tmp_path / "wrong", writer))
    name = f"state.{k + 1}"
    assert [found for found in failed_names(rung) if "teacher-forced" in found] == [f"{name} teacher-forced"]
    free = [found for found in failed_names(rung) if found in {f"state.{j}" for j in range(1, STEPS + 1)}]
    assert free[0] == name
    with pytest.raises(ParityError, match=rf"rung 6 .*{name} teacher-forced") as error:
        ParityReport(good.name, "onnxruntime", (rung,)).require()
    assert error.value.exit_code == 4


def test_an_off_by_one_timestep_in_the_artefact(
    good: Bundle, checkpoint: Checkpoint, plan: StepPlan, tmp_path: Path
) -> None:
    late = changed_step(plan, 1, timestep=plan.steps[1].timestep - 1)
    rung = rung_6(tampered(good, tmp_path / "late", compiled(checkpoint.denoiser, late)))
    assert not rung.passed
    assert "state.1" not in failed_names(rung)
    assert "state.2 teacher-forced" in failed_names(rung)
    assert "state.3 teacher-forced" not in failed_names(rung)


def test_an_off_by_one_timestep_in_the_plan(good: Bundle, checkpoint: Checkpoint, plan: StepPlan) -> None:
    """Rung 3 compares with the golden file, rung 2 with diffusers' grid."""
    late = changed_step(plan, 1, timestep=plan.steps[1].timestep - 1)
    third, fourth, fifth = ladder.stage_rungs(good, checkpoint, late)
    assert [rung.verdict for rung in (third, fourth, fifth)] == ["failed", "passed", "passed"]
    assert failed_names(third) == ["golden state.2", "golden state.3", "state.2", "state.3"]
    assert not ladder.scheduler_rung(late, checkpoint.scheduler).passed


def test_a_wrong_eta_in_the_plan(
    good: Bundle, checkpoint: Checkpoint, plan: StepPlan, model: Path, tmp_path: Path
) -> None:
    wrong = replace(checkpoint.plan_for(STEPS, eta=0.6), settings=plan.settings)
    assert not ladder.exact_rung(wrong, checkpoint.scheduler).passed
    assert not ladder.scheduler_rung(wrong, checkpoint.scheduler).passed
    writer = compiled(checkpoint.denoiser, plan)
    report = verify(tampered(good, tmp_path / "eta", writer, plan=wrong.to_dict()), checkpoint=str(model))
    # Rung 6: the golden file agrees, the fresh reference runs the wrong plan.
    assert [rung.verdict for rung in report.rungs] == ["failed", "failed", "failed", "passed", "passed", "failed"]
    assert all(name.startswith("fresh ") for name in failed_names(report.rungs[5]))
    with pytest.raises(ParityError, match=r"rung 1 \(exact answers"):
        report.require()


def test_transposed_channels(good: Bundle, checkpoint: Checkpoint, plan: StepPlan, tmp_path: Path) -> None:
    rung = rung_6(tampered(good, tmp_path / "swapped", compiled(FlippedChannels(checkpoint.denoiser).eval(), plan)))
    assert len(rung.failures) == len(rung.comparisons)
    assert rung.worst > 0.1


def flipped(source: Path, tensor: str, bit: int) -> Callable[[Path], object]:
    """Writes the artefact with one bit of one weight flipped."""
    model = onnx.load(source)
    weight = next(value for value in model.graph.initializer if tensor in value.name)
    array = numpy_helper.to_array(weight).copy()
    array.view(np.uint32).reshape(-1)[array.size // 2] ^= np.uint32(1 << bit)
    weight.CopyFrom(numpy_helper.from_array(array, weight.name))
    return lambda folder: (folder / "model.onnx").write_bytes(model.SerializeToString(deterministic=True))


@pytest.mark.parametrize("tensor", ["conv_in.weight", "mid_block.resnets.0.conv1.weight", "conv_out.weight"])
def test_one_flipped_bit_of_one_weight(good: Bundle, tensor: str, tmp_path: Path) -> None:
    """Sealed again, so that the hashes agree: only parity can see it."""
    same = tampered(
        good, tmp_path / "same", lambda folder: (folder / "model.onnx").write_bytes(good.artefact_path.read_bytes())
    )
    assert rung_6(same).passed
    bad = tampered(good, tmp_path / "flipped", flipped(good.artefact_path, tensor, 31))  # the sign
    assert not rung_6(bad).passed
    huge = rung_6(tampered(good, tmp_path / "huge", flipped(good.artefact_path, tensor, 30)))  # the exponent's top
    assert len(huge.failures) == len(huge.comparisons)


def test_wrong_golden_tensors(good: Bundle, tmp_path: Path) -> None:
    """One pixel of one golden state, off by twice the tolerance, fails that state alone."""
    golden = good.golden()
    golden.states[1][3, 1, 7, 11] += np.float32(2 * good.manifest.tolerance.atol)
    try:
        rung = rung_6(good)
    finally:
        golden.states[1][3, 1, 7, 11] -= np.float32(2 * good.manifest.tolerance.atol)
    assert failed_names(rung)[:2] == ["state.2", "state.2 teacher-forced"]
    assert rung.failures[0].worst_index == (3, 1, 7, 11)


# --- rungs 4 and 5 blame their own stage


def test_a_wrong_time_table_fails_rung_4_only(
    good: Bundle, checkpoint: Checkpoint, plan: StepPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    def export(*arguments: Any) -> SamplerProgram:
        program = export_program(*arguments)
        buffers = dict(program.denoiser.named_buffers())
        with torch.no_grad():
            buffers["time_1_0"].flatten()[0] += 0.1  # one channel: a shift of all is undone by GroupNorm
        return program

    monkeypatch.setattr(ladder, "export_program", export)
    verdicts = [rung.verdict for rung in ladder.stage_rungs(good, checkpoint, plan)]
    assert verdicts == ["passed", "failed", "passed"]


def test_a_wrong_exported_program_fails_rung_5_only(
    good: Bundle, checkpoint: Checkpoint, plan: StepPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Louder(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor, k: int, **conditions: Tensor) -> Tensor:
            output: Tensor = 1.001 * self.inner(x, k, **conditions)
            return output

    runner = SamplerProgram.runner
    monkeypatch.setattr(SamplerProgram, "runner", lambda self: Louder(runner(self)))
    verdicts = [rung.verdict for rung in ladder.stage_rungs(good, checkpoint, plan)]
    assert verdicts == ["passed", "passed", "failed"]


def test_a_plan_from_pure_noise_has_its_own_tolerance(tmp_path: Path) -> None:
    bundle = build(BuildOptions("digits", "onnx", tmp_path / "b", verify=False, steps=1, spacing="trailing"))
    plan = StepPlan.from_dict(bundle.manifest.plan)
    assert plan.output_gain > 100.0
    wide = artefact_tolerance("onnx", "fp32", plan.output_gain).atol
    assert wide > 1e-3
    assert bundle.manifest.tolerance.atol == wide
    assert [rung.atol for rung in ladder.stage_rungs(bundle, load_checkpoint("digits"), plan)] == [wide] * 3


def test_fresh_noises_are_told_what_the_golden_file_holds(tmp_path: Path) -> None:
    """Two texts for the images of batches 1 and 2; labels and masks, which nobody gave, are those of it too."""
    texts = 0.1 * np.random.default_rng(0).standard_normal((2, 3, 6)).astype(np.float32)
    np.save(tmp_path / "texts.npy", texts)
    told = "python:tests.foreign_nets:Told"
    given = (f"encoder_hidden_states={tmp_path / 'texts.npy'}",)
    bundle = build(BuildOptions(told, "onnx", tmp_path / "b", steps=1, batch="1,2", verify=False, conditions=given))
    plan, golden = StepPlan.from_dict(bundle.manifest.plan), bundle.golden()
    fresh = ladder.fresh_golden(bundle, load_checkpoint(told), plan, seed=1)
    assert fresh.count == golden.count > len(texts)
    np.testing.assert_array_equal(fresh.inputs["encoder_hidden_states"], texts[np.arange(fresh.count) % 2])
    for name in ("class_labels", "encoder_attention_mask"):
        np.testing.assert_array_equal(fresh.inputs[name], golden.inputs[name])
    assert np.abs(fresh.noise - golden.noise).max() > 1.0
    assert verify(bundle, checkpoint=told).passed

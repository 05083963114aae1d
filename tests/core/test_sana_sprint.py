"""Sana Sprint: a network of flow, its guidance embedded, sampled by SCMScheduler, as diffusers' pipeline does it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from diffusers import SanaSprintPipeline, SCMScheduler
from torch import Tensor

from mmd_export.build import BuildOptions, build
from mmd_export.checkpoint import Checkpoint, load_checkpoint, load_matching
from mmd_export.commands.verify import verify
from mmd_export.errors import UsageError
from mmd_export.ladder import scheduler_rung
from mmd_export.network_options import NetworkOptions
from mmd_export.probe import largest_error
from mmd_export.reference import run_chain, sampler_of
from tests.families import new_network, save_network
from tests.older import needs

LENGTH = 6
BATCH = 2


def load(folder: Path, scale: float | None = None) -> Checkpoint:
    return load_checkpoint(folder, network=NetworkOptions(scale, text_length=LENGTH))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_network(tmp_path_factory.mktemp("sprint") / "sprint", "sana-sprint")


@pytest.fixture(scope="module")
def checkpoint(folder: Path) -> Checkpoint:
    return load(folder)


def drawn(count: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Noise, the noises of ``count`` steps, and the text."""
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(BATCH, 4, 8, 8, generator=generator)
    text = torch.randn(BATCH, LENGTH, 10, generator=generator)
    mask = (torch.arange(BATCH * LENGTH).reshape(BATCH, LENGTH) % 3 > 0).long()
    generator.manual_seed(6)
    steps = torch.stack([torch.randn(BATCH, 4, 8, 8, generator=generator) for _ in range(count)])
    return noise, steps, {"encoder_hidden_states": text, "encoder_attention_mask": mask}


@pytest.mark.parametrize("scale", [None, 1.0, 7.0])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_it_samples_as_its_pipeline_does(steps: int, scale: float | None, folder: Path) -> None:
    """diffusers' own pipeline from noise to latents, with its noises."""
    checkpoint = load(folder, scale)
    noise, step_noise, told = drawn(steps)
    plan = checkpoint.plan_for(steps)
    given = {"noise": noise, **told} | ({"step_noise": step_noise[: steps - 1]} if steps > 1 else {})
    found = run_chain(sampler_of(checkpoint, plan), {name: value.numpy() for name, value in given.items()})
    pipeline = SanaSprintPipeline(None, None, None, new_network("sana-sprint"), SCMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        num_inference_steps=steps, intermediate_timesteps=1.3 if steps == 2 else None, latents=noise,
        guidance_scale=4.5 if scale is None else scale, generator=torch.Generator().manual_seed(6),
        prompt_embeds=told["encoder_hidden_states"], prompt_attention_mask=told["encoder_attention_mask"],
        height=256, width=256, use_resolution_binning=False, output_type="latent",
    ).images  # fmt: skip
    torch.testing.assert_close(torch.from_numpy(found["sample"]), expected, rtol=0.0, atol=2e-5)
    assert float(expected.abs().max()) > 1.0


@pytest.mark.parametrize(
    ("steps", "angles"), [(1, (1.5708,)), (2, (1.5708, 1.3)), (4, (1.5708, 1.1781, 0.7854, 0.3927))]
)
@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_the_table_is_consistency_sampling_of_a_flow(
    steps: int, angles: tuple[float, ...], sigma_data: float, tmp_path: Path
) -> None:
    """x0 = rho x - sigma F, x' = cos(t') x0 + sin(t') eps: what the pipeline's two conversions amount to."""
    save_network(tmp_path, "sana-sprint")
    SCMScheduler(sigma_data=sigma_data).save_pretrained(tmp_path / "scheduler")
    checkpoint = load(tmp_path)
    plan = checkpoint.plan_for(steps)
    assert (plan.solver, plan.prediction_type, plan.clamp_output) == ("scm", "flow_prediction", False)
    assert plan.initial_scale == 1.0
    assert plan.noisy_steps == steps - 1
    for k, (step, t) in enumerate(zip(plan.steps, angles, strict=True)):
        after = angles[k + 1] if k + 1 < steps else 0.0
        sigma = math.sin(t) / (math.sin(t) + math.cos(t))
        rho = math.hypot(sigma, 1.0 - sigma)
        assert (step.timestep, step.alpha, step.sigma, step.scale) == pytest.approx(
            (sigma, 1.0 - sigma, sigma, rho), abs=1e-6
        )
        weights = {term.source: term.weight for term in step.update}
        expected = {"state": math.cos(after) * rho, "output": -math.cos(after) * sigma, "noise": math.sin(after)}
        assert weights == pytest.approx({name: value for name, value in expected.items() if value}, abs=1e-6)
    assert largest_error(plan, checkpoint.scheduler, steps) <= 1e-12
    assert scheduler_rung(plan, checkpoint.scheduler).passed


def test_the_scale_is_said_and_chosen(folder: Path, checkpoint: Checkpoint) -> None:
    assert checkpoint.options["guidance_scale"] == 4.5
    said = "guidance scale 4.5 is embedded, as Sana Sprint's; --guidance-scale S changes it"
    assert said in checkpoint.warnings
    chosen = load(folder, 7.0)
    assert chosen.options["guidance_scale"] == 7.0
    assert said not in chosen.warnings
    assert chosen.sha256 != checkpoint.sha256
    with pytest.raises(UsageError, match=r"--guidance-form doubled has no meaning, the guidance scale is embedded"):
        load_checkpoint(folder, network=NetworkOptions(7.0, "doubled"))


def test_it_ships_with_its_guidance_folded(folder: Path, tmp_path: Path) -> None:
    """No sinusoid is left, of the time or of the scale; the ladder holds down to the artefact."""
    needs("torch", "2.12", "it takes the batch of Sana's attention for a constant")
    network = NetworkOptions(3.0, text_length=LENGTH)
    bundle = build(BuildOptions(str(folder), "onnx", tmp_path / "b", steps=2, batch="1..2", network=network))
    assert not {"Sin", "Cos"} & set(bundle.manifest.graph.op_counts)
    report = verify(bundle, checkpoint=str(folder))
    report.require()
    assert report.rungs[-1].worst < 1e-5
    assert load_matching(str(folder), bundle.manifest.checkpoint).options["guidance_scale"] == 3.0
    assert [spec.name for spec in bundle.manifest.inputs] == [
        "noise", "step_noise", "encoder_hidden_states", "encoder_attention_mask",
    ]  # fmt: skip


@pytest.mark.parametrize("sampler", ["flow-euler", "flow-heun", "unipc", "ddim"])
def test_another_sampler(sampler: str, checkpoint: Checkpoint) -> None:
    """Its network is told sigma, not sigma times 1000."""
    with pytest.raises(UsageError, match=rf"flow_prediction of times in \[0, 1\], --sampler {sampler} expects"):
        checkpoint.plan_for(2, sampler=sampler)

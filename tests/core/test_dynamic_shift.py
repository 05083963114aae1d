"""A shift that follows from the image's size: as diffusers' pipeline derives it, and as it samples with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.pipelines.flux import pipeline_flux
from diffusers.pipelines.stable_diffusion_3 import pipeline_stable_diffusion_3
from diffusers.schedulers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from mmd_export.checkpoint import load_checkpoint
from mmd_export.dynamic_shift import shift_of, with_tokens
from mmd_export.errors import UsageError
from mmd_export.ladder import scheduler_rung
from mmd_export.network_options import NetworkOptions
from mmd_export.plans import choose_plan, plan_again
from mmd_export.reference import run_chain, sampler_of
from mmd_export.schedule import SchedulerConfig
from tests.families import NETWORKS, new_network, save_network

FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
EULER, UNIPC = "FlowMatchEulerDiscreteScheduler", "UniPCMultistepScheduler"
LINEAR = {"time_shift_type": "linear"}
LENGTH = 6


def config_of(class_name: str, **settings: Any) -> SchedulerConfig:
    return SchedulerConfig.from_dict({"_class_name": class_name, "use_dynamic_shifting": True, **settings})


@pytest.mark.parametrize("tokens", [1, 16, 256, 1024, 4096, 16384])
@pytest.mark.parametrize(
    ("class_name", "settings", "base", "largest"),
    [
        (EULER, {}, (256, 0.5), (4096, 1.15)),
        (EULER, {"base_shift": 0.25, "base_image_seq_len": 64}, (64, 0.25), (4096, 1.15)),
        (UNIPC, FLOW, (256, 0.5), (4096, 1.16)),  # the pipeline's own defaults
        (UNIPC, {**FLOW, "max_shift": 2, "max_image_seq_len": 1024}, (256, 0.5), (1024, 2.0)),
    ],
)
def test_mu_is_the_pipelines(
    class_name: str, settings: dict[str, Any], base: tuple[int, float], largest: tuple[int, float], tokens: int
) -> None:
    mu = with_tokens(config_of(class_name, **settings), tokens)["mu"]
    for pipeline in (pipeline_stable_diffusion_3, pipeline_flux):
        assert mu == pipeline.calculate_shift(tokens, base[0], largest[0], base[1], largest[1])
    assert mu == pytest.approx(base[1] + (tokens - base[0]) * (largest[1] - base[1]) / (largest[0] - base[0]))


def test_the_shift_is_the_schedulers() -> None:
    t = torch.linspace(0.01, 1.0, 9, dtype=torch.float64)
    for kind in ("exponential", "linear"):
        shift = shift_of(with_tokens(config_of(EULER, time_shift_type=kind), 900))
        for scheduler in (
            FlowMatchEulerDiscreteScheduler(time_shift_type=kind),
            UniPCMultistepScheduler(time_shift_type=kind),
        ):
            mu = pipeline_flux.calculate_shift(900)
            expected = scheduler.time_shift(mu, 1.0, t)
            torch.testing.assert_close(shift * t / (1.0 + (shift - 1.0) * t), expected, rtol=1e-12, atol=0.0)


def test_a_fixed_shift_is_left_alone() -> None:
    config = SchedulerConfig.from_dict({"_class_name": EULER, "shift": 3.0})
    assert with_tokens(config, 900) is config
    assert shift_of(config) == 3.0


# --- in a pipeline


def save_sd3(folder: Path, scheduler: Any, **changes: Any) -> Path:
    save_network(folder, "sd3", **changes)
    scheduler.save_pretrained(folder / "scheduler")
    return folder


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type="linear", base_image_seq_len=4),
        FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_shift=9.0, shift_terminal=0.1),
        UniPCMultistepScheduler(use_dynamic_shifting=True, **FLOW),
    ],
)
def test_sd3_samples_as_its_pipeline_does(scheduler: Any, tmp_path: Path) -> None:
    """diffusers' own pipeline from noise to latents, in float64 but for its scheduler's tables."""
    checkpoint = load_checkpoint(save_sd3(tmp_path, scheduler), network=NetworkOptions(text_length=LENGTH))
    plan = checkpoint.plan_for(3)
    assert scheduler_rung(plan, checkpoint.scheduler).passed
    generator = torch.Generator().manual_seed(3)
    noise, text, pooled = (torch.randn(2, *shape, generator=generator) for shape in ((4, 8, 8), (LENGTH, 10), (6,)))
    told = {"encoder_hidden_states": text.numpy(), "pooled_projections": pooled.numpy()}
    found = run_chain(sampler_of(checkpoint, plan), {"noise": noise.numpy(), **told})["sample"]
    pipeline = StableDiffusion3Pipeline(new_network("sd3"), scheduler, *[None] * 7)
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        num_inference_steps=3, guidance_scale=1.0, latents=noise, prompt_embeds=text, pooled_prompt_embeds=pooled,
        height=64, width=64, output_type="latent",
    ).images  # fmt: skip
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=0.0, atol=2e-5)
    fixed = choose_plan(SchedulerConfig.from_dict({"_class_name": EULER}), 3)
    assert abs(plan.timesteps[1] - fixed.timesteps[1]) > 1.0  # it matters


def test_mu_follows_from_the_patches(tmp_path: Path) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    checkpoint = load_checkpoint(save_sd3(tmp_path, scheduler, patch_size=2, sample_size=16))
    assert checkpoint.scheduler["mu"] == pipeline_flux.calculate_shift(64)
    plan = checkpoint.plan_for(4)
    assert plan.settings["mu"] == checkpoint.scheduler["mu"]
    made = choose_plan(checkpoint.scheduler, 4)
    assert plan_again(made, checkpoint.scheduler).digest() == made.digest()
    listed = checkpoint.plan_for(timesteps=(1000, 500))
    assert listed.timesteps == (1000.0, 500.0)


def test_the_shift_goes_to_another_sampler() -> None:
    model = with_tokens(config_of(UNIPC, **FLOW), 64)
    mu = model["mu"]
    for sampler in ("flow-euler", "dpmsolver", "deis"):
        config = model.as_class({"flow-euler": EULER}.get(sampler, "DPMSolverMultistepScheduler"))
        assert config["mu"] == mu
        assert choose_plan(model, 4, sampler=sampler).solver == sampler


# --- refused, by name


@pytest.mark.parametrize("name", ["sana", "pixart"])
def test_a_class_whose_pipeline_derives_no_shift(name: str, tmp_path: Path) -> None:
    flow = NETWORKS[name][2] == "flow"
    save_network(tmp_path, name)
    scheduler = {"_class_name": UNIPC, **(FLOW if flow else {}), "use_dynamic_shifting": True}
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    with pytest.raises(UsageError, match=r"use_dynamic_shifting is True, .*SD3Transformer2DModel has.*flow_shift"):
        load_checkpoint(tmp_path).plan_for(2)


@pytest.mark.parametrize(
    ("class_name", "settings", "options", "words"),
    [
        (EULER, {"base_image_seq_len": 4096}, {}, "base_image_seq_len and max_image_seq_len are both 4096"),
        (EULER, {**LINEAR, "base_shift": -1.0, "max_shift": 2.84}, {}, "the shift of this image -1.192;"),
        (UNIPC, FLOW, {"sampler": "sa-solver"}, "--sampler sa-solver: UniPC.* True, SASolverScheduler has a fixed"),
        (EULER, {}, {"sampler": "flow-heun"}, "--sampler flow-heun: .*HeunDiscreteScheduler has a fixed shift"),
        (UNIPC, {**FLOW, "max_shift": "2"}, {}, "max_shift is '2', a str"),
        ("DEISMultistepScheduler", LINEAR, {}, "'linear' is not supported by DEIS"),
    ],
)  # fmt: skip
def test_a_shift_that_cannot_serve(
    class_name: str, settings: dict[str, Any], options: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        choose_plan(with_tokens(config_of(class_name, **settings), 64), 4, **options)

"""``guided:FILE``: a converted file computes what the UNet of improved- and guided-diffusion computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mmd_export.checkpoint import SAFETENSORS, Checkpoint, load_checkpoint
from mmd_export.errors import NotAvailableError, UsageError
from mmd_export.reference import golden_inputs
from mmd_export.schedule import SchedulerConfig
from mmd_export.torch_baselines import baseline
from tests.guided_unet import GuidedUNet

MODELS: dict[str, tuple[dict[str, Any], str]] = {
    "improved": ({"layers": 2, "attend": (0, 1)}, "num_heads=1"),
    "four heads": ({"base": 64, "multipliers": (1, 1), "attend": (0,)}, "num_heads=4"),
    "film": ({"film": True, "head": 16, "multipliers": (1, 2, 2)}, "num_head_channels=16"),
    "updown": ({"film": True, "updown": True, "head": 32, "attend": (0, 2), "multipliers": (1, 2, 4), "layers": 2},
               "num_head_channels=32"),
    "new order": ({"head": 16, "new_order": True}, "num_head_channels=16&use_new_attention_order=true"),
    "labels": ({"classes": 7, "updown": True, "attend": ()}, "num_heads=1&noise_schedule=cosine"),
}  # fmt: skip
HEADS = {"four heads": 16}


def random_unet(**settings: Any) -> GuidedUNet:
    with torch.random.fork_rng():
        torch.manual_seed(4)
        unet = GuidedUNet(**settings)
        for parameter in unet.parameters():
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    return unet.eval().requires_grad_(False)


def load(folder: Path, unet: GuidedUNet, options: str, **more: Any) -> Checkpoint:
    torch.save(unet.state_dict(), folder / "model.pt")
    return load_checkpoint(f"guided:{folder / 'model.pt'}?{options}", **{"sample_size": 16, **more})


def refused(folder: Path, unet: GuidedUNet, options: str, *words: str, **more: Any) -> None:
    with pytest.raises(UsageError) as error:
        load(folder, unet, options, **more)
    for word in words:
        assert word in str(error.value)


def outputs(unet: torch.nn.Module, dtype: torch.dtype, *, labels: bool) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(2, 3, 16, 24, generator=generator).to(dtype)
    given = (torch.tensor([1, 4]),) if labels else ()
    with torch.no_grad():
        return [unet(x, torch.tensor([t]), *given) for t in (0, 250, 999)]


@pytest.mark.parametrize("name", MODELS)
def test_it_computes_what_the_original_computes(name: str, tmp_path: Path) -> None:
    settings, options = MODELS[name]
    unet = random_unet(**{**settings, "head": HEADS.get(name, settings.get("head", 0))})
    checkpoint = load(tmp_path, unet, options)
    labels = "classes" in settings
    assert checkpoint.classes == settings.get("classes")
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        network = (checkpoint if dtype == torch.float32 else checkpoint.as_double()).denoiser
        for expected, found in zip(
            outputs(unet.to(dtype), dtype, labels=labels), outputs(network, dtype, labels=labels), strict=True
        ):
            assert float((found - expected).abs().max() / expected.abs().max()) <= tolerance
    assert sum(p.numel() for p in unet.parameters()) == sum(p.numel() for p in checkpoint.denoiser.parameters())


def test_heads_matter(tmp_path: Path) -> None:
    """The proof above can fail: other heads or another order of q, k and v are another network."""
    unet = random_unet(head=16)
    expected = outputs(unet, torch.float32, labels=False)
    for options in ("num_head_channels=32", "num_heads=1", "num_head_channels=16&use_new_attention_order=true"):
        found = outputs(load(tmp_path, unet, options).denoiser, torch.float32, labels=False)
        assert max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True)) > 1e-4


def test_rescaled_timesteps(tmp_path: Path) -> None:
    """Of T timesteps the network is told t * 1000 / T, as _WrappedModel of the original tells it."""
    unet, options = random_unet(), "num_heads=1&diffusion_steps=4000"
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(1, 3, 16, 16, generator=generator)
    hashes = set()
    for rescale, told in (("true", (800.0, 50.25)), ("false", (3200.0, 201.0))):
        checkpoint = load(tmp_path, unet, f"{options}&rescale_timesteps={rescale}")
        for t, time in zip((3200, 201), told, strict=True):
            with torch.no_grad():
                found, expected = checkpoint.denoiser(x, torch.tensor([t])), unet(x, torch.tensor([time]))
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        hashes.add(checkpoint.sha256)
    assert len(hashes) == 2
    same = [load(tmp_path, unet, f"num_heads=1{more}").sha256 for more in ("", "&rescale_timesteps=true")]
    assert same[0] == same[1]  # of 1000


def test_rescaled_timesteps_must_be_said(tmp_path: Path) -> None:
    """Where it matters: the two repositories have opposite defaults."""
    file, unet = tmp_path / "scheduler_config.json", random_unet()
    file.write_text(json.dumps({"_class_name": "DDIMScheduler", "num_train_timesteps": 4000}))
    for how in ("diffusion_steps=4000", f"scheduler={file}"):
        refused(tmp_path, unet, f"num_heads=1&{how}", "t * 1000 / 4000; say ?rescale_timesteps=true, the default of im",
                "improved-diffusion, or ?rescale_timesteps=false, that of guided-diffusion")  # fmt: skip
        load(tmp_path, unet, f"num_heads=1&{how}&rescale_timesteps=true")
    refused(tmp_path, unet, "num_heads=1&rescale_timesteps=maybe", "'maybe'; true or false is expected")


def test_a_folder_of_it_rescales_too(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """What a run folder holds: the configs of the file that was tuned, and weights."""
    checkpoint = load(tmp_path, random_unet(), "num_heads=1&diffusion_steps=4000&rescale_timesteps=true")
    for name, content in checkpoint.configs.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    network = checkpoint.denoiser.get_submodule("unet")
    save_file(network.state_dict(), tmp_path / "unet" / SAFETENSORS)
    capfd.readouterr()
    again = load_checkpoint(tmp_path)
    assert capfd.readouterr().err == ""
    assert again.sha256 == checkpoint.sha256
    for first, second in zip(
        *(outputs(each.denoiser, torch.float32, labels=False) for each in (again, checkpoint)), strict=True
    ):
        assert torch.equal(first, second)
    plan = again.plan_for(2)
    with pytest.raises(NotAvailableError, match="its pipelines tell no rescaled timestep"):
        baseline("diffusers", again, plan, golden_inputs(again, plan, 1), 1)


def test_the_schedule(tmp_path: Path) -> None:
    unet = random_unet()
    assert load(tmp_path, unet, "num_heads=1").scheduler.beta_schedule == "linear"
    assert load(tmp_path, unet, "num_heads=1&noise_schedule=cosine").scheduler.beta_schedule == "squaredcos_cap_v2"
    refused(tmp_path, unet, "num_heads=1&noise_schedule=quadratic", "'quadratic'; known: linear, cosine")


def test_how_it_was_trained(tmp_path: Path) -> None:
    """Linear betas scale with the number of timesteps, as the original's get_named_beta_schedule has it."""
    unet = random_unet()
    checkpoint = load(tmp_path, unet, "num_heads=1&diffusion_steps=4000&predict_xstart=true&rescale_timesteps=true")
    assert checkpoint.scheduler == SchedulerConfig(
        num_train_timesteps=4000, beta_start=0.000025, beta_end=0.005, prediction_type="sample",
        variance_type="fixed_large",
    )  # fmt: skip
    assert any("linear schedule of 4000 timesteps, sample prediction" in text for text in checkpoint.warnings)
    usual = SchedulerConfig(variance_type="fixed_large")
    assert load(tmp_path, unet, "num_heads=1&predict_xstart=false").scheduler == usual
    refused(tmp_path, unet, "num_heads=1&diffusion_steps=20", "diffusion_steps is 20; a whole number above 20")


def test_the_variance_it_was_trained_with(tmp_path: Path) -> None:
    """create_gaussian_diffusion of the original has sigma_small off: the variance is beta unless it was learned."""
    fixed = load(tmp_path, random_unet(), "num_heads=1")
    assert any("epsilon prediction, fixed_large variance" in text for text in fixed.warnings)
    plan = fixed.plan_for(5, sampler="ddpm")
    levels = [step.alpha**2 for step in plan.steps]
    noise = [term.weight for step in plan.steps for term in step.update if term.source == "noise"]
    assert len(noise) == 4
    for earlier, later, found in zip(levels, levels[1:], noise, strict=False):
        assert abs(found**2 - (1.0 - earlier / later)) < 1e-12
    learned = load(tmp_path, random_unet(given=6), "num_heads=1")
    assert any("epsilon prediction, learned_range variance" in text for text in learned.warnings)
    with pytest.raises(UsageError, match=r"variance_type 'learned_range' .* not affine; use --sampler ddim"):
        learned.plan_for(5, sampler="ddpm")
    assert learned.plan_for(5).digest() == fixed.plan_for(5).digest()


def test_flags_are_read_as_the_original_reads_them(tmp_path: Path) -> None:
    """Its str2bool knows yes, true, t, y and 1, no, false, f, n and 0."""
    unet, plain = random_unet(head=16), "num_head_channels=16"
    off = load(tmp_path, unet, plain).sha256
    for flag in ("use_new_attention_order", "predict_xstart"):
        hashes = [
            {load(tmp_path, unet, f"{plain}&{flag}={text}").sha256 for text in texts.split()}
            for texts in ("no false f n 0 F", "yes true t y 1 T")
        ]
        assert hashes[0] == {off}
        assert len(hashes[1]) == 1
        assert hashes[1] != {off}
        for text in ("off", "2", "-1", "1.0", ""):
            refused(tmp_path, unet, f"{plain}&{flag}={text}", f"{flag} is ", text, "; true or false is expected")


@pytest.mark.parametrize("option", ["num_heads", "num_head_channels"])
def test_numbers_of_heads_that_are_none(option: str, tmp_path: Path) -> None:
    for text in ("four", "true", "2.5", "4x4", ""):
        refused(tmp_path, random_unet(), f"{option}={text}", f"{option} is ", "; a whole number is expected")


def test_a_width_of_heads_that_is_not_set(tmp_path: Path) -> None:
    """-1 is guided-diffusion's own default: the number of heads counts."""
    unet = random_unet(base=64, multipliers=(1, 1), attend=(0,), head=16)
    both, one = (load(tmp_path, unet, f"num_heads=4{more}") for more in ("&num_head_channels=-1", ""))
    assert both.sha256 == one.sha256
    refused(tmp_path, unet, "num_head_channels=-1", "nothing in them tells the attention heads")
    refused(tmp_path, unet, "num_heads=-1", "num_heads is -1")


def test_the_image_size(tmp_path: Path) -> None:
    unet = random_unet()
    assert load(tmp_path, unet, "num_heads=1&image_size=32x16", sample_size=None).shape == (3, 32, 16)
    assert load(tmp_path, unet, "num_heads=1&image_size=32", sample_size=None).shape == (3, 32, 32)
    for text in ("abc", "32x", "32x16x8", "-1", "true", "8.5", ""):
        words = (f"image_size is {text!r}", "a number or HEIGHTxWIDTH is expected")
        refused(tmp_path, unet, f"num_heads=1&image_size={text}", *words, sample_size=None)


def test_a_scheduler_from_a_file(tmp_path: Path) -> None:
    file, unet = tmp_path / "scheduler_config.json", random_unet()
    file.write_text(json.dumps({"_class_name": "DPMSolverMultistepScheduler", "solver_order": 3}))
    checkpoint = load(tmp_path, unet, f"num_heads=1&scheduler={file}")
    assert (checkpoint.scheduler.sampler, checkpoint.scheduler["solver_order"]) == ("dpmsolver", 3)
    assert not any("scheduler" in text for text in checkpoint.warnings)
    refused(tmp_path, unet, f"num_heads=1&scheduler={file}&noise_schedule=cosine", "noise_schedule=cosine are both")
    refused(tmp_path, unet, f"num_heads=1&scheduler={tmp_path / 'none.json'}", "none.json does not exist")


def test_learned_variance_is_left_out(tmp_path: Path) -> None:
    unet = random_unet(given=6)
    checkpoint = load(tmp_path, unet, "num_heads=1")
    assert any("learned variance: output channels 3 to 5 are left out" in text for text in checkpoint.warnings)
    for expected, found in zip(
        outputs(unet, torch.float32, labels=False),
        outputs(checkpoint.denoiser, torch.float32, labels=False),
        strict=True,
    ):
        assert float((found - expected[:, :3]).abs().max()) <= 1e-5


def test_what_is_not_known_or_does_not_fit(tmp_path: Path) -> None:
    unet = random_unet()
    refused(tmp_path, unet, "", "nothing in them tells the attention heads")
    refused(tmp_path, unet, "num_heads=1", "nothing in them tells the image size", sample_size=None)
    refused(tmp_path, unet, "num_heads=1", "sample_size is 7; 2 levels need multiples of 2", sample_size=7)
    refused(tmp_path, unet, "num_head_channels=24", "num_head_channels is 24, the widths [64]")
    refused(tmp_path, random_unet(attend=(0, 1)), "num_heads=4", "num_heads is 4 with attention at the widths [32, 64]")
    refused(tmp_path, unet, "num_heads=1&dropout=0", "option dropout=0 has no meaning; guided: takes ema, sample_size")


def test_keys_that_do_not_fit(tmp_path: Path) -> None:
    weights = random_unet().state_dict()
    path = tmp_path / "bad.pt"

    def says(changes: dict[str, Tensor], drop: str, *words: str) -> None:
        torch.save({name: value for name, value in (weights | changes).items() if not drop or drop not in name}, path)
        with pytest.raises(UsageError) as error:
            load_checkpoint(f"guided:{path}?num_heads=1", sample_size=16)
        for word in words:
            assert word in str(error.value)

    says({"extra.weight": torch.zeros(1)}, "", "no place for extra.weight")
    says({}, "time_embed.0", "not in the guided-diffusion layout: time_embed.0.weight missing")
    says({}, "input_blocks.2", "input_blocks.2 has no weights (conv_resample is off)")
    says({}, "middle_block.1.qkv", "missing: ")
    says({"out.2.bias": torch.full((3,), torch.nan)}, "", "holds NaN or infinity")


def test_a_ddim_file_is_told_apart(tmp_path: Path) -> None:
    torch.save(random_unet().state_dict(), tmp_path / "model.pt")
    with pytest.raises(UsageError, match="not in the DDIM layout"):
        load_checkpoint(f"ddim:{tmp_path / 'model.pt'}")

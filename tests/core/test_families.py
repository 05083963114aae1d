"""Every model class that can be read: called as diffusers' pipelines call it, and shipped as one verified graph."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mmd_export.build import BuildOptions, build
from mmd_export.checkpoint import SAFETENSORS, Checkpoint, load_checkpoint
from mmd_export.checkpoints.diffusers_folder import _in_pipeline
from mmd_export.checkpoints.families import FAMILIES
from mmd_export.conditions import names_of
from mmd_export.errors import UsageError
from mmd_export.network_options import AS_IT_IS, NetworkOptions
from mmd_export.plan import StepPlan
from mmd_export.program import export_program
from mmd_export.reference import golden_inputs, run_chain, sampler_of
from mmd_export.schedule import SchedulerConfig
from mmd_export.scheduler_keys import UNIT_FLOW
from tests.families import NETWORKS, new_network, save_network
from tests.models import weights_of, write_weights
from tests.older import needs

TEXTS = [name for name in NETWORKS if name != "dit"]
EMBEDDED = ("lcm", "sana-sprint")  # told their guidance scale
LENGTH = 6


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A pipeline folder of each network, saved once."""
    root = tmp_path_factory.mktemp("families")

    def folder(name: str) -> Path:
        return root / name if (root / name).exists() else save_network(root / name, name)

    return folder


def options(name: str, scale: float | None = None, form: str = "auto") -> NetworkOptions:
    form = "auto" if scale is None or name in EMBEDDED else form
    return NetworkOptions(scale, form, text_length=LENGTH if name in TEXTS else None)


def load(folder: Path, name: str, scale: float | None = None) -> Checkpoint:
    return load_checkpoint(folder, network=options(name, scale))


def inputs(checkpoint: Checkpoint, batch: int = 2) -> tuple[Tensor, dict[str, Tensor]]:
    x = torch.randn(batch, *checkpoint.shape, generator=torch.Generator().manual_seed(1))
    told = {c.name: torch.from_numpy(c.examples(i, batch)) for i, c in enumerate(checkpoint.conditions)}
    return x, told


def as_pipelines_call(name: str, network: Any, x: Tensor, t: Tensor, told: dict[str, Tensor]) -> Tensor:
    """The network's call in diffusers' own pipeline of that class, written out."""
    text, mask, labels = (told.get(key) for key in ("encoder_hidden_states", "encoder_attention_mask", "class_labels"))
    t = t.expand(x.shape[0])
    if name == "text":
        output = network(x, t, text)
    elif name == "text-labels":
        output = network(x, t, text, class_labels=labels)
    elif name == "sdxl":
        added = {"text_embeds": told["text_embeds"], "time_ids": told["time_ids"]}
        output = network(x, t, encoder_hidden_states=text, added_cond_kwargs=added)
    elif name == "dit":
        output = network(x, timestep=t, class_labels=labels)
    elif name.startswith("pixart"):
        size = {"resolution": told.get("resolution"), "aspect_ratio": told.get("aspect_ratio")}
        masked = {"encoder_hidden_states": text, "encoder_attention_mask": mask}
        output = network(x, **masked, timestep=t, added_cond_kwargs=size)
    elif name == "sana":
        t = t * network.config.timestep_scale
        output = network(x, encoder_hidden_states=text, encoder_attention_mask=mask, timestep=t)
    elif name == "sana-sprint":
        guidance = torch.full([1], 4.5).expand(x.shape[0]) * network.config.guidance_embeds_scale
        masked = {"encoder_hidden_states": text, "encoder_attention_mask": mask}
        output = network(x, **masked, guidance=guidance, timestep=t)
    else:
        pooled = told["pooled_projections"]
        output = network(hidden_states=x, timestep=t, encoder_hidden_states=text, pooled_projections=pooled)
    sample: Tensor = output.sample
    return sample[:, :4]  # a learned variance stands behind the output


@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "lcm"])
def test_it_is_called_as_in_its_pipeline(name: str, folders: Callable[[str], Path]) -> None:
    checkpoint = load(folders(name), name)
    x, told = inputs(checkpoint)
    network = new_network(name)
    for timestep in (3, 721):
        t = torch.tensor([timestep])
        with torch.inference_mode():
            found, expected = checkpoint.denoiser(x, t, **told), as_pipelines_call(name, network, x, t, told)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_condition_matters(name: str, folders: Callable[[str], Path]) -> None:
    """No input of the graph is dead: another value of it alone gives another output."""
    checkpoint = load(folders(name), name, 3.0)
    x, told = inputs(checkpoint)
    t = torch.tensor([500])
    with torch.inference_mode():
        before = checkpoint.denoiser(x, t, **told)
        for condition in checkpoint.conditions:
            value = told[condition.name]
            other = (value + 1) % (condition.below or 2) if condition.dtype == "int64" else value + 1.0
            after = checkpoint.denoiser(x, t, **{**told, condition.name: other})
            assert float((after - before).abs().max()) > 1e-5, condition.name


SHIPPED: list[tuple[str, str, float | None, str]] = [
    *((name, "2", 3.0, "doubled" if NETWORKS[name][0].startswith("UNet") else "two-calls") for name in NETWORKS),
    ("dit", "1..4", 3.0, "doubled"),
    ("sana", "1..4", None, "auto"),
    ("text", "1..4", 2.0, "doubled"),
]


@pytest.mark.parametrize(("name", "batch", "scale", "form"), SHIPPED)
def test_it_ships(
    name: str, batch: str, scale: float | None, form: str, folders: Callable[[str], Path], tmp_path: Path
) -> None:
    """Checkpoint to ONNX; every state of the artefact is near the float64 reference, the time path is gone."""
    if name == "sana" and ".." in batch:
        needs("torch", "2.12", "it takes the batch of Sana's attention for a constant")
    out = tmp_path / "bundle"
    bundle = build(
        BuildOptions(str(folders(name)), "onnx", out, steps=2, batch=batch, network=options(name, scale, form))
    )
    assert bundle.manifest.parity is not None
    assert max(bundle.manifest.parity.values()) <= 1e-5
    # Sinusoids of time_ids, resolution and aspect_ratio, which are inputs: in each of up to four calls, or merged.
    sized = {"sdxl": 1, "pixart": 2}.get(name, 0)
    assert bundle.manifest.graph.op_counts.get("Sin", 0) in range(sized, 4 * sized + 1)
    assert bundle.manifest.plan["clamp_output"] is False
    last = bundle.golden().states[-1]
    assert np.array_equal(bundle.golden().sample, last)
    assert float(np.abs(last).max()) > 1.0  # a clamp would have shown
    assert float(np.abs(last).std()) < 20.0


@pytest.mark.parametrize("name", NETWORKS)
def test_the_reference_stays_in_double(name: str, folders: Callable[[str], Path]) -> None:
    """Only the sinusoids of the timestep are float32, as diffusers computes them; they hold no image and no text."""
    checkpoint = load(folders(name), name).as_double()
    x, told = inputs(checkpoint)
    told = {key: value.double() if value.is_floating_point() else value for key, value in told.items()}
    narrow: list[tuple[str, torch.Size]] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and result.dtype == torch.float32:
                narrow.append((str(func), result.shape))
            return result

    with torch.inference_mode(), Watch():  # type: ignore[no-untyped-call]
        output = checkpoint.denoiser(x.double(), torch.tensor([300]), **told)
    assert output.dtype == torch.float64
    # (B,), (B, 1), (F,), (1, F), (B, F), (B, 2F): no image (B, C, H, W), no tokens (B, L, D).
    assert all(len(shape) <= 2 for _, shape in narrow), narrow


def test_the_null_class_of_dit(folders: Callable[[str], Path]) -> None:
    """uncond + S (cond - uncond), with the label behind the last as no class."""
    plain, guided = load(folders("dit"), "dit"), load(folders("dit"), "dit", 3.0)
    x, told = inputs(plain)
    t = torch.tensor([700])
    with torch.inference_mode():
        cond = plain.denoiser(x, t, **told)
        uncond = plain.denoiser(x, t, class_labels=torch.full((2,), 7))
        found = guided.denoiser(x, t, **told)
    torch.testing.assert_close(found, uncond + 3.0 * (cond - uncond), rtol=0, atol=1e-5)
    assert names_of(guided.conditions) == ("class_labels",)
    assert guided.options == {"guidance_scale": 3.0, "guidance_form": "two-calls", "null_label": 7}
    assert "the model learned its variance: the last 4 of 8 channels are left out" in plain.warnings


@pytest.mark.parametrize("folder", ["unet", "transformer"])
def test_a_bare_model_folder(folder: str, tmp_path: Path) -> None:
    name = "text" if folder == "unet" else "sd3"
    save_network(tmp_path, name)
    bare = tmp_path / folder
    (bare / "scheduler_config.json").write_bytes((tmp_path / "scheduler" / "scheduler_config.json").read_bytes())
    checkpoint = load(bare, name)
    assert checkpoint.sha256 == load(tmp_path, name).sha256
    assert set(checkpoint.configs) == {f"{folder}/config.json", "scheduler/scheduler_config.json"}


def test_weights_in_shards_and_in_half(tmp_path: Path) -> None:
    """Through the readers that every diffusers folder goes through."""
    save_network(tmp_path / "whole", "sana")
    network = new_network("sana")
    for name, settings in (("shards", {"max_shard_size": "50KB"}), ("half", {"variant": "fp16"})):
        save_network(tmp_path / name, "sana")
        place = tmp_path / name / "transformer"
        (place / SAFETENSORS).unlink()
        (network.half() if name == "half" else network).save_pretrained(place, **settings)
    assert len(list((tmp_path / "shards" / "transformer").glob("*.safetensors"))) > 1
    whole, shards, half = (load(tmp_path / name, "sana") for name in ("whole", "shards", "half"))
    assert shards.sha256 == whole.sha256
    assert half.sha256 != whole.sha256
    assert any("upcast to float32" in warning for warning in half.warnings)


def test_a_nan_in_a_transformer(tmp_path: Path) -> None:
    save_network(tmp_path, "dit")
    weights = weights_of(tmp_path / "transformer")
    weights["proj_out_2.weight"][0, 0] = torch.nan
    write_weights(tmp_path / "transformer", weights)
    refused(tmp_path, "proj_out_2.weight holds NaN or infinity")


# --- text


@pytest.mark.parametrize(
    ("name", "tokenizer", "asked", "length"),
    [
        ("text", None, None, 77),
        ("text", 12, None, 12),
        ("text", 10**30, None, 77),
        ("text", 12, 5, 5),
        ("pixart", None, None, 300),
        ("pixart", 120, None, 120),
        ("sana", None, None, 300),
        ("sd3", None, None, 333),
    ],
)
def test_the_length_of_the_text(
    name: str, tokenizer: int | None, asked: int | None, length: int, tmp_path: Path
) -> None:
    save_network(tmp_path, name)
    if tokenizer is not None:
        write_json(tmp_path / "tokenizer" / "tokenizer_config.json", model_max_length=tokenizer)
    checkpoint = load_checkpoint(tmp_path, network=NetworkOptions(text_length=asked))
    assert checkpoint.conditions[0].name == "encoder_hidden_states"
    assert checkpoint.conditions[0].shape[0] == length
    assert checkpoint.options["text_length"] == length
    said = [warning for warning in checkpoint.warnings if f"text of {length} tokens" in warning]
    assert bool(said) == (asked is None)


def write_json(path: Path, **values: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values))


def test_sdxl_is_told_what_its_encoder_leaves(tmp_path: Path) -> None:
    """The refiner: 5 time ids, because its pooled text is wider."""
    save_network(tmp_path, "sdxl")
    write_json(tmp_path / "text_encoder_2" / "config.json", hidden_size=12, projection_dim=18)
    told = {each.name: each.shape for each in load(tmp_path, "sdxl").conditions}
    assert told["text_embeds"] == (18,)
    assert told["time_ids"] == (5,)


# --- configs that contradict each other


def refused(folder: Path, *words: str, network: NetworkOptions = AS_IT_IS) -> None:
    with pytest.raises(UsageError) as error:
        load_checkpoint(folder, network=network)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("name", ["sd3", "sana"])
def test_a_flow_model_with_another_scheduler(name: str, tmp_path: Path) -> None:
    save_network(tmp_path, name, scheduler="ddim")
    refused(tmp_path, "the model predicts 'flow_prediction'", "DDIMScheduler expects 'v_prediction'")


def test_a_flow_model_with_another_sampler(folders: Callable[[str], Path]) -> None:
    with pytest.raises(UsageError, match=r"predicts flow_prediction, --sampler ddim expects epsilon"):
        load(folders("sd3"), "sd3").plan_for(2, sampler="ddim")


def test_text_of_another_width(tmp_path: Path) -> None:
    save_network(tmp_path, "text")
    write_json(tmp_path / "text_encoder" / "config.json", hidden_size=8)
    refused(tmp_path, "the model takes text of width 12", "give 8")
    write_json(tmp_path / "text_encoder_2" / "config.json", hidden_size=4)  # one behind the other, as SDXL's
    load_checkpoint(tmp_path)


def test_an_autoencoder_of_another_width(tmp_path: Path) -> None:
    save_network(tmp_path, "dit")
    write_json(tmp_path / "vae" / "config.json", latent_channels=16)
    refused(tmp_path, "the model takes 4 channels, the autoencoder makes latents of 16")


@pytest.mark.parametrize("with_autoencoder", [False, True])
def test_an_inpainting_model(with_autoencoder: bool, tmp_path: Path) -> None:
    """Mask and masked image come in beside the state; its autoencoder is not to blame."""
    save_network(tmp_path, "text", in_channels=9)
    if with_autoencoder:
        write_json(tmp_path / "vae" / "config.json", _class_name="AutoencoderKL", latent_channels=4)
    refused(tmp_path, str(tmp_path / "unet" / "config.json"), "in_channels 9 and out_channels 4 differ: ", "inpainting")


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("text", {"out_channels": 9}, ("in_channels 4 and out_channels 9 differ",)),
        ("text", {"class_embed_type": "timestep"}, ("class_embed_type is 'timestep'", "supported: None, projection")),
        ("sana", {"guidance_embeds": True}, ("flow_prediction of times in [0, 1]", "Flow", "goes with SCMScheduler")),
        ("sana-sprint", {"guidance_embeds": False}, ("predicts 'flow_prediction'", "SCMScheduler expects 'trigflow'")),
        ("dit", {"norm_type": "layer_norm"}, ("diffusers refuses it",)),
        ("sdxl", {"projection_class_embeddings_input_dim": 40}, ("input_dim is 40",)),
    ],
)
def test_a_config_that_is_not_supported(
    name: str, changes: dict[str, Any], words: tuple[str, ...], tmp_path: Path
) -> None:
    save_network(tmp_path, name)
    file = next(tmp_path.glob("*/config.json"))
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    refused(tmp_path, str(file), *words)


def test_text_length_of_a_model_without_text(folders: Callable[[str], Path]) -> None:
    refused(folders("dit"), "takes no text, --text-length is 9", network=NetworkOptions(text_length=9))


# --- latents


def test_latents_are_not_clamped(folders: Callable[[str], Path], tmp_path: Path, tiny: Path) -> None:
    assert load(folders("dit"), "dit").plan_for(2).clamp_output is False
    assert load_checkpoint(tiny).plan_for(2).clamp_output is True
    save_network(tmp_path, "text", in_channels=3, out_channels=3)  # pixels, as far as anything says
    assert load(tmp_path, "text").plan_for(2).clamp_output is True
    write_json(tmp_path / "vae" / "config.json", latent_channels=3)
    assert load(tmp_path, "text").plan_for(2).clamp_output is False


def test_the_plan_of_a_latent_run_folder(folders: Callable[[str], Path]) -> None:
    checkpoint = load(folders("dit"), "dit")
    plan = checkpoint.plan_for(3)
    assert replace(checkpoint, plan=plan).plan_for().digest() == plan.digest()


def test_the_time_path_is_one_row(folders: Callable[[str], Path]) -> None:
    """Also where a free batch is doubled, so that any batch size can use it."""
    needs("torch", "2.12", "it takes a free batch that is doubled for a constant")
    checkpoint = load_checkpoint(folders("pixart"), network=options("pixart", 2.0, "doubled"))
    plan: StepPlan = checkpoint.plan_for(2)
    program = export_program(checkpoint.denoiser, plan, checkpoint.shape, None, checkpoint.conditions)
    rows = [value.shape[0] for k in range(2) for value in program.constants(k) if value.dim() > 1]
    assert rows
    assert set(rows) == {1}


def test_the_per_step_baseline(folders: Callable[[str], Path]) -> None:
    """``bench --against per-step``: conditions by name, and a grid of sigmas that starts at a whole number."""
    from mmd_export.step_session import per_step_session

    checkpoint = load(folders("sd3"), "sd3", 2.0)
    plan = checkpoint.plan_for(2)
    assert float(plan.timesteps[0]).is_integer()
    assert not float(plan.timesteps[1]).is_integer()
    given = golden_inputs(checkpoint, plan, 2)
    found = per_step_session(checkpoint, plan, 2, 1)(given)
    expected = run_chain(sampler_of(checkpoint, plan), given)["sample"]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_only_a_family_that_says_so_has_sprints() -> None:
    config, family = {"guidance_embeds": True}, FAMILIES["SanaTransformer2DModel"]
    assert family.is_sprint(config)
    assert not family.is_sprint({"guidance_embeds": None})
    assert not replace(family, sprint=False).is_sprint(config)  # as Flux, whose guidance_embeds mean another thing
    scheduler = SchedulerConfig.from_dict({"_class_name": "SCMScheduler"})
    assert _in_pipeline(scheduler, config, family)[1] == UNIT_FLOW
    assert _in_pipeline(scheduler, config, replace(family, sprint=False)) == (scheduler, family.prediction)

"""``ddim:FILE``: a converted file computes what the original U-Net computes, and no tensor is lost or made up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmd_export.checkpoint import Checkpoint, load_checkpoint, load_matching
from mmd_export.denoiser import DiffusersUNet
from mmd_export.errors import UsageError
from mmd_export.manifest import CheckpointRef
from mmd_export.schedule import SchedulerConfig
from tests.original_unet import OriginalUNet, embedding, random_unet

MODELS: dict[str, dict[str, Any]] = {
    "cifar10": {"base": 32, "multipliers": (1, 2, 2, 2), "layers": 2, "attend": (1,)},
    "celeba": {"base": 32, "multipliers": (1, 2, 2, 2, 4), "layers": 2, "attend": (2,)},
    "lsun": {"base": 32, "multipliers": (1, 1, 2, 2, 4, 4), "layers": 2, "attend": (4,)},
    "two": {"base": 64, "multipliers": (1, 3), "layers": 1, "attend": (0, 1), "shortcut": "conv_shortcut"},
    "plain": {"base": 32, "multipliers": (1, 2), "layers": 3, "attend": (), "channels": 1},
}
SIZES = {"cifar10": 32, "celeba": 64, "lsun": 256}
TIMESTEPS = (0, 1, 250, 999)


def save(folder: Path, unet: OriginalUNet, name: str = "model.pth") -> Path:
    torch.save(unet.state_dict(), folder / name)
    return folder / name


def bias_of(unet: OriginalUNet) -> Tensor:
    bias: Tensor = unet.state_dict()["conv_in.bias"]
    return bias


def small(**changes: Any) -> OriginalUNet:
    return random_unet(**{**MODELS["plain"], "layers": 1, **changes})


def load(path: Path, **options: Any) -> Checkpoint:
    return load_checkpoint(f"ddim:{path}", **{"sample_size": 8, **options})


def refused(path: Path | str, *words: str, **options: Any) -> str:
    with pytest.raises(UsageError) as error:
        load_checkpoint(f"ddim:{path}", **options)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    return message


def worst(checkpoint: Checkpoint, unet: OriginalUNet, dtype: torch.dtype) -> float:
    """The largest difference over the timesteps, relative to the largest output."""
    generator = torch.Generator().manual_seed(5)
    size = max(16, 2 ** (unet.levels - 1))
    x = torch.randn(2, checkpoint.shape[0], size, 2 * size, generator=generator).to(dtype)
    errors = []
    with torch.no_grad():
        for t in TIMESTEPS:
            expected, found = unet(x, torch.tensor([t])), checkpoint.denoiser(x, torch.tensor([t]))
            assert expected.dtype == found.dtype == dtype
            errors.append(float((found - expected).abs().max() / expected.abs().max()))
    return max(errors)


# --- the same numbers


@pytest.mark.parametrize("name", MODELS)
def test_it_computes_what_the_original_computes(name: str, tmp_path: Path) -> None:
    unet = random_unet(1, **MODELS[name])
    checkpoint = load(save(tmp_path, unet), sample_size=SIZES.get(name, 32))
    assert worst(checkpoint, unet, torch.float32) <= 1e-5
    double = unet.double()
    double.divide_last = True  # diffusers' rounding of the float32 embedding; the next test bounds it
    assert worst(checkpoint.as_double(), double, torch.float64) <= 1e-10


@pytest.mark.parametrize("width", [32, 128])
def test_both_roundings_of_the_embedding_are_close_to_the_exact_one(width: int) -> None:
    half = width // 2
    for t in TIMESTEPS:
        angles = t * torch.exp(
            -torch.arange(half, dtype=torch.float64) * torch.tensor(10000.0).double().log() / (half - 1)
        )
        exact = torch.cat([angles.sin(), angles.cos()])
        for divide_last in (False, True):
            found = embedding(torch.tensor([t]), width, torch.float64, divide_last=divide_last)[0]
            assert float((found - exact).abs().max()) <= 2e-4


def test_the_proof_can_fail(tmp_path: Path) -> None:
    """Each convention that a conversion gets wrong most easily moves the output far more than the tolerance."""
    unet = random_unet(1, **MODELS["cifar10"])
    checkpoint = load(save(tmp_path, unet), sample_size=32)
    assert isinstance(checkpoint.denoiser, DiffusersUNet)
    config = dict(checkpoint.denoiser.unet.config)  # type: ignore[arg-type]
    for change in (
        {"downsample_padding": 1}, {"flip_sin_to_cos": True}, {"freq_shift": 0}, {"norm_eps": 1e-3},
        {"attention_head_dim": 8}, {"center_input_sample": True},
    ):  # fmt: skip
        from diffusers import UNet2DModel

        other = UNet2DModel(**{**{k: v for k, v in config.items() if not k.startswith("_")}, **change}).eval()
        other.load_state_dict(checkpoint.denoiser.unet.state_dict())
        changed = Checkpoint("x", tmp_path, DiffusersUNet(other), checkpoint.scheduler, checkpoint.shape, "")
        assert worst(changed, unet, torch.float32) > 1e-4, change


def test_every_tensor_is_accounted_for(tmp_path: Path) -> None:
    """As many numbers as in the file, and each tensor moves the output or is a bias of a key, which softmax ignores."""
    unet = small(attend=(1,), base=64)
    checkpoint = load(save(tmp_path, unet))
    own = list(unet.state_dict().values())
    assert sum(t.numel() for t in own) == sum(p.numel() for p in checkpoint.denoiser.parameters())
    assert sorted(float(t.double().sum()) for t in own) == sorted(
        float(p.double().sum()) for p in checkpoint.denoiser.parameters()
    )
    x, t = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(2)), torch.tensor([400])
    expected = unet(x, t)
    for name, place in checkpoint.denoiser.named_parameters():
        kept = place.clone()
        place.add_(0.1 * torch.randn(place.shape, generator=torch.Generator().manual_seed(3)))
        moved = float((checkpoint.denoiser(x, t) - expected).abs().max())
        place.copy_(kept)
        assert (moved > 1e-4) != name.endswith(".to_k.bias"), name


# --- what the file tells


@pytest.mark.parametrize("name", SIZES)
def test_the_published_models(name: str, tmp_path: Path) -> None:
    unet = random_unet(**MODELS[name])
    checkpoint = load_checkpoint(f"ddim:{save(tmp_path, unet, 'ema_diffusion_model-1.ckpt')}")
    assert (checkpoint.name, checkpoint.shape) == ("ema_diffusion_model-1", (3, SIZES[name], SIZES[name]))
    assert (checkpoint.classes, checkpoint.plan, checkpoint.licence) == (None, None, None)
    scheduler = checkpoint.scheduler
    assert (scheduler.class_name, scheduler.beta_schedule, scheduler.num_train_timesteps) == (
        "DDIMScheduler",
        "linear",
        1000,
    )
    assert (scheduler.beta_start, scheduler.beta_end, scheduler.prediction_type) == (1e-4, 0.02, "epsilon")
    assert (scheduler.clip_sample, scheduler.set_alpha_to_one, scheduler.timestep_spacing) == (False, True, "leading")
    assert scheduler.variance_type == ("fixed_small" if name == "lsun" else "fixed_large")
    assert any("holds no scheduler; taken as trained by DDPM" in warning for warning in checkpoint.warnings)
    assert not any("is a guess" in warning for warning in checkpoint.warnings)


def test_a_scheduler_from_a_file(tmp_path: Path) -> None:
    """What no option reaches: solver order, Karras sigmas, betas, prediction type; all in the folder that is made."""
    path, file = save(tmp_path, small()), tmp_path / "scheduler_config.json"
    settings = {
        "solver_order": 3,
        "use_karras_sigmas": True,
        "beta_schedule": "scaled_linear",
        "prediction_type": "v_prediction",
    }
    file.write_text(json.dumps({"_class_name": "DPMSolverMultistepScheduler", **settings}))
    checkpoint = load_checkpoint(f"ddim:{path}?sample_size=8&scheduler={file}")
    assert {key: checkpoint.scheduler[key] for key in settings} == settings
    assert checkpoint.plan_for(3).settings["solver_order"] == 3
    assert not any("scheduler" in warning for warning in checkpoint.warnings)
    assert checkpoint.sha256 != load(path).sha256
    written = tmp_path / "written.json"
    written.write_bytes(checkpoint.configs["scheduler/scheduler_config.json"])
    assert SchedulerConfig.from_file(written) == checkpoint.scheduler
    file.write_text('{"_class_name": "NoSuchScheduler"}')
    refused(f"{path}?sample_size=8&scheduler={file}", "'NoSuchScheduler' is not supported")


def test_the_image_size(tmp_path: Path) -> None:
    path = save(tmp_path, small(attend=(1,)))
    guessed = load_checkpoint(f"ddim:{path}")
    assert guessed.shape == (1, 32, 32)
    assert any("image size 32 is a guess" in warning for warning in guessed.warnings)
    assert load(path, sample_size=16).shape == (1, 16, 16)
    assert load(path, sample_size=(16, 24)).shape == (1, 16, 24)
    assert load_checkpoint(f"ddim:{path}?sample_size=16x24").shape == (1, 16, 24)
    refused(path, "sample_size is 7", "a multiple of 2", sample_size=7)
    refused(f"{path}?sample_size=large", "sample_size is 'large'", "HEIGHTxWIDTH")
    refused(save(tmp_path, small()), "do not tell the image size; say ?sample_size=N", "(1, 2)", "none")


def test_a_diffusers_folder_can_be_made_of_it(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    checkpoint = load(save(tmp_path, small(attend=(1,))))
    assert set(checkpoint.configs) == {"unet/config.json", "scheduler/scheduler_config.json"}
    for name, content in checkpoint.configs.items():
        (tmp_path / "d" / name).parent.mkdir(parents=True)
        (tmp_path / "d" / name).write_bytes(content)
    weights = checkpoint.denoiser.get_submodule("unet").state_dict()
    save_file(weights, tmp_path / "d" / "unet" / "diffusion_pytorch_model.safetensors")
    again = load_checkpoint(tmp_path / "d")
    assert (again.sha256, again.scheduler, again.shape) == (checkpoint.sha256, checkpoint.scheduler, checkpoint.shape)


# --- what lies around the weights


def nested(unet: OriginalUNet, kind: str) -> Any:
    """The model's weights and others that are twice as large, as trainers save them."""
    plain = unet.state_dict()
    ema = {name: 2 * value for name, value in plain.items()}
    parallel = {f"module.{name}": value for name, value in plain.items()}
    optimizer = {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1e-4}]}
    return {
        "ddim": [parallel, optimizer, 3, 1000, ema],
        "mmd-ddm": [parallel, optimizer, 3, 1000],
        "parallel ema": [plain, optimizer, 3, 1000, {f"module.{name}": value for name, value in ema.items()}],
        "dict": {"step": 3, "model": plain, "model_ema": ema, "optimizer": optimizer},
        "lightning": {"epoch": 3, "state_dict": parallel},
    }[kind]


@pytest.mark.parametrize("kind", ["ddim", "mmd-ddm", "parallel ema", "dict", "lightning"])
@pytest.mark.parametrize("ema", [None, True, False])
def test_the_entry_is_chosen(kind: str, ema: bool | None, tmp_path: Path) -> None:
    unet = small()
    path = tmp_path / "ckpt.pth"
    torch.save(nested(unet, kind), path)
    has_ema = kind not in ("mmd-ddm", "lightning")
    if ema and not has_ema:
        refused(path, "--ema asks for an average; the file has", ema=ema, sample_size=8)
        return
    checkpoint = load(path, ema=ema)
    factor = 2.0 if has_ema and ema is not False else 1.0
    assert torch.equal(checkpoint.denoiser.get_parameter("unet.conv_in.bias"), factor * bias_of(unet))
    said = [warning for warning in checkpoint.warnings if "is taken" in warning]
    assert [("average" in warning) == (factor == 2.0) for warning in said] == [True] * has_ema


def test_an_entry_by_its_name(tmp_path: Path) -> None:
    unet, path = small(), tmp_path / "ckpt.pth"
    torch.save(nested(unet, "ddim"), path)
    assert (
        load(path, ema="0").sha256
        == load(path, ema=False).sha256
        == load_checkpoint(f"ddim:{path}?ema=0&sample_size=8").sha256
    )
    assert (
        load(path, ema="4").sha256 == load(path).sha256 == load_checkpoint(f"ddim:{path}?ema=true&sample_size=8").sha256
    )
    refused(path, "--ema is '7'; the file has 0, 4", ema="7", sample_size=8)


def test_an_ambiguous_file(tmp_path: Path) -> None:
    plain, path = small().state_dict(), tmp_path / "ckpt.pth"
    torch.save({"ema_0.999": plain, "ema_0.9999": plain, "model": plain}, path)
    refused(path, "2 entries are averages (ema_0.999, ema_0.9999); name one", sample_size=8)
    assert load(path, ema="ema_0.999").shape == (1, 8, 8)
    torch.save({"first": plain, "second": plain}, path)
    refused(path, "which weights are meant is not clear, it has first, second", sample_size=8)
    torch.save({"ema": plain}, path)
    refused(path, "which weights are meant is not clear, it has ema", ema=False, sample_size=8)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".ckpt", ".safetensors"])
def test_file_types(suffix: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    unet, path = small(), tmp_path / f"model{suffix}"
    if suffix == ".safetensors":
        save_file(unet.state_dict(), path)
    else:
        torch.save(unet.state_dict(), path)
    checkpoint = load(path)
    assert checkpoint.sha256 == load(save(tmp_path, unet, "other.pth")).sha256
    assert any("is a pickle" in warning for warning in checkpoint.warnings) == (suffix != ".safetensors")


@pytest.mark.parametrize(
    ("dtype", "verb"), [(torch.float16, "upcast"), (torch.bfloat16, "upcast"), (torch.float64, "rounded")]
)
def test_other_precisions(dtype: torch.dtype, verb: str, tmp_path: Path) -> None:
    unet = small()
    torch.save({name: value.to(dtype) for name, value in unet.state_dict().items()}, tmp_path / "model.pth")
    checkpoint = load(tmp_path / "model.pth")
    assert {p.dtype for p in checkpoint.denoiser.parameters()} == {torch.float32}
    assert any(f"{verb} to float32" in warning for warning in checkpoint.warnings)
    assert torch.equal(checkpoint.denoiser.get_parameter("unet.conv_in.bias"), bias_of(unet).to(dtype).float())


# --- what is refused


def changed(folder: Path, drop: str = "", **more: Tensor) -> Path:
    weights = {name: value for name, value in small(attend=(1,)).state_dict().items() if not drop or drop not in name}
    torch.save({**weights, **{name.replace("__", "."): value for name, value in more.items()}}, folder / "bad.pth")
    return folder / "bad.pth"


def test_keys_that_do_not_fit(tmp_path: Path) -> None:
    zero = torch.zeros(1)
    refused(changed(tmp_path, logvar=zero, down__0__extra__weight=zero), "no place for down.0.extra.weight, logvar")
    refused(changed(tmp_path, drop="up.1.upsample"), "up.1.upsample.conv.bias, up.1.upsample.conv.weight missing")
    refused(changed(tmp_path, drop="nin_shortcut"), "nin_shortcut", "missing")
    refused(changed(tmp_path, drop="mid.attn_1.q"), "mid.attn_1.q.bias, mid.attn_1.q.weight missing")
    refused(changed(tmp_path, drop="temb.dense.0"), "not in the DDIM layout: temb.dense.0.weight missing; found")
    refused(changed(tmp_path, drop="downsample"), "down.0.downsample.conv.weight is missing (resamp_with_conv is off)")
    refused(changed(tmp_path, up__7__block__0__conv1__weight=zero), "no place for up.7.block.0.conv1.weight")
    refused(changed(tmp_path, up__1__block__0__conv_shortcut__weight=zero), "stand for the same")
    refused(changed(tmp_path, down__0__block__5__conv1__weight=zero), "[6, 1] blocks by level")


def test_shapes_that_do_not_fit(tmp_path: Path) -> None:
    kernel = torch.zeros(64, 32, 3, 3)
    path = changed(tmp_path, drop="nin_shortcut.weight", down__1__block__0__nin_shortcut__weight=kernel)
    refused(path, "down.1.block.0.nin_shortcut.weight is (64, 32, 3, 3), UNet2DModel takes (64, 32, 1, 1)")
    refused(changed(tmp_path, conv_in__weight=torch.zeros(32)), "conv_in.weight is missing or has too few dimensions")
    refused(changed(tmp_path, temb__dense__1__weight=torch.zeros(3, 3)), "temb.dense.1.weight is (3, 3)")
    refused(changed(tmp_path, temb__dense__0__weight=torch.zeros(64, 16)), "32 channels, the time embedding 16")
    refused(changed(tmp_path, norm_out__bias=torch.full((32,), torch.nan)), "holds NaN or infinity")
    torch.save({}, tmp_path / "empty.pth")
    refused(tmp_path / "empty.pth", "hold no state dict of tensors")


def test_learned_variance(tmp_path: Path) -> None:
    path = changed(tmp_path, conv_out__weight=torch.zeros(2, 32, 3, 3), conv_out__bias=torch.zeros(2))
    refused(path, "in_channels 1 and out_channels 2 differ", "learned its variance")


def test_files_that_are_none(tmp_path: Path) -> None:
    refused(tmp_path / "none.pth", "the file does not exist")
    refused(tmp_path, "the file is a folder")
    torch.save([1, "two", {"state": {}, "param_groups": []}], tmp_path / "odd.pth")
    refused(tmp_path / "odd.pth", "hold no state dict of tensors, but 0: int, 1: str, 2: an optimizer")
    torch.save(3, tmp_path / "odd.pth")
    refused(tmp_path / "odd.pth", "hold int, not a state dict")
    torch.save(small(), tmp_path / "module.pth")  # a pickled module, not its weights
    refused(tmp_path / "module.pth", "refused by weights_only=True or damaged (Unsupported global: GLOBAL ")
    (tmp_path / "text.pth").write_text("garbage")
    refused(tmp_path / "text.pth", "refused by weights_only=True or damaged")
    refused(f"{tmp_path / 'odd.pth'}?heads=3", "option heads=3 has no meaning; ddim: takes ema, sample_size")


def test_options_belong_to_files(tiny: Path) -> None:
    with pytest.raises(UsageError, match=r"option ema=True has no meaning; a diffusers folder takes none"):
        load_checkpoint(tiny, ema=True)


def test_a_bundle_finds_its_entry_again(tmp_path: Path) -> None:
    path = tmp_path / "ckpt.pth"
    torch.save(nested(small(), "ddim"), path)
    plain = load(path, ema=False)
    wanted = CheckpointRef(name=plain.name, sha256=plain.sha256)
    assert load_matching(f"ddim:{path}", wanted, ema=False, sample_size=8).sha256 == plain.sha256
    assert load_matching(f"ddim:{path}?ema=false&sample_size=8", wanted).sha256 == plain.sha256
    with pytest.raises(UsageError, match="has hash"):
        load_matching(f"ddim:{path}", wanted, sample_size=8)


def test_it_ships(tmp_path: Path) -> None:
    """File to verified ONNX bundle."""
    from mmd_export.build import BuildOptions, build

    path = save(tmp_path, small(attend=(1,)))
    bundle = build(BuildOptions(f"ddim:{path}?sample_size=8", "onnx", tmp_path / "bundle", steps=2))
    assert bundle.manifest.parity is not None
    assert max(bundle.manifest.parity.values()) <= 1e-4
    assert bundle.manifest.checkpoint.sha256 == load(path).sha256

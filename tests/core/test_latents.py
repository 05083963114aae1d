"""Latent models: the decoder in the graph, held against diffusers' own arithmetic."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto

from mmd_export.build import BuildOptions, build
from mmd_export.bundle import Bundle
from mmd_export.checkpoint import Checkpoint, load_checkpoint, load_matching
from mmd_export.commands.inspect import inspect
from mmd_export.commands.sample import SampleOptions, sample
from mmd_export.commands.verify import verify
from mmd_export.errors import UsageError
from mmd_export.parity import artefact_rung
from mmd_export.plan_options import PlanOptions
from mmd_export.reference import run_chain, sampler_of, to_uint8
from mmd_export.runtime import RunOptions
from mmd_export.step_session import per_step_session
from mmd_finetune.settings import make_settings
from mmd_finetune.task import prepare
from mmd_runtime.registry import get_runtime
from tests.cli.conftest import Command, command
from tests.models import AUTOENCODERS, LATENT, save_latent_model, save_model, weights_of, write_weights

__all__ = ["command"]
STEPS = 2
SHIFTED: dict[str, Any] = {"scaling_factor": 1.5305, "shift_factor": 0.0609}
STATISTICS: dict[str, Any] = {
    "scaling_factor": 0.5,
    "latents_mean": [-1.6574, 1.886, -1.383, 2.5155],
    "latents_std": [8.4927, 5.9022, 6.5498, 5.2299],
}


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_latent_model(tmp_path_factory.mktemp("latent") / "kl", **SHIFTED)


@pytest.fixture(scope="module")
def checkpoint(folder: Path) -> Checkpoint:
    return load_checkpoint(folder)


@pytest.fixture(scope="module")
def decoded(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Any batch from 1 to 3, decoded; ``test_the_whole_ladder`` verifies it."""
    out = tmp_path_factory.mktemp("bundles") / "decoded"
    return build(BuildOptions(str(folder), "onnx", out, steps=STEPS, batch="1..3", decode=True, verify=False))


@pytest.fixture(scope="module")
def looped(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The same in the form of a Loop."""
    out = tmp_path_factory.mktemp("bundles") / "looped"
    return build(
        BuildOptions(str(folder), "onnx", out, steps=STEPS, batch="1..3", decode=True, form="loop", verify=False)
    )


@pytest.fixture(scope="module")
def undecoded(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    out = tmp_path_factory.mktemp("bundles") / "latents"
    return build(BuildOptions(str(folder), "onnx", out, steps=STEPS, verify=False))


def as_diffusers(folder: Path, latents: np.ndarray[Any, Any], dtype: torch.dtype) -> np.ndarray[Any, Any]:
    """What diffusers' pipelines do with ``latents``: its own loader, vae.decode, then the clamp."""
    config = json.loads((folder / "vae" / "config.json").read_text())
    vae = getattr(diffusers, config["_class_name"]).from_pretrained(folder / "vae").to(dtype).eval()
    with torch.inference_mode():
        z = torch.from_numpy(latents).to(dtype)
        if vae.config.get("latents_mean") is not None:  # as in StableDiffusionXLPipeline
            mean, std = (
                torch.tensor(vae.config[name], dtype=dtype).view(1, 4, 1, 1) for name in ("latents_mean", "latents_std")
            )
            z = z * std / vae.config.scaling_factor + mean
        else:
            z = z / vae.config.scaling_factor + (vae.config.get("shift_factor") or 0.0)
        image: np.ndarray[Any, Any] = vae.decode(z).sample.clamp(-1, 1).numpy()
    return image


@pytest.mark.parametrize("kind", AUTOENCODERS)
@pytest.mark.parametrize(("dtype", "exact"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_the_reference_decodes_as_diffusers(kind: str, dtype: torch.dtype, exact: float, tmp_path: Path) -> None:
    folder = save_latent_model(tmp_path / "model", kind)
    checkpoint = load_checkpoint(folder)
    plan = checkpoint.plan_for(STEPS)
    noise = np.random.default_rng(0).standard_normal((3, 4, 8, 8)).astype(np.float32)
    used = checkpoint.as_double() if dtype == torch.float64 else checkpoint
    found = run_chain(sampler_of(used, plan), {"noise": noise}, dtype)
    assert found["sample"].shape == (3, 3, 16, 16)
    np.testing.assert_allclose(found["sample"], as_diffusers(folder, found["state.2"], dtype), rtol=0, atol=exact)
    saturated = np.abs(found["sample"]) == 1
    assert saturated.mean() < 0.5
    assert np.abs(found["state.2"]).max() > 1  # a clamped latent would show


@pytest.mark.parametrize("kind", AUTOENCODERS)
def test_every_autoencoder_in_the_graph(kind: str, tmp_path: Path) -> None:
    folder = save_latent_model(tmp_path / "model", kind)
    bundle = build(BuildOptions(str(folder), "onnx", tmp_path / "bundle", steps=STEPS, decode=True))
    golden = bundle.golden()
    assert bundle.manifest.decoder is not None
    assert bundle.manifest.decoder.autoencoder == kind
    np.testing.assert_allclose(golden.sample, as_diffusers(folder, golden.states[-1], torch.float32), rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["AutoencoderKL", "AutoencoderTiny"])
@pytest.mark.parametrize(("dtype", "exact"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_statistics_of_each_channel(kind: str, dtype: torch.dtype, exact: float, tmp_path: Path) -> None:
    """latents std / scale + mean: the decoder alone, on latents that no scale of all channels fits."""
    folder = save_latent_model(tmp_path / "model")
    config = {**STATISTICS, "scaling_factor": 0.7}
    edit(save_latent_model(tmp_path / "model", kind) / "vae" / "config.json", **config)
    decoder = load_checkpoint(folder).decoder
    assert decoder is not None
    latents = np.random.default_rng(0).standard_normal((2, 4, 8, 8))
    with torch.inference_mode():
        found = decoder.to(dtype)(torch.from_numpy(latents).to(dtype)).clamp(-1, 1).numpy()
    expected = as_diffusers(folder, latents, dtype)
    np.testing.assert_allclose(found, expected, rtol=0, atol=exact)
    edit(folder / "vae" / "config.json", latents_mean=None, latents_std=None)
    assert np.abs(as_diffusers(folder, latents, dtype) - expected).max() > 1e-3  # they matter


def test_statistics_of_each_channel_in_the_graph(tmp_path: Path) -> None:
    folder = save_latent_model(tmp_path / "kl", **STATISTICS)
    bundle = build(
        BuildOptions(str(folder), "onnx", tmp_path / "b", steps=STEPS, batch="1..3", decode=True, verify=False)
    )
    verify(bundle, checkpoint=str(folder)).require()
    golden, facts = bundle.golden(), bundle.manifest.decoder
    expected = as_diffusers(folder, golden.states[-1], torch.float64)
    np.testing.assert_allclose(golden.sample, expected, rtol=0, atol=1e-6)
    assert facts is not None
    assert list(facts.mean) == STATISTICS["latents_mean"]
    assert list(facts.std) == STATISTICS["latents_std"]
    assert "image = D(latent std / 0.5 + mean), a std and a mean for each channel" in bundle.card
    assert inspect(str(folder), PlanOptions())["decoder"]["std"] == facts.std
    again = Bundle.open(bundle.folder)
    assert again.manifest.decoder == facts


def test_the_whole_ladder(decoded: Bundle, folder: Path) -> None:
    report = verify(decoded, checkpoint=str(folder))
    report.require()
    names = [[comparison.name for comparison in rung.comparisons] for rung in report.rungs]
    assert all("sample" in found for found in names[2:])
    assert report.rungs[-1].worst < 2e-5


def test_behind_a_loop(looped: Bundle, decoded: Bundle) -> None:
    verify(looped).require()
    assert looped.manifest.graph.form == "loop"
    np.testing.assert_array_equal(looped.golden().sample, decoded.golden().sample)


def test_the_outside_of_the_graph(decoded: Bundle) -> None:
    manifest, golden = decoded.manifest, decoded.golden()
    assert manifest.spec("noise").shape == ("batch", 4, 8, 8)
    assert manifest.spec("sample").shape == ("batch", 3, 16, 16)
    assert manifest.plan["clamp_output"] is False
    assert golden.sample.shape[1:] == (3, 16, 16)
    assert golden.states[-1].shape[1:] == (4, 8, 8)
    assert np.abs(golden.states[-1]).max() > 1 >= np.abs(golden.sample).max()
    facts = manifest.decoder
    assert facts is not None
    assert facts.model_dump() == {"autoencoder": "AutoencoderKL", "scale": 1.5305, "shift": 0.0609, "precision": "fp32"}
    assert "| decoder | AutoencoderKL, in the graph; image = D(latent / 1.5305 + 0.0609); fp32 |" in decoded.card
    assert "noise in, image out" in decoded.card


def test_the_decoder_stands_once_behind_the_last_state(decoded: Bundle, undecoded: Bundle, folder: Path) -> None:
    proto, plain = (onnx.load(bundle.artefact_path) for bundle in (decoded, undecoded))
    behind = [node for node in proto.graph.node if node.name.startswith("decode/")]
    assert "state.2" in [name for node in behind for name in node.input]
    assert not [node for node in plain.graph.node if node.name.startswith("decode/")]
    assert not {"Constant", "CastLike", "Identity"} & {node.op_type for node in proto.graph.node}
    weights = [tensor for tensor in proto.graph.initializer if tensor.name.startswith("decode/")]
    assert all(tensor.data_type in (onnx.TensorProto.FLOAT, onnx.TensorProto.INT64) for tensor in weights)
    stored = {name: each for name, each in weights_of(folder / "vae").items() if name.startswith(("decoder", "post"))}
    merged = (".to_k.weight", ".to_out.0.weight")  # of one head: into the queries', and into the values'
    read = 4 * sum(tensor.numel() for name, tensor in stored.items() if not name.endswith(merged))
    more = decoded.manifest.graph.unique_weight_bytes - undecoded.manifest.graph.unique_weight_bytes
    for found in (more, sum(len(tensor.raw_data) for tensor in weights)):
        assert 0.99 * read <= found < 1.1 * read + 2000


def test_the_decoder_of_a_graph_in_half_precision_is_float32(folder: Path, tmp_path: Path) -> None:
    """No weight and no value of it is narrowed: from the last state on it is diffusers' float32 decoder."""
    bundle = build(
        BuildOptions(str(folder), "onnx", tmp_path / "b", steps=STEPS, precision="fp16", decode=True, verify=False)
    )
    proto = onnx.load(bundle.artefact_path)
    kinds: dict[bool, set[int]] = {True: set(), False: set()}
    for tensor in proto.graph.initializer:
        kinds[tensor.name.startswith("decode/")].add(tensor.data_type)
    assert TensorProto.FLOAT16 in kinds[False]
    assert kinds[True] <= {TensorProto.FLOAT, TensorProto.INT64}
    behind = [node for node in proto.graph.node if node.name.startswith("decode/")]
    assert behind
    assert not [node for node in behind if node.op_type == "Cast"]
    assert bundle.manifest.decoder is not None
    assert bundle.manifest.decoder.precision == "fp32"
    chain = get_runtime("onnxruntime").open_chain(bundle, RunOptions()).run_chain({"noise": bundle.golden().noise[:1]})
    expected = as_diffusers(folder, chain["state.2"], torch.float32)
    np.testing.assert_allclose(chain["sample"], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("runtime", ["onnxruntime", "torch"])
def test_every_batch_in_every_runtime(decoded: Bundle, folder: Path, runtime: str, count: int) -> None:
    options = RunOptions(1, str(folder))
    opened, golden = get_runtime(runtime), decoded.golden()
    inputs = {"noise": golden.noise[:count]}
    found = opened.open(decoded, options).run(inputs)["sample"]
    np.testing.assert_allclose(found, golden.sample[:count], rtol=0, atol=2e-5)
    chain = opened.open_chain(decoded, options).run_chain(inputs)
    assert chain["state.2"].shape == (count, 4, 8, 8)
    np.testing.assert_allclose(chain["state.2"], golden.states[1][:count], rtol=0, atol=2e-5)


def test_a_wrong_decoder_is_seen(decoded: Bundle, tmp_path: Path) -> None:
    """One weight of the decoder off by a little: the states agree, the sample does not."""
    proto = onnx.load(decoded.artefact_path)
    tensor = next(each for each in proto.graph.initializer if each.name.endswith("decoder.conv_out.bias"))
    tensor.raw_data = (np.frombuffer(tensor.raw_data, np.float32) + np.float32(1e-3)).tobytes()
    (tmp_path / "model.onnx").write_bytes(proto.SerializeToString())
    damaged = _Elsewhere(decoded, tmp_path)
    runtime = get_runtime("onnxruntime")
    rung = artefact_rung(damaged, runtime.open(damaged, RunOptions()), runtime.open_chain(damaged, RunOptions()))
    assert [comparison.name for comparison in rung.failures] == ["sample"]


class _Elsewhere(Bundle):
    """A bundle whose artefact lies in another folder, unchecked."""

    def __init__(self, bundle: Bundle, folder: Path) -> None:
        super().__init__(folder, bundle.manifest)
        self.__dict__["_golden"] = bundle.golden()


def test_bytes_of_the_image(folder: Path, tmp_path: Path) -> None:
    options = BuildOptions(
        str(folder), "onnx", tmp_path / "bundle", steps=STEPS, output="uint8", batch="2", decode=True, verify=False
    )
    bundle = build(options)
    golden = bundle.golden()
    assert bundle.manifest.spec("sample").shape == (2, 16, 16, 3)
    assert golden.sample.dtype == np.uint8
    image = to_uint8(as_diffusers(folder, golden.states[-1], torch.float64))
    assert np.abs(image.astype(int) - golden.sample).max() <= 1
    found = get_runtime("onnxruntime").open(bundle, RunOptions()).run({"noise": golden.noise[:2]})["sample"]
    assert np.abs(found.astype(int) - golden.sample[:2]).max() <= 1


def test_a_scheduler_that_clamps_latents_is_warned_of(tmp_path: Path) -> None:
    folder, said = save_latent_model(tmp_path / "clamped", **SHIFTED), list[str]()
    edit(next(folder.rglob("scheduler_config.json")), clip_sample=True)
    build(BuildOptions(str(folder), "onnx", tmp_path / "out", steps=1, verify=False), said.append)
    assert any("warning: the scheduler clamps the clean guess to 1, and these are latents" in line for line in said)


def test_without_decode_the_latent_comes_out_as_it_is(undecoded: Bundle, folder: Path) -> None:
    golden = undecoded.golden()
    assert undecoded.manifest.decoder is None
    assert undecoded.manifest.spec("sample").shape == (1, 4, 8, 8)
    assert np.abs(golden.sample).max() > 1
    np.testing.assert_array_equal(golden.sample, golden.states[-1])
    assert "noise in, latent out" in undecoded.card
    verify(undecoded, checkpoint=str(folder)).require()


def test_the_usual_session_decodes_too(decoded: Bundle, checkpoint: Checkpoint) -> None:
    golden = decoded.golden()
    run = per_step_session(checkpoint, checkpoint.plan_for(STEPS), 2, threads=1)
    np.testing.assert_allclose(run({"noise": golden.noise[:2]}), golden.sample[:2], rtol=0, atol=2e-5)


def test_a_bundle_finds_the_checkpoint_it_was_built_from(
    decoded: Bundle, undecoded: Bundle, folder: Path, tmp_path: Path
) -> None:
    assert load_matching(str(folder), decoded.manifest.checkpoint).decoder is not None
    assert load_matching(str(folder), undecoded.manifest.checkpoint).decoder is None
    other = save_latent_model(tmp_path / "kl", **SHIFTED)
    weights = weights_of(other / "vae")
    weights["decoder.conv_out.bias"] += 1e-3
    write_weights(other / "vae", weights)
    assert load_matching(str(other), undecoded.manifest.checkpoint).latent  # the network is the same
    with pytest.raises(UsageError, match="the bundle was built from kl"):
        load_matching(str(other), decoded.manifest.checkpoint)


def test_a_picture_of_a_model_is_decoded(folder: Path, decoded: Bundle, undecoded: Bundle) -> None:
    drawn = sample(SampleOptions(str(folder), seed=3, count=2, steps=STEPS))
    assert drawn.shape == (2, 3, 16, 16)
    again = sample(SampleOptions(str(decoded.folder), seed=3, count=2))
    np.testing.assert_allclose(drawn, again, rtol=0, atol=2e-5)
    with pytest.raises(UsageError, match="gives latents, no picture; build it with --decode"):
        sample(SampleOptions(str(undecoded.folder)))


def test_the_commands(folder: Path, tmp_path: Path, command: Command) -> None:
    out, grid = tmp_path / "bundle", tmp_path / "grid.png"
    arguments = ("--target", "onnx", "--out", out, "--steps", 1, "--output", "uint8", "--decode")
    assert command("build", folder, *arguments)[0] == 0
    assert Bundle.open(out).manifest.decoder is not None
    assert command("sample", out, "--count", 2, "--out", grid)[0] == 0
    assert grid.is_file()
    code, shown, _ = command("inspect", folder)
    assert code == 0
    assert "AutoencoderKL, scale 1.5305, shift 0.0609, precision fp32" in shown
    code, _, said = command("evaluate", out, "--count", 2)
    assert code == 2
    assert "encoder digits-conv takes images (1, 8, 8), the model makes (3, 16, 16)" in said


def test_channels_of_no_picture_are_a_warning(tmp_path: Path, folder: Path) -> None:
    (told,) = load_checkpoint(save_model(tmp_path / "bare", **LATENT)).warnings
    assert told == "4 channels and no vae/ beside them: taken for pixels in [-1, 1] and clamped, not for latents"
    assert not load_checkpoint(folder).warnings


def test_inspect_says_what_the_decoder_is(folder: Path, decoded: Bundle) -> None:
    model, bundle = (inspect(str(source), PlanOptions()) for source in (folder, decoded.folder))
    assert model["decoder"]["autoencoder"] == bundle["decoder"]["autoencoder"] == "AutoencoderKL"
    stored = [tensor for name, tensor in weights_of(folder / "vae").items() if name.startswith(("decoder", "post"))]
    assert model["decoder"]["parameters"] == sum(tensor.numel() for tensor in stored)


def test_attention_under_its_old_names(folder: Path, tmp_path: Path, checkpoint: Checkpoint) -> None:
    old = save_latent_model(tmp_path / "kl", **SHIFTED)
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, tensor in weights_of(old / "vae").items():
        new = name
        for now, before in names.items():
            new = new.replace(f".{now}.", f".{before}.")
        renamed[new] = tensor
    assert any(".proj_attn." in name for name in renamed)
    write_weights(old / "vae", renamed)
    latent = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    found, wanted = load_checkpoint(old).decoder, checkpoint.decoder
    assert found is not None
    assert wanted is not None
    torch.testing.assert_close(found(latent), wanted(latent), rtol=0, atol=0)


def test_what_cannot_be_decoded_still_gives_latents(tmp_path: Path) -> None:
    folder = save_latent_model(tmp_path / "kl")
    config = folder / "vae" / "config.json"
    decode = BuildOptions(str(folder), "onnx", tmp_path / "out", steps=STEPS, decode=True)
    for reason, changes in (
        ("autoencoder class 'AutoencoderOobleck' cannot be decoded here", {"_class_name": "AutoencoderOobleck"}),
        ("latents_mean is stated and latents_std is not", {"_class_name": "AutoencoderKL", "latents_mean": [0.0] * 4}),
        ("latents_mean and shift_factor 0.5 are both stated", {"latents_std": [1.0] * 4, "shift_factor": 0.5}),
    ):
        edit(config, **changes)
        assert load_checkpoint(folder).plan_for(STEPS).clamp_output is False
        with pytest.raises(UsageError, match=f"kl: --decode needs a decoder: .*{reason}"):
            build(decode)
        with pytest.raises(UsageError, match=f"kl makes latents, no picture: .*{reason}"):
            sample(SampleOptions(str(folder), steps=STEPS))
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UsageError, match=r"vae holds no weights"):
        build(decode)
    assert not (tmp_path / "out").exists()


def test_what_is_refused(folder: Path, tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"tiny: --decode needs a decoder: it has no autoencoder"):
        build(BuildOptions(str(tiny), "onnx", tmp_path / "out", steps=STEPS, decode=True))
    with pytest.raises(UsageError, match=r"kl makes latents, --output uint8 is for images; add --decode"):
        build(BuildOptions(str(folder), "onnx", tmp_path / "out", steps=STEPS, output="uint8"))
    with pytest.raises(UsageError, match="model kl makes latents; only models of pixels are tuned"):
        prepare(make_settings({"model": str(folder), "steps": STEPS, "out": tmp_path / "run"}))
    assert not list(tmp_path.iterdir())

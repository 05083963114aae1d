"""What ``benchmarks.optimum_pipeline`` runs inside the environment of optimum: both sides, in one process.

``save``: a pipeline of random weights. ``measure``: image against image, then both timed. ``work``: processor time on
one thread. ``open``: one side loaded, then a line of facts. Needs the packages of requirements-optimum.txt and this
repository on PYTHONPATH.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import resource
import string
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

STEPS, SEED, TOKENS, TEXT_WIDTH, LATENT_CHANNELS = 5, 0, 77, 64, 4
REST, WARMUP = 0.1, 10  # as in benchmarks.speed
LARGEST_DIFFERENCE = 1e-4  # of two images in [-1, 1] that are taken for the same
# Side of the latents, widths of the UNet. Stable Diffusion's layout, but three levels for its four: 4 pixels a latent.
MODELS: dict[str, tuple[int, tuple[int, ...]]] = {
    "16x16 latents, 4.1 M parameters": (16, (32, 64, 96)),
    "32x32 latents, 28.9 M parameters": (32, (96, 192, 288)),
}
GRAPH, PIPELINE, SESSIONS = "one graph", "optimum's pipeline", "optimum's sessions without the pipeline"
FIXED = "optimum's sessions with fixed shapes"
Call = Callable[[], NDArray[Any]]


def save(name: str, folder: Path) -> int:
    """A Stable Diffusion pipeline with random weights, in diffusers' layout; the parameters of UNet and VAE."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    (side, widths), text = MODELS[name], ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D")
    torch.manual_seed(SEED)
    unet = UNet2DConditionModel(
        sample_size=side, in_channels=LATENT_CHANNELS, out_channels=LATENT_CHANNELS, block_out_channels=widths,
        down_block_types=(text[0], text[0], "DownBlock2D"), up_block_types=("UpBlock2D", text[1], text[1]),
        cross_attention_dim=TEXT_WIDTH, attention_head_dim=8,
    )  # fmt: skip
    vae = AutoencoderKL(
        latent_channels=LATENT_CHANNELS, block_out_channels=(32, 64, 64), sample_size=4 * side,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
    )  # fmt: skip
    scheduler = DDIMScheduler(  # Stable Diffusion 2's
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1, prediction_type="v_prediction",
    )  # fmt: skip
    tokenizer, text_encoder = text_side(folder)
    pipeline = StableDiffusionPipeline(
        vae=vae, unet=unet, scheduler=scheduler, tokenizer=tokenizer, text_encoder=text_encoder,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.save_pretrained(folder)
    return sum(weight.numel() for part in (unet, vae) for weight in part.parameters())


def text_side(folder: Path) -> tuple[Any, Any]:
    """A CLIP tokenizer that spells, and a small random text encoder; their files are left in ``folder``."""
    transformers: Any = importlib.import_module("transformers")
    letters = string.ascii_lowercase
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    spelling = folder / "tokenizer"
    spelling.mkdir(parents=True)
    (spelling / "vocab.json").write_text(json.dumps({word: place for place, word in enumerate(words)}))
    (spelling / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(
        str(spelling / "vocab.json"), str(spelling / "merges.txt"), model_max_length=TOKENS
    )
    start, end = len(words) - 2, len(words) - 1
    config = transformers.CLIPTextConfig(
        vocab_size=len(words), hidden_size=TEXT_WIDTH, intermediate_size=2 * TEXT_WIDTH, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=TOKENS, bos_token_id=start, eos_token_id=end, pad_token_id=end,
    )  # fmt: skip
    return tokenizer, transformers.CLIPTextModel(config)


def open_optimum(folder: Path) -> Any:
    """The pipeline as optimum's documentation opens it."""
    return importlib.import_module("optimum.onnxruntime").ORTStableDiffusionPipeline.from_pretrained(folder)


def open_graph(folder: Path) -> Any:
    """The bundle as an app opens it."""
    from mmd_runtime.app import open_bundle

    return open_bundle(folder)


SIDES: Mapping[str, Callable[[Path], Any]] = {PIPELINE: open_optimum, GRAPH: open_graph}


def calls(exported: Path, bundle: Path) -> dict[str, Call]:
    """Both sides on the same noise and the same text states, which come from optimum's own text encoder."""
    import torch

    pipeline, sampler = open_optimum(exported), open_graph(bundle)
    pipeline.set_progress_bar_config(disable=True)
    text = pipeline.encode_prompt("a photograph", "cpu", 1, False)[0]
    side = pipeline.unet.config.sample_size
    noise = np.random.default_rng(SEED).standard_normal((1, LATENT_CHANNELS, side, side)).astype(np.float32)
    feeds, latents = {"noise": noise, "encoder_hidden_states": text.numpy()}, torch.from_numpy(noise)

    def as_users_call_it() -> NDArray[Any]:
        images: NDArray[Any] = pipeline(
            prompt_embeds=text, latents=latents, num_inference_steps=STEPS, guidance_scale=1.0, output_type="np"
        ).images
        return images

    sessions = bare_sessions(pipeline.unet.session, pipeline.vae_decoder.session, feeds)
    return {GRAPH: lambda: sampler.run(feeds), PIPELINE: as_users_call_it, SESSIONS: sessions}


def bare_sessions(unet: Any, decoder: Any, feeds: Mapping[str, NDArray[Any]]) -> Call:
    """The UNet K times and the decoder once, each time on the same input."""
    noise, text = feeds["noise"], feeds["encoder_hidden_states"]
    step = {"sample": noise, "timestep": np.array(500, np.float32), "encoder_hidden_states": text}

    def call() -> NDArray[Any]:
        for _ in range(STEPS):
            unet.run(None, step)
        images: NDArray[Any] = decoder.run(None, {"latent_sample": noise})[0]
        return images

    return call


def measure(exported: Path, bundle: Path, rounds: int) -> dict[str, Any]:
    """The largest difference of the two images, in [-1, 1], and what optimum takes next to the one graph."""
    from mmd_export import latency

    candidates = calls(exported, bundle)
    ours, theirs = candidates[GRAPH](), 2 * candidates[PIPELINE]().transpose(0, 3, 1, 2) - 1
    difference = float(np.abs(ours - theirs).max())
    if not difference <= LARGEST_DIFFERENCE:
        sys.exit(
            f"the images differ by {difference:.1e}, at most {LARGEST_DIFFERENCE:.0e} is one image; nothing was timed"
        )
    report = latency.measure(candidates, rounds, warmup=WARMUP, rest=REST)
    return {
        "rounds": rounds,
        "takes": {name: vars(report.ratio(name, GRAPH)) for name in (PIPELINE, SESSIONS)},
        "largest_difference": difference,
        "image": {"shape": list(ours.shape), "std": float(ours.std()), "clamped": float((np.abs(ours) == 1).mean())},
        "notes": list(report.notes),
    }


def work(exported: Path, bundle: Path, rounds: int) -> dict[str, Any]:
    """Processor time on one thread, which neither other programs nor idle threads meet."""
    from mmd_export import latency
    from mmd_runtime.app import open_bundle

    sampler = open_bundle(bundle, threads=1)
    drawn = np.random.default_rng(SEED)
    shapes = {spec.name: spec.shape for spec in sampler.bundle.manifest.inputs}
    feeds = {name: drawn.standard_normal([int(size) for size in shape], np.float32) for name, shape in shapes.items()}
    side = feeds["noise"].shape[-1]
    fixed = {"batch_size": 1, "height": side, "width": side, "sequence_length": TOKENS}
    fixed |= {"latent_height": side, "latent_width": side}  # of the decoder
    candidates = {GRAPH: lambda: sampler.run(feeds)}
    for name, sizes in ((SESSIONS, {}), (FIXED, fixed)):
        unet, decoder = (one_thread(exported / part / "model.onnx", sizes) for part in ("unet", "vae_decoder"))
        candidates[name] = bare_sessions(unet, decoder, feeds)
    report = latency.measure(candidates, rounds, WARMUP, clock=time.process_time, rest=REST)
    return {name: vars(report.ratio(name, GRAPH)) for name in (SESSIONS, FIXED)}


def one_thread(model: Path, sizes: Mapping[str, int]) -> Any:
    """A session as onnxruntime opens it by default, but for its threads and for free dimensions that are given."""
    ort: Any = importlib.import_module("onnxruntime")
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = 1
    for name, size in sizes.items():
        settings.add_free_dimension_override_by_name(name, size)
    return ort.InferenceSession(str(model), settings, providers=["CPUExecutionProvider"])


def opened(name: str, folder: Path) -> dict[str, Any]:
    """One side, ready to run: its sessions and the memory of the process so far."""
    side = SIDES[name](folder)  # lives until the sessions are counted
    session: type = importlib.import_module("onnxruntime").InferenceSession
    sessions = sum(isinstance(found, session) for found in gc.get_objects())
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"side": type(side).__name__, "sessions": sessions, "peak_memory_mb": round(memory)}


ACTIONS: Mapping[str, Callable[..., Any]] = {"save": save, "measure": measure, "work": work, "open": opened}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    of_save = actions.add_parser("save")
    of_save.add_argument("name", choices=MODELS)
    of_save.add_argument("folder", type=Path)
    for action in ("measure", "work"):
        of_both = actions.add_parser(action)
        of_both.add_argument("exported", type=Path)
        of_both.add_argument("bundle", type=Path)
        of_both.add_argument("--rounds", type=int, required=True)
    of_open = actions.add_parser("open")
    of_open.add_argument("name", choices=SIDES)
    of_open.add_argument("folder", type=Path)
    arguments = vars(parser.parse_args())
    print(json.dumps(ACTIONS[arguments.pop("action")](**arguments)), flush=True)


if __name__ == "__main__":
    main()

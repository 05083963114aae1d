"""The pictures of docs/how-it-works.md, into docs/images/; a few seconds. Nothing is measured here."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.common import ROOT
from mmd_export.checkpoint import Checkpoint, load_checkpoint
from mmd_export.denoiser import AtTimesteps
from mmd_export.noise import sampler_noise
from mmd_export.plan import StepPlan
from mmd_export.plan_picture import save_plan_picture
from mmd_export.unroll import UnrolledSampler
from mmd_finetune.kernels import make_kernel

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STEPS = 5
SEED, SHOWN = 7, 6
CALL, WEIGHTS, NUMBERS = "#4353d6", "#d68a2e", "#2f8f5b"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "docs/images")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    checkpoint = load_checkpoint("digits")
    plan = checkpoint.plan_for(STEPS)
    save_plan_picture(plan, out / "plan.png")
    draw_chain(chain(checkpoint, plan), plan, out / "chain.png")
    draw_graph(out / "graph.png")
    draw_witness(out / "witness.png")


def chain(checkpoint: Checkpoint, plan: StepPlan) -> list[NDArray[np.float32]]:
    """The noise and every state of ``SHOWN`` images, each (N, 1, 8, 8)."""
    noise = sampler_noise(SEED, SHOWN, checkpoint.shape, 0)["noise"]
    sampler = UnrolledSampler(AtTimesteps(checkpoint.denoiser, plan.timesteps), plan).eval()
    with torch.inference_mode():
        return [noise, *(state.numpy() for state in sampler.chain(torch.from_numpy(noise)))]


def draw_chain(states: list[NDArray[np.float32]], plan: StepPlan, path: Path) -> None:
    """One row an image, one column a state."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 1.15 * SHOWN), layout="constrained")
    axes = figure.subplots(SHOWN, len(states))
    for column, state in enumerate(states):
        title = "noise" if column == 0 else f"state.{column}\nafter t = {plan.timesteps[column - 1]:.0f}"
        axes[0, column].set_title(title, fontsize=9)
        for row in range(SHOWN):
            axes[row, column].imshow(state[row, 0], cmap="gray", vmin=-1.5, vmax=1.5)
            axes[row, column].axis("off")
    save(figure, path)


def draw_graph(path: Path) -> None:
    """Boxes: K calls of one network with shared weights, and the numbers of the plan between them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 3.0), layout="constrained")
    axes = figure.subplots()
    axes.set_xlim(0, 8.2)
    axes.set_ylim(0, 3.1)
    axes.axis("off")
    box(axes, (1.2, 2.35), (5.8, 0.55), "weights, stored once", WEIGHTS)
    place = 1.2
    axes.annotate("noise", (1.15, 1.1), (0.1, 1.1), arrowprops={"arrowstyle": "->"}, va="center")
    for k in (1, 2, 3):
        box(axes, (place, 0.75), (0.95, 0.7), f"network\ncall {k}", CALL)
        axes.annotate("", (place + 0.48, 1.5), (place + 0.48, 2.3), arrowprops={"arrowstyle": "->", "color": WEIGHTS})
        box(axes, (place + 1.05, 0.75), (0.75, 0.7), f"numbers\nof step {k}", NUMBERS)
        axes.text(place + 0.9, 0.4, f"state.{k}", fontsize=8, ha="center")
        place += 2.0
    axes.annotate("", (7.55, 1.1), (7.05, 1.1), arrowprops={"arrowstyle": "->"})
    axes.text(7.6, 1.1, "sample", va="center")
    axes.text(0.1, 0.05, "no timestep, no random number, no loop in your app: one call makes the images", fontsize=8)
    save(figure, path)


def box(axes: Axes, corner: tuple[float, float], size: tuple[float, float], text: str, colour: str) -> None:
    """A filled box with a label."""
    from matplotlib.patches import FancyBboxPatch

    width, height = size
    axes.add_patch(FancyBboxPatch(corner, width, height, boxstyle="round,pad=0.02", fc=colour, ec="none"))
    middle = (corner[0] + width / 2, corner[1] + height / 2)
    axes.text(*middle, text, color="white", ha="center", va="center", fontsize=8.5)


def draw_witness(path: Path) -> None:
    """w(x) = E k(x, real) - E k(x, generated) on a line: where it rises is where samples are pulled to."""
    from matplotlib.figure import Figure

    generator = np.random.default_rng(0)
    real = np.concatenate([generator.normal(-1.5, 0.4, 600), generator.normal(1.2, 0.6, 600)])
    generated = generator.normal(0.0, 1.0, 1200)
    points = np.linspace(-4.0, 4.0, 400)
    tensors = [torch.from_numpy(values[:, None]) for values in (points, real, generated)]
    kernel = make_kernel("gaussian", tensors[1])
    witness = kernel(tensors[0], tensors[1]).mean(1) - kernel(tensors[0], tensors[2]).mean(1)
    figure = Figure(figsize=(7.0, 3.4), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    for values, name, colour in ((real, "real", NUMBERS), (generated, "generated", CALL)):
        above.hist(values, bins=80, range=(-4.0, 4.0), alpha=0.55, label=name, color=colour)
    above.legend(fontsize=8)
    above.set_yticks([])
    below.plot(points, witness.numpy(), color=WEIGHTS)
    below.axhline(0.0, color="0.8", zorder=0)
    below.set_ylabel("witness", fontsize=8)
    below.set_xlabel("a feature; samples are moved where the witness rises", fontsize=8)
    save(figure, path)


def save(figure: Any, path: Path) -> None:
    """A PNG that depends on the drawing alone."""
    figure.savefig(path, dpi=110, metadata={"Software": None})
    print(f"{path.name} written")


if __name__ == "__main__":
    main()

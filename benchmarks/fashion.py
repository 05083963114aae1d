"""Fashion-MNIST at 32x32 by step budget: untuned DDIM, the paper's recipe, ours.

``python finetune/recipes/train_fashion.py --data FILE.npz`` comes first; ``--base`` is its output. Writes
``benchmarks/results/fashion.json`` cell by cell; a run that was stopped goes on. The recipes are
``finetune/configs/fashion-mnist-paper.toml`` and ``fashion-mnist.toml``, with the paths of ``--base``. Distances are
those of 10,000 samples to the 10,000 test images, on noise that neither tuning nor the choice of weights saw.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from benchmarks.budget_tables import beats_the_paper, keeps_recall, reaches
from benchmarks.budgets import PAPER, Recipe, Ruler, arguments_of, study
from benchmarks.cells import CellFile
from benchmarks.common import RESULTS, ROOT
from mmd_finetune.data import load_images
from mmd_finetune.features import load_encoder

CONFIGS = {
    "paper": (ROOT / "finetune/configs/fashion-mnist-paper.toml", ()),
    "ours": (ROOT / "finetune/configs/fashion-mnist.toml", ("pixels",)),
}
BUDGETS = (5, 2, 10, 20)
UNTUNED = (20, 50)
COUNT = 10_000


def main() -> None:
    parser = arguments_of(str(__doc__), BUDGETS, ROOT / "runs/fashion/tuned", RESULTS / "fashion.json")
    parser.add_argument("--base", type=Path, default=ROOT / "runs/fashion", help="what the recipe made")
    arguments = parser.parse_args()
    base = arguments.base
    scripts = [f"torchscript:{base / name}.pt" for name in ("fashion-conv", "fashion-residual")]
    training, test = (torch.from_numpy(load_images(str(base / f"{part}.npz"))).clone() for part in ("train", "test"))
    gpu = arguments.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    mine, judge = (load_encoder(name) for name in scripts)
    count = min(COUNT, len(test))
    ruler = Ruler(test, training, test, mine, judge, draws=1, count=count, batch=500, device=device)
    trained = json.loads((base / "training.json").read_text(encoding="utf-8"))
    facts = {"base": {name: trained[name] for name in ("parameters", "accuracy")} | trained["curve"][-1]}
    file = CellFile(arguments.out, "benchmarks/fashion.py", facts)
    given = {"model": str(base / "base"), "data": str(base / "train.npz"), "holdout": scripts[1]}
    recipes = {
        name: Recipe(config, given | {"features": (scripts[0], *more)} | (PAPER if name == "paper" else {}))
        for name, (config, more) in CONFIGS.items()
    }
    study(file, ruler, recipes, arguments, UNTUNED)
    print({
        "5 steps at least untuned 20": reaches(file.cells, 5, 20),
        "better than the paper": beats_the_paper(file.cells),
        "recall not below untuned 20": keeps_recall(file.cells, 20),
    })  # fmt: skip


if __name__ == "__main__":
    main()

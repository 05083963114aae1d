"""Few-step sampling of the built-in digits by budget: untuned DDIM, the paper's recipe, ours.

Writes ``benchmarks/results/digits_budgets.json`` cell by cell; a run that was stopped goes on, also within a tuning
run. ``paper`` is ``finetune/configs/digits-paper.toml``, ``ours`` is ``digits-long.toml``, both with the weights that
score best on the held-out encoder, though the paper's authors stopped by eye. Distances are those of 5 draws of 1,797
images pooled, on noise that neither tuning nor the choice of weights saw; real are all 1,797 scans. Recall (k = 5) is
the mean of the draws, each against the scans. Memorisation compares the 1,437 training scans with the 360 held out
(1/2: no preference). Some hours on 2 cores.
"""

from __future__ import annotations

import torch

from benchmarks.budget_tables import beats_the_paper, keeps_recall, reaches
from benchmarks.budgets import PAPER, Recipe, Ruler, arguments_of, study
from benchmarks.cells import CellFile
from benchmarks.common import RESULTS, ROOT
from mmd_finetune.digits import load_digits_split
from mmd_finetune.features import load_encoder

RECIPES = {
    "paper": Recipe(ROOT / "finetune/configs/digits-paper.toml", PAPER),
    "ours": Recipe(ROOT / "finetune/configs/digits-long.toml"),
}
BUDGETS = (5, 3, 10, 2, 1, 15, 20)
UNTUNED = (20, 50)
DRAWS = 5


def ruler() -> Ruler:
    split = load_digits_split()
    training, held_out = (torch.from_numpy(part).clone() for part in (split.train_images, split.held_out_images))
    real = torch.cat([training, held_out])
    encoders = load_encoder("digits-conv"), load_encoder("digits-mlp")
    return Ruler(real, training, held_out, *encoders, DRAWS, len(real), 256, torch.device("cpu"))


def main() -> None:
    out, runs = RESULTS / "digits_budgets.json", ROOT / "runs/digits_budgets"
    arguments = arguments_of(str(__doc__), BUDGETS, runs, out).parse_args()
    scans = ruler()
    facts = {"draws": DRAWS, "samples_a_draw": scans.count}
    file = CellFile(arguments.out, "benchmarks/digits_budgets.py", facts)
    study(file, scans, RECIPES, arguments, UNTUNED)
    print({
        "5 steps at least untuned 50": reaches(file.cells, 5, 50),
        "3 steps at least untuned 20": reaches(file.cells, 3, 20),
        "better than the paper": beats_the_paper(file.cells),
        "recall not below untuned 20": keeps_recall(file.cells, 20),
    })  # fmt: skip


if __name__ == "__main__":
    main()

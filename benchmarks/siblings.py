"""The examples of docs/siblings.md in their default mode, one after the other: numbers and pictures; about 7 minutes.

One run each, one seed. ``seconds`` is the training alone.
"""

from __future__ import annotations

import importlib
import shutil
import tempfile
from pathlib import Path

from benchmarks.common import RESULTS, ROOT, write_result
from benchmarks.tables import SIBLINGS
from docs.examples.common import COUNT, HELD_OUT

PICTURES = ROOT / "docs" / "siblings"


def main() -> None:
    PICTURES.mkdir(exist_ok=True)
    examples = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in SIBLINGS:
            out = Path(folder) / name
            examples[name] = importlib.import_module(f"docs.examples.{name}").run(out)
            shutil.copyfile(out / "samples.png", PICTURES / f"{name}.png")
            print(name, examples[name]["held_out_frechet_distance"], flush=True)
    values = {"held_out_encoder": HELD_OUT, "samples": COUNT, "examples": examples}
    write_result(RESULTS / "siblings.json", "benchmarks.siblings", values)


if __name__ == "__main__":
    main()

"""The worked example of the README, run for real -> benchmarks/results/example.json and docs/images/digits.png.

Every command is run as a user types it, in an empty folder; what it prints goes into the README word for word. About
5 minutes on 2 cores, most of them tuning.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.common import RESULTS, ROOT, write_result
from benchmarks.tables import EXAMPLE

PICTURE = ROOT / "docs/images/digits.png"


def printed(command: str, folder: Path) -> str:
    """Standard output of one command; it must succeed."""
    words = [sys.executable, "-m", "mmd_export.cli", *command.split()[1:]]
    done = subprocess.run(words, cwd=folder, stdout=subprocess.PIPE, text=True, check=True)
    return "\n".join(line.rstrip() for line in done.stdout.strip().splitlines())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS / "example.json")
    arguments = parser.parse_args()
    from mmd_export.commands.demo import COUNT, distance_to_real, draw_kinds, draw_picture

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        lines = [{"command": command, "printed": printed(command, folder)} for command in EXAMPLE]
        kinds = draw_kinds(folder / "digits-5.bundle")
        distances = {name: distance_to_real(images) for name, images in kinds.items() if len(images) == COUNT}
        PICTURE.parent.mkdir(parents=True, exist_ok=True)
        draw_picture(kinds, distances, PICTURE)
    distances.pop("real scans")
    write_result(arguments.out, "benchmarks/example.py", {"commands": lines, "held_out_distances": distances})


if __name__ == "__main__":
    main()

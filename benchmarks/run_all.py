"""Every benchmark that needs no GPU, one after the other; about 25 minutes on 2 quiet cores."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPTS = ("benchmarks.artefacts", "benchmarks.digits_quality", "benchmarks.tables")


def main() -> None:
    for script in SCRIPTS:
        print(f"== {script}", flush=True)
        subprocess.run([sys.executable, "-m", script], cwd=Path(__file__).parents[1], check=True)


if __name__ == "__main__":
    main()

"""Draw images from the bundle beside this file, or prove that it computes here what it computed where it was made."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from mmd_export.errors import MmdExportError
from mmd_export.pictures import save_grid
from mmd_runtime.app import open_bundle

BUNDLE = Path(__file__).parent / "bundle"


def main(arguments: list[str] | None = None) -> int:
    """Exit codes: 0 done, 4 self-test failed, 5 bundle damaged, and the others of mmd-export."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path, default=BUNDLE, help="a bundle folder (default: bundle/)")
    parser.add_argument("--seed", type=int, default=0, help="image i of a seed is the same everywhere")
    parser.add_argument("--count", type=int, default=16, help="how many images")
    parser.add_argument("--class-label", type=int, help="what a model with classes is to draw")
    parser.add_argument("--out", type=Path, default=Path("sample.png"), help="PNG file to write")
    parser.add_argument("--self-test", action="store_true", help="run the golden noise and compare")
    options = parser.parse_args(arguments)
    if options.count < 1:
        parser.error(f"--count is {options.count}; it must be at least 1")
    try:
        sampler = open_bundle(options.bundle)
        if options.self_test:
            report = sampler.self_test()
            print(report)
            return 0 if report.passed else 4
        label = options.class_label
        told = {} if label is None else {"class_labels": np.full(options.count, label, np.int64)}
        save_grid(sampler.sample(options.seed, options.count, conditions=told), options.out)
    except MmdExportError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{options.out}: {options.count} images of seed {options.seed}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Checks of the project as a whole, for ``make lint`` and the tests: what the wheel holds, what an import costs.

Each check returns the problems that it found, one line each; an empty list is a pass.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import tomllib
import zipfile
from collections.abc import Sequence
from pathlib import Path

from mmd_export.kit_project import source_files

ROOT = Path(__file__).parents[2]
PACKAGES = ("mmd_export", "finetune/mmd_finetune", "runtimes/python/mmd_runtime")
SHIPPED = (
    "mmd_export/models/digits/unet/diffusion_pytorch_model.safetensors",
    "mmd_export/models/digits/README.md",
    "mmd_export/models/digits/unet/config.json",
    "mmd_export/models/digits/scheduler/scheduler_config.json",
    "mmd_finetune/encoders/digits-conv.safetensors",
    "mmd_finetune/encoders/digits-mlp.safetensors",
    "mmd_finetune/encoders/digits-residual.safetensors",
    "mmd_finetune/encoders/random-conv.safetensors",
    "mmd_export/report/report.html.j2",
    "mmd_export/py.typed",
    "mmd_export/kits/files/LICENSE",
    "mmd_export/kits/files/cpp/mmd_bundle.cpp",
    "mmd_export/kits/files/python-kit/app.py",
    "mmd_finetune/py.typed",
    "mmd_runtime/py.typed",
)
ENTRY_POINT = "mmd-export = mmd_export.cli:main"
BARE_FOLDERS = ("finetune", "runtimes", "runtimes/python")

HELP = "import sys; from mmd_export.cli import main; sys.argv = ['mmd-export', '--help']; main()"
# What any command line of typer needs before it can print its help; ours may take so many times as long.
TYPER = "import typer.rich_utils, typer.testing"
HELP_TIMES = 4.0
HELP_RUNS = 5
HEAVY = ("coremltools", "diffusers", "matplotlib", "onnx", "onnxruntime", "onnxscript", "scipy", "sklearn", "torch")

STANDARD_LIBRARY_ONLY = (
    "mmd_export.errors",
    "mmd_export.plan",
    "mmd_export.plan_options",
    "mmd_export.schedule",
    "mmd_export.solvers",
)


def build_wheel(folder: Path) -> Path:
    """Source archive of the tree -> wheel of the archive, both left in ``folder``; needs no network."""
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"python -m build failed:\n{done.stdout}{done.stderr}")
    (wheel,) = folder.glob("*.whl")
    return wheel


def kit_files(root: Path = ROOT) -> set[str]:
    """Every source of the embed kits in the tree, under its name in the wheel: what ``force-include`` names."""
    build = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]["build"]
    named = [(root / source, place) for source, place in build["targets"]["wheel"]["force-include"].items()]
    files = {place for source, place in named if source.is_file()}
    return files | {f"{place}/{file}" for source, place in named if source.is_dir() for file in source_files(source)}


def packaged_files(root: Path = ROOT) -> set[str]:
    """Every file of the three packages in the tree, under its name in the wheel, and the sources of the kits."""
    return kit_files(root) | {
        file.relative_to((root / package).parent).as_posix()
        for package in PACKAGES
        for file in (root / package).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }


def check_wheel(wheel: Path, expected: set[str]) -> list[str]:
    """Only ``mmd_*`` beside the metadata, nothing of the packages missing or added, and the console script."""
    with zipfile.ZipFile(wheel) as archive:
        metadata = {name for name in archive.namelist() if name.split("/")[0].endswith(".dist-info")}
        files = set(archive.namelist()) - metadata
        entry_points = "".join(archive.read(name).decode() for name in metadata if name.endswith("entry_points.txt"))
    strangers = sorted({name.split("/")[0] for name in files if not name.startswith("mmd_")})
    missing = sorted((expected | set(SHIPPED)) - files)
    added = sorted(files - expected)
    return [
        *(f"{wheel.name}: top-level name {name!r}; only mmd_* may be there" for name in strangers),
        *(f"{wheel.name}: {name} is missing" for name in missing),
        *(f"{wheel.name}: {name} is not in the tree" for name in added),
        *([] if ENTRY_POINT in entry_points else [f"{wheel.name}: no console script {ENTRY_POINT!r}"]),
    ]


def check_bare_folders(root: Path = ROOT) -> list[str]:
    """``finetune`` and ``runtimes`` are taken as import names, so neither folder is a package."""
    inits = [f"{folder}/__init__.py" for folder in BARE_FOLDERS]
    return [f"{init}: must not exist, the folder is no package" for init in inits if (root / init).exists()]


def run_python(code: str, *options: str, extra_path: Sequence[Path] = ()) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in a fresh interpreter with the three packages importable."""
    folders = [*extra_path, *((ROOT / package).parent for package in PACKAGES)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders))}
    command = [sys.executable, *options, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def check_light(code: str, *, extra_path: Sequence[Path] = ()) -> list[str]:
    """``code`` ends well and loads none of the ``HEAVY`` packages."""
    report = f"import atexit; atexit.register(lambda: print('LOADED', *sorted(set(sys.modules) & set({HEAVY!r}))))"
    done = run_python(f"import sys; {report}; {code}", extra_path=extra_path)
    if done.returncode:
        return [f"{code}: exit code {done.returncode}: {(done.stderr.strip() or 'no message').splitlines()[-1]}"]
    loaded = done.stdout.splitlines()[-1].split()[1:]
    return [f"{code}: loads {name}; import it inside the function that needs it" for name in loaded]


def times_as_long(code: str, other: str, runs: int = HELP_RUNS) -> float:
    """How many times as long as ``other`` the ``code`` takes, each in fresh processes, in turn.

    A ratio of the fastest of ``runs`` each: a slow machine slows both, and a busy one only ever adds.
    """

    def seconds(code: str) -> float:
        start = time.perf_counter()
        run_python(code)
        return time.perf_counter() - start

    pairs = [(seconds(code), seconds(other)) for _ in range(runs)]
    return min(mine for mine, _ in pairs) / min(bare for _, bare in pairs)


def check_help() -> list[str]:
    """``mmd-export --help`` works, loads nothing heavy and answers at once."""
    problems = check_light(HELP)
    if problems:
        return problems
    times = times_as_long(HELP, TYPER)
    return [] if times < HELP_TIMES else [f"mmd-export --help: {times:.1f} times bare typer, the limit is {HELP_TIMES}"]


def check_standard_library_only(modules: Sequence[str] = STANDARD_LIBRARY_ONLY, folder: Path = ROOT) -> list[str]:
    """Each module is importable without any installed package."""
    problems = []
    for module in modules:
        done = run_python(f"import sys; sys.path.append({str(folder)!r}); import {module}", "-I", "-S")
        if done.returncode:
            problems.append(f"{module}: needs more than the standard library: {done.stderr.strip().splitlines()[-1]}")
    return problems


def main() -> int:
    """Run all checks, print a line for each, and return the exit code."""
    with tempfile.TemporaryDirectory() as folder:
        results = {
            "the wheel contains only mmd_*, with all package data": check_wheel(
                build_wheel(Path(folder)), packaged_files()
            ),
            "finetune/ and runtimes/ are no packages": check_bare_folders(),
            "plans need the standard library only": check_standard_library_only(),
            "mmd-export --help is light and answers at once": check_help(),
        }
    for name, problems in results.items():
        print(f"{'FAILED' if problems else 'ok':7}{name}", *problems, sep="\n       ")
    return int(any(results.values()))


if __name__ == "__main__":
    sys.exit(main())

"""Hugging Face's optimum itself against our one graph, batch 1, CPU -> benchmarks/results/optimum.json.

Pipelines of random weights in Stable Diffusion's layout, without guidance. optimum's own exporter and pipeline run in
an environment of their own, that of requirements-optimum.txt, and there, in the same process and interleaved, runs the
bundle that ``build --decode`` made of the same folder: the same onnxruntime, its default threads on both sides, the
same noise and text states. The text encoder is outside of what is timed. What is timed:

- ``optimum's pipeline``: the call as its documentation has it, with prompt_embeds, latents and numpy images;
- ``optimum's sessions without the pipeline``: its UNet K times and its decoder once, on fixed inputs, no scheduler;
- the same sessions and the one graph on one thread, in processor time: the work alone, also with the free dimensions of
  optimum's graphs fixed by onnxruntime;
- a fresh process until one side is ready: interpreter, imports, every file loaded; of the bundle, every byte hashed.

Packages: what pip installs to run either side, by the metadata of what is installed here. About 8 minutes;
``--folder`` keeps the environment, pipelines and bundles, so that a second run only measures; ``--work`` measures the
processor time alone, which needs no quiet machine, and puts it into the file that is there.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from benchmarks.common import RESULTS, ROOT, write_result
from benchmarks.optimum_worker import GRAPH, MODELS, PIPELINE, STEPS
from mmd_export.build import BuildOptions, build
from mmd_export.latency import measure

REQUIREMENTS = ROOT / "benchmarks" / "requirements-optimum.txt"
ROOTS = {PIPELINE: ("optimum-onnx[onnxruntime]", "diffusers"), GRAPH: ("mmd-export[runtime]",)}
USED = ("unet/model.onnx", "vae_decoder/model.onnx")  # of what optimum ships, by the call that is timed
OWN_SOURCES = ("mmd_export", "finetune/mmd_finetune", "runtimes/python/mmd_runtime")  # an editable install lists none


def make_venv(folder: Path) -> Path:
    """The environment of optimum, made if it is not there; its Python."""
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "-qq", "install", "-r", str(REQUIREMENTS)], check=True)
    return python


def worker(python: Path, *arguments: str) -> dict[str, Any] | int:
    """What the worker printed last."""
    done = subprocess.run(_command(python, *arguments), check=True, stdout=subprocess.PIPE, env=_variables())
    found: dict[str, Any] | int = json.loads(done.stdout.splitlines()[-1])
    return found


def _command(python: Path, *arguments: str) -> list[str]:
    return [str(python), "-W", "ignore", "-m", "benchmarks.optimum_worker", *arguments]


def _variables() -> dict[str, str]:
    """This repository's code beside the installed one, compiled once as that is; nothing is looked up on the hub."""
    paths = os.pathsep.join((str(ROOT), str(ROOT / "runtimes" / "python")))
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return {**kept, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}


def prepared(python: Path, name: str, folder: Path) -> dict[str, Any]:
    """The model, optimum's export of it and our bundle, in ``folder``; made if they are not there."""
    kept = folder / "made.json"
    if not kept.exists():
        parameters = worker(python, "save", name, str(folder / "model"))
        exporter = [str(python.with_name("optimum-cli")), "export", "onnx", "--task", "text-to-image"]
        subprocess.run([*exporter, "--model", str(folder / "model"), str(folder / "optimum")], check=True)
        bundle = build(BuildOptions(str(folder / "model"), "onnx", folder / "bundle", steps=STEPS, decode=True), print)
        kept.write_text(json.dumps({"parameters": parameters, "parity": bundle.manifest.parity}), encoding="utf-8")
    made: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
    return made


def sides(folder: Path) -> dict[str, Path]:
    """What each side ships."""
    return {PIPELINE: folder / "optimum", GRAPH: folder / "bundle"}


def shipped(folder: Path) -> dict[str, Any]:
    """Files and bytes of each side."""
    sizes = {
        name: {file.relative_to(place).as_posix(): file.stat().st_size for file in place.rglob("*") if file.is_file()}
        for name, place in sides(folder).items()
    }
    used = {PIPELINE: USED, GRAPH: ("model.onnx",)}
    return {
        name: {
            "files": len(files),
            "bytes": sum(files.values()),
            "bytes_of_the_timed_call": sum(files[file] for file in used[name]),
        }
        for name, files in sizes.items()
    }


def loading(python: Path, folder: Path, rounds: int) -> dict[str, Any]:
    """Fresh processes of both sides, interleaved: seconds until ready as a ratio, sessions and memory."""
    facts: dict[str, Any] = {}

    def fresh(name: str) -> None:
        """A process that is ended when it says that it is ready."""
        command = _command(python, "open", name, str(sides(folder)[name]))
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=_variables()) as process:
            assert process.stdout is not None
            facts[name] = json.loads(process.stdout.readline())
            process.kill()

    report = measure({name: partial(fresh, name) for name in sides(folder)}, rounds, warmup=1)
    return {"loading": vars(report.ratio(PIPELINE, GRAPH)), "opened": facts}


def required(roots: Sequence[str], site: Sequence[str]) -> dict[str, metadata.Distribution]:
    """The distributions that pip installs for ``roots``, among those installed in ``site``; by their names."""
    installed = {_normal(found.metadata["Name"]): found for found in metadata.distributions(path=list(site))}
    wanted, known = [Requirement(root) for root in roots], dict[str, metadata.Distribution]()
    seen: set[tuple[str, str]] = set()
    while wanted:
        requirement = wanted.pop()
        name = _normal(requirement.name)
        for extra in ("", *sorted(requirement.extras)):
            if (name, extra) not in seen:
                seen.add((name, extra))
                known[name] = installed[name]
                wanted += _needs(installed[name], extra)
    return dict(sorted(known.items()))


def _needs(found: metadata.Distribution, extra: str) -> Iterator[Requirement]:
    """What it requires on this machine, with that extra or without any."""
    for line in found.requires or ():
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
            yield requirement


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def packages(roots: Sequence[str], site: Sequence[str]) -> dict[str, Any]:
    """Versions and bytes of what must be installed."""
    found = required(roots, site)
    files = [Path(str(one.locate_file(file))) for one in found.values() for file in one.files or ()]
    if "mmd-export" in found:
        files += [file for folder in OWN_SOURCES for file in (ROOT / folder).rglob("*.py")]
    size = sum(file.stat().st_size for file in files if file.suffix != ".pyc" and file.is_file())
    return {
        "roots": list(roots),
        "count": len(found),
        "bytes": size,
        "versions": {name: one.version for name, one in found.items()},
    }


def measure_work(python: Path, folder: Path, rounds: int) -> dict[str, Any]:
    both = (str(folder / "optimum"), str(folder / "bundle"))
    return {"processor_time": worker(python, "work", *both, "--rounds", str(rounds // 2))}


def measure_model(python: Path, name: str, folder: Path, rounds: int, loads: int) -> dict[str, Any]:
    timed = worker(python, "measure", str(folder / "optimum"), str(folder / "bundle"), "--rounds", str(rounds))
    assert isinstance(timed, dict)
    result = prepared(python, name, folder) | timed | measure_work(python, folder, rounds)
    result |= loading(python, folder, loads) | {"shipped": shipped(folder)}
    print(name, result, flush=True)
    return result


def renew_work(out: Path, python: Path, folders: dict[str, Path], rounds: int) -> None:
    """The processor times of a result file, measured anew; the rest of it stays."""
    result = json.loads(out.read_text(encoding="utf-8"))
    for name, folder in folders.items():
        result["models"][name] |= measure_work(python, folder, rounds)
        print(name, result["models"][name]["processor_time"], flush=True)
    out.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--loads", type=int, default=7, help="fresh processes of each side")
    parser.add_argument("--venv", type=Path, help="environment of optimum; made if it is not there")
    parser.add_argument("--folder", type=Path, help="folder for all that is made, used again if it is there")
    parser.add_argument("--prepare", action="store_true", help="make everything in --folder, measure nothing")
    parser.add_argument("--work", action="store_true", help="measure the processor time alone")
    parser.add_argument("--out", type=Path, default=RESULTS / "optimum.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        python = make_venv(options.venv or folder / "venv")
        folders = {name: folder / name.split(",")[0].replace(" ", "-") for name in MODELS}
        for name, place in folders.items():
            prepared(python, name, place)
        if options.prepare:
            return
        if options.work:
            renew_work(options.out, python, folders, options.rounds)
            return
        models = {
            name: measure_model(python, name, place, options.rounds, options.loads) for name, place in folders.items()
        }
        (site,) = (python.parents[1] / "lib").glob("python*/site-packages")
        values = {
            "steps": STEPS, "batch": 1, "guidance_scale": 1.0, "models": models,
            "packages": {
                PIPELINE: packages(ROOTS[PIPELINE], [str(site)]), GRAPH: packages(ROOTS[GRAPH], sys.path),
            },
        }  # fmt: skip
    write_result(options.out, "benchmarks/optimum_pipeline.py", values)


if __name__ == "__main__":
    main()

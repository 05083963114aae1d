"""What the pages start with, made once a session, and a folder for each page."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.code_blocks import blocks_of
from mmd_export.cli import app, run
from tests.docs.page_runner import PageRun, Supply, copied, quick
from tests.kits.cpp_builds import HEADERS, package
from tests.project.checks import ROOT

Reader = Callable[[str], PageRun]


@pytest.fixture(scope="session")
def supplies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Supply]:
    """Name in a page -> what makes it: bundles of the untuned digits, a run folder, files of the repository."""
    shared = tmp_path_factory.mktemp("shared")

    def made(name: str, *arguments: str) -> Supply:
        def supply(place: Path) -> None:
            if not (shared / name).exists():
                code = run(app, [*quick(list(arguments), shared), "--out", str(shared / name)])
                assert code == 0, f"{' '.join(arguments)}: exit {code}"
            copied(shared / name)(place)

        return supply

    build = ("build", "digits", "--steps", "5", "--target", "onnx")
    bundle = made("digits-5.bundle", *build)
    return {
        **dict.fromkeys(("digits-5.bundle", "old.bundle", "new.bundle", "other.bundle"), bundle),
        "digits-batches.bundle": made(
            "batches", "build", "digits", "--steps", "5", "--target", "onnx", "--batch", "1,4,8"
        ),
        "runs/digits-5": made("run", "finetune", "digits", "--steps", "5"),
        "manifest.schema.json": copied(ROOT / "docs/manifest.schema.json"),
        "docs/examples": copied(ROOT / "docs/examples"),
        "onnxruntime": onnxruntime_release,
    }


def onnxruntime_release(place: Path) -> None:
    """A folder like an unpacked release of ONNX Runtime: the headers that .ci/kits got, the library of the package."""
    (place / "lib").mkdir(parents=True)
    (place / "include").symlink_to(next(HEADERS.rglob("onnxruntime_c_api.h")).parent)
    (library,) = package("onnxruntime").glob("capi/libonnxruntime.so.*.*")
    for name in ("libonnxruntime.so", library.name, "libonnxruntime.so.1"):
        (place / "lib" / name).unlink(missing_ok=True)
        (place / "lib" / name).symlink_to(library)


@pytest.fixture
def read(supplies: dict[str, Supply], tmp_path: Path) -> Reader:
    """Run all code of a page that runs, in order, in an empty folder."""

    def reader(page: str) -> PageRun:
        state = PageRun(tmp_path, supplies)
        for block in blocks_of(page):
            if block.runs:
                state.run(block)
        return state

    return reader

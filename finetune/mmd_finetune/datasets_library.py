"""Images of Hugging Face datasets: what ``save_to_disk`` wrote, a folder of parquet files, or a hub id."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmd_export.errors import NotAvailableError, UsageError, one_line
from mmd_finetune.encoder_source import Source
from mmd_finetune.pictures import SUFFIXES, Fit, files_under, stacked

LOG = logging.getLogger(__name__)
HUB = "hf:"
PARQUET = ".parquet"
SAVED = ("dataset_dict.json", "state.json")  # of save_to_disk, with several splits and with one
LOADING = ("name", "revision")  # the words of datasets.load_dataset
OPTIONS = ("split", "column", *LOADING)
USUAL_SPLIT = "train"


def is_dataset_folder(folder: Path) -> bool:
    """Written by ``save_to_disk``, or with parquet files and no picture; a warning tells of parquet beside pictures."""
    if any((folder / name).is_file() for name in SAVED):
        return True
    suffixes = {path.suffix.lower() for path in files_under(folder)}
    if PARQUET not in suffixes:
        return False
    pictures = not suffixes.isdisjoint(SUFFIXES)
    if pictures:
        LOG.warning("--data %s: its pictures are read; for its parquet files say --data %s%s", folder, HUB, folder)
    return not pictures


def read_dataset(spec: str, fit: Fit) -> NDArray[np.uint8]:
    """All pictures of ``hf:ID_OR_FOLDER?split=NAME&column=NAME``, (N, H, W, C).

    ``name=`` is the configuration of a data set that has several, ``revision=`` a branch, tag or commit of the hub.
    """
    source = Source.parse(spec)
    for key, value in source.options.items():
        if key not in OPTIONS:
            raise UsageError(f"--data {spec}: option {key}={value} is unknown; known: {', '.join(OPTIONS)}")
    table = _one_split(_load(source, spec), source.options.get("split"), spec)
    column = _column(table, source.options.get("column"), spec)
    if not len(table):
        raise UsageError(f"--data {spec}: the split has no rows")
    return stacked(_pictures(table, column, fit, spec), len(table), spec)


def _load(source: Source, spec: str) -> Any:
    """A Dataset or a DatasetDict."""
    try:
        import datasets
    except ImportError as error:
        raise NotAvailableError(
            f"--data {spec}: datasets is not installed; pip install 'mmd-export[finetune]'"
        ) from error
    folder = Path(source.place)
    if not folder.is_dir() and (folder.exists() or not source.is_hub_id):
        found = "is a file" if folder.exists() else "does not exist"
        raise UsageError(f"--data {spec}: {source.place} {found}; a folder, or a hub id owner/name, is expected")
    chosen = {key: source.options[key] for key in LOADING if key in source.options}
    saved = any((folder / name).is_file() for name in SAVED)
    if folder.is_dir() and (vain := [key for key in chosen if saved or key == "revision"]):
        what = "what save_to_disk wrote" if saved else "a folder"
        raise UsageError(f"--data {spec}: {vain[0]}={chosen[vain[0]]} is asked for, {what} has none; leave it out")
    try:
        datasets.disable_progress_bars()
        return datasets.load_from_disk(source.place) if saved else datasets.load_dataset(source.place, **chosen)
    except Exception as error:  # arrow, file and hub errors of many types; each becomes one line
        kind = UsageError if folder.is_dir() else NotAvailableError
        raise kind(f"--data {spec}: datasets cannot load it: {one_line(error)}") from error


def _one_split(loaded: Any, wanted: str | None, spec: str) -> Any:
    """The split that the user names, else ``train``, else the only one."""
    if not isinstance(loaded, dict):
        if wanted is not None:
            raise UsageError(f"--data {spec}: split={wanted} is asked for, the folder holds one split without a name")
        return loaded
    names = ", ".join(loaded)
    if wanted is None and USUAL_SPLIT not in loaded and len(loaded) != 1:
        raise UsageError(f"--data {spec}: splits are {names}; say ?split=NAME")
    name = wanted or (USUAL_SPLIT if USUAL_SPLIT in loaded else names)
    if name not in loaded:
        raise UsageError(f"--data {spec}: split {name} does not exist; splits: {names}")
    return loaded[name]


def _column(table: Any, wanted: str | None, spec: str) -> str:
    """The column that the user names, else the only one of images."""
    import datasets

    found = [name for name, feature in table.features.items() if isinstance(feature, datasets.Image)]
    if wanted is not None and wanted not in found:
        raise UsageError(f"--data {spec}: column {wanted} holds no images; these do: {', '.join(found) or 'none'}")
    if wanted is None and len(found) != 1:
        raise UsageError(f"--data {spec}: columns of images are {', '.join(found) or 'none'}; say ?column=NAME")
    return wanted or found[0]


def _pictures(table: Any, column: str, fit: Fit, spec: str) -> Iterator[tuple[str, NDArray[np.uint8]]]:
    rows = table.select_columns([column])
    for row in range(len(rows)):
        try:
            picture = rows[row][column]
        except (OSError, ValueError, SyntaxError) as error:
            raise UsageError(f"--data {spec}: the image of row {row} cannot be read: {one_line(error)}") from error
        if picture is None:
            raise UsageError(f"--data {spec}: row {row} has no image")
        yield f"row {row}", fit.picture(picture, f"{spec}, row {row}")

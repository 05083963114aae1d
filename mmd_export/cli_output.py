"""What the commands print: results and tables on stdout, progress on stderr, JSON where ``--json`` says."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmd_export.folders import write_text
from mmd_export.journal import JOURNAL

if TYPE_CHECKING:
    from mmd_export.bundle import Bundle


def short(value: Any) -> str:
    """One cell; shapes and dtypes of tensor specs in the short form."""
    if isinstance(value, list):
        return "; ".join(short(inner) for inner in value)
    if isinstance(value, dict) and set(value) == {"name", "dtype", "shape"}:
        return f"{value['name']} {value['dtype']} ({', '.join(map(str, value['shape']))})"
    if isinstance(value, dict):
        return ", ".join(f"{key} {short(inner)}" for key, inner in value.items() if inner is not None)
    return str(value)


def show(text: str) -> None:
    """A result, on stdout."""
    sys.stdout.write(text + "\n")


def say(text: str) -> None:
    """Progress, on stderr."""
    JOURNAL.note(said=text)
    sys.stderr.write(f"mmd-export: {text}\n")
    sys.stderr.flush()


@contextmanager
def counted() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on stderr, one line for each kind of work; it appears with the first, so not before an error."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True))
    tasks: dict[str, TaskID] = {}

    def observe(what: str, done: int, of: int) -> None:
        bar.start()
        if what not in tasks:
            tasks[what] = bar.add_task(what)
        bar.update(tasks[what], completed=done, total=of)

    try:
        yield observe
    finally:
        if bar.live.is_started:  # stopping one that never was prints an empty line
            bar.stop()


def built(out: Path, bundle: Bundle) -> str:
    """A new bundle in one line: size, nodes, error."""
    manifest = bundle.manifest
    parity = "parity not measured" if manifest.parity is None else f"worst error {max(manifest.parity.values()):.0e}"
    after = "" if manifest.deferred is None else f"\nnext, where it will run: mmd-export finalize {out}"
    return (
        f"{out}: {manifest.artefact} {bundle.artefact_bytes / 1e6:.2f} MB, {manifest.graph.nodes:,} nodes, {parity} "
        f"(tolerance {manifest.tolerance.atol:g}){after}"
    )


def show_table(title: str, heads: tuple[str, ...], rows: Any, json: Path | None = None) -> None:
    """A plain table on stdout, unless JSON goes there; wide enough for its text when the output is no terminal."""
    if json == Path("-"):
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_header=any(heads))
    for head in heads:
        table.add_column(head, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console = Console(file=sys.stdout)
    console = console if console.is_terminal else Console(file=sys.stdout, width=160)
    console.print(Text(title, style="italic"), table, sep="")  # a title of the table would wrap at its width


def write_json(path: Path | None, value: dict[str, Any]) -> None:
    """Write ``value`` to ``path``, - for stdout, None for nowhere."""
    if path is None:
        return
    if path == Path("-"):
        sys.stdout.write(as_json(value))
        return
    write_text(path, as_json(value), "--json")


def as_json(value: dict[str, Any]) -> str:
    """The text of a JSON file."""
    import json

    return json.dumps(value, indent=1, sort_keys=True) + "\n"

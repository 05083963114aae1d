"""A build that is stopped leaves nothing: refused, failed, interrupted, killed, or out of disk."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from unittest import mock

import pytest

from mmd_export import folders, journal
from mmd_export.bundle import (
    Bundle,
    require_free,
    write_bundle,
)
from mmd_export.errors import MmdExportError, UsageError
from mmd_export.journal import Journal, Notes
from tests.export.bundles import CARD, ROOT, contents, draft, golden, left_beside, make


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "digits-2"


def test_an_existing_folder_is_refused_before_any_work(out: Path) -> None:
    out.mkdir()

    def never(folder: Path) -> None:
        raise AssertionError("the artefact was built for nothing")

    with pytest.raises(UsageError, match="already exists; choose another --out or pass --overwrite"):
        write_bundle(out, draft(), never, golden(), CARD)
    with pytest.raises(UsageError, match="already exists"):
        require_free(out)
    require_free(out.with_name("free"))


def test_overwrite_replaces_a_bundle_and_nothing_else(out: Path, tmp_path: Path) -> None:
    make(out)
    changed = make(out, draft=draft(target="other"), overwrite=True)
    assert Bundle.open(out) == changed
    assert left_beside(out) == []
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").write_text("years of work")
    (tmp_path / "link").symlink_to(out)
    for place in (tmp_path / "thesis", tmp_path / "thesis" / "chapter", tmp_path / "link", Path("/")):
        with pytest.raises(UsageError, match=r"is not a bundle|cannot be a bundle"):
            make(place, overwrite=True)
    assert (tmp_path / "thesis" / "chapter").read_text() == "years of work"


@pytest.mark.parametrize("atomic", [True, False])
def test_overwrite_keeps_the_old_bundle_when_the_new_one_fails(
    out: Path, atomic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not atomic:
        monkeypatch.setattr(folders, "_exchange", lambda *_: False)
    make(out)
    before = contents(out)

    def broken(folder: Path) -> None:
        (folder / "model.onnx").write_bytes(b"half")
        assert contents(out) == before
        raise RuntimeError("converter failed")

    with pytest.raises(RuntimeError):
        write_bundle(out, draft(), broken, golden(), CARD, overwrite=True)
    assert contents(out) == before
    make(out, draft=draft(target="other"), overwrite=True)
    assert Bundle.open(out).manifest.target == "other"
    assert left_beside(out) == []


def test_a_replacement_killed_between_two_renames_is_undone(out: Path) -> None:
    make(out)
    before = contents(out)
    finished = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    out.rename(out.with_name(f".{out.name}.retired-{int(finished.stdout)}"))
    with pytest.raises(UsageError, match="already exists"):
        make(out)
    assert contents(out) == before


def test_ctrl_c_leaves_nothing(out: Path) -> None:
    def interrupted(folder: Path) -> None:
        (folder / "model.onnx").write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_bundle(out, draft(), interrupted, golden(), CARD)
    assert list(out.parent.iterdir()) == []


def test_an_artefact_that_was_not_written_is_an_error(out: Path) -> None:
    with pytest.raises(MmdExportError, match=r"the onnx target wrote no model.onnx"):
        write_bundle(out, draft(), lambda _: None, golden(), CARD)
    assert list(out.parent.iterdir()) == []


def test_a_full_disk_is_one_line_and_leaves_nothing(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(folder: Path) -> None:
        (folder / "model.onnx").write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder / "model.onnx"))

    with pytest.raises(MmdExportError) as error:
        write_bundle(out, draft(), full, golden(), CARD)
    assert str(out / "model.onnx") in str(error.value)
    assert "No space left on device" in str(error.value)
    assert "partial" not in str(error.value)
    assert "\n" not in str(error.value)
    assert list(out.parent.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UsageError, match=r"cannot be made: .*file is no folder; choose another --out"):
        require_free(tmp_path / "file" / "below" / "digits-2")
    require_free(tmp_path / "new" / "digits-2")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="no /proc, in which even root can make nothing")
def test_a_place_where_nothing_can_be_made(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--out /proc/x\.bundle cannot be written: /proc: .*; choose another --out"):
        require_free(Path("/proc/x.bundle"))


# The handler that Ctrl-C finds at a terminal; what is started in the background inherits an ignored SIGINT.
CHILD = """
import resource, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from pathlib import Path
sys.path.insert(0, {root!r})
import tests.export.bundles as t
from mmd_export.bundle import write_bundle
from mmd_export.errors import MmdExportError
def slow(folder):
    (folder / "model.onnx").write_bytes(b"half"); print("started", flush=True); time.sleep(60)
def big(folder):
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    (folder / "model.onnx").write_bytes(bytes(2000))
try:
    write_bundle(Path(sys.argv[1]), t.draft(), {writer}, t.golden(), t.CARD)
except MmdExportError as error:
    print(error); sys.exit(error.exit_code)
"""


def child(out: Path, writer: str) -> subprocess.Popen[str]:
    code = CHILD.format(root=str(ROOT), writer=writer)
    return subprocess.Popen([sys.executable, "-c", code, str(out)], stdout=subprocess.PIPE, text=True)


def test_kill_9_leaves_no_bundle_and_the_next_build_works(out: Path) -> None:
    with child(out, "slow") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        assert left_beside(out) == [f".digits-2.partial-{process.pid}"]
        with pytest.raises(UsageError):
            Bundle.open(out)
        make(out)  # a live build of another process is left alone
        assert left_beside(out) == [f".digits-2.partial-{process.pid}"]
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    make(out, overwrite=True)
    assert Bundle.open(out).name == "digits-2"
    assert left_beside(out) == []


def test_ctrl_c_in_a_real_process_leaves_nothing(out: Path) -> None:
    with child(out, "slow") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        process.send_signal(signal.SIGINT)
    assert process.returncode != 0
    assert list(out.parent.iterdir()) == []


def test_a_file_size_limit_is_one_line_and_leaves_nothing(out: Path) -> None:
    with child(out, "big") as process:
        assert process.stdout is not None
        text = process.stdout.read()
    assert process.returncode == 1
    assert text.startswith(f"cannot write {out}")
    assert "File too large" in text
    assert text.count("\n") == 1
    assert list(out.parent.iterdir()) == []


def test_a_file_is_noted_until_it_is_in_place(tmp_path: Path) -> None:
    """So that whoever waits for the command can clear it away after a crash."""
    place = tmp_path / "new" / "a.json"
    with tempfile.TemporaryFile() as notes:
        with mock.patch.object(journal, "JOURNAL", Journal(notes.fileno())):
            with folders.staged_file(place) as partial:
                partial.write_text("half")
                assert Notes.read(notes.fileno()).left == (partial,)
                assert not place.exists()
            with suppress(ValueError), folders.staged_file(place) as other:
                other.write_text("worse")
                raise ValueError
        assert Notes.read(notes.fileno()).left == ()
    assert place.read_text() == "half"
    assert list(place.parent.iterdir()) == [place]

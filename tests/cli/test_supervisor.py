"""Commands that end as no ``except`` can see: real processes, real signals, both ways of starting the child."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from typer.main import get_group

from mmd_export.cli import app, run
from mmd_export.errors import BundleError
from mmd_export.supervisor import COMMANDS
from tests.project.checks import PACKAGES, ROOT

if os.name != "posix":
    pytest.skip("Windows runs every command in one process", allow_module_level=True)

WAYS = ["fork", "spawn"]  # Linux, macOS; both work on Linux
# SUPERVISE, WAY, COMMAND, BODY: what main() does, with a body instead of the command.
SUPERVISED = """
import ctypes, fcntl, os, signal, sys, termios, time
from pathlib import Path
from mmd_export import supervisor
from mmd_export.journal import JOURNAL, temporary
supervisor.FORKS = sys.argv[1] == "fork"
code = supervisor.supervise(sys.argv[2:])
if code is None:
    code = 1
    try:
        code = 0
        exec(sys.argv[3])
    finally:
        JOURNAL.end(code)
sys.exit(code)
"""
# At a terminal signals find the default; what is started in the background inherits an ignored SIGINT, under nohup an
# ignored SIGHUP.
FRESH = """
import os, signal, sys
for number in (signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_DFL)
os.execvp(sys.argv[1], sys.argv[1:])
"""
COUNTS = """
seen = []
signal.signal(signal.SIGINT, lambda *_: seen.append(1))
print("ready", sys.stderr.isatty(), flush=True)
time.sleep(1.0)
time.sleep(0.5)
print("seen", len(seen), flush=True)
"""


def environment(**more: str) -> dict[str, str]:
    told = {name: value for name, value in os.environ.items() if name not in ("LOCAL_RANK", "PYTHONFAULTHANDLER")}
    path = os.pathsep.join(str((ROOT / package).parent) for package in PACKAGES)
    return {**told, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **more}


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("script") / "supervised.py"
    file.write_text(SUPERVISED)
    return file


@pytest.fixture(scope="module")
def at_a_terminal(script: Path) -> Path:
    """The same, after it has taken the terminal on its stderr."""
    takes = "if os.getpid() == os.getsid(0):\n    fcntl.ioctl(2, termios.TIOCSCTTY, 0)\n"
    file = script.with_name("at_a_terminal.py")
    file.write_text(SUPERVISED.replace("code = supervisor", f"{takes}code = supervisor"))
    return file


@contextmanager
def started(command: list[object], before: tuple[str, ...] = (), **more: Any) -> Iterator[subprocess.Popen[str]]:
    words = [sys.executable, "-c", FRESH, *before, sys.executable, *map(str, command)]
    pipe = subprocess.PIPE
    options = {"stdout": pipe, "stderr": pipe, "text": True, "env": environment(), **more}
    with subprocess.Popen(words, **options) as process:
        try:
            yield process
        finally:
            process.kill()


def told(process: subprocess.Popen[str], number: signal.Signals, ready: str) -> tuple[int, str]:
    """Exit code and the rest of stdout of a process that gets a signal once it has said ``ready``."""
    assert process.stdout is not None
    assert process.stdout.readline() == ready
    process.send_signal(number)
    out, _ = process.communicate(timeout=20)
    return process.returncode, out


def ends(command: list[object], **more: Any) -> tuple[int, str, list[str]]:
    """Exit code, stdout, and the lines of stderr."""
    with started(command, **more) as process:
        out, err = process.communicate(timeout=120)
        return process.returncode, out, err.splitlines()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("ctypes.string_at(0)", "verify crashed (SIGSEGV), called from ctypes/__init__.py"),
        ("os.abort()", "verify gave up (SIGABRT)"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "verify was killed, often for want of memory (SIGKILL), with "),
        ("os._exit(0)", "verify ended with exit code 0; "),
        ("os._exit(7)", "verify ended with exit code 7; "),
    ],
)
def test_an_end_that_nothing_can_catch_is_one_line(
    script: Path, tmp_path: Path, way: str, body: str, says: str
) -> None:
    made = f"""
JOURNAL.note(said="half way")
with temporary(Path("folder").absolute()), temporary(Path("file").absolute()):
    Path("folder").mkdir(); Path("folder/x").touch(); Path("file").touch()
    {body}
"""
    code, out, err = ends([script, way, "verify", made], cwd=tmp_path)
    assert (code, out, len(err)) == (3, "", 1), err
    assert err[0].startswith(f"mmd-export: error: {says}")
    assert "the last it said: half way; nothing half-made was left; " in err[0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("number", [0, 1, 4, 130])
def test_exit_codes_pass_through(script: Path, way: str, number: int) -> None:
    assert ends([script, way, "verify", f"code = {number}; print('out')"]) == (number, "out\n", [])


@pytest.mark.parametrize("way", WAYS)
def test_a_library_that_crashes_on_its_way_out_spoils_no_result(script: Path, way: str) -> None:
    body = "import atexit; atexit.register(ctypes.string_at, 0); print('out'); code = 4"
    code, out, err = ends([script, way, "verify", body])
    assert (code, out) == (4, "out\n")
    assert err == ["mmd-export: warning: verify was done when what it called crashed (SIGSEGV); its result stands"]


def test_what_cannot_be_removed_is_named(script: Path, tmp_path: Path) -> None:
    made = "with temporary(Path('/proc/self/status')): ctypes.string_at(0)"
    code, _, err = ends([script, "fork", "verify", made], cwd=tmp_path)
    assert (code, len(err)) == (3, 1)
    assert "; /proc/self/status could not be removed; " in err[0]
    assert "half-made" not in err[0]


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="only Linux has files in memory")
@pytest.mark.parametrize("way", WAYS)
def test_notes_need_no_disk(script: Path, way: str) -> None:
    body = "print(os.readlink(f'/proc/self/fd/{JOURNAL.descriptor}'))"
    assert ends([script, way, "verify", body])[1].startswith("/memfd:mmd-export")


@pytest.mark.parametrize("redirection", ["2>&-", "2>/dev/full"])
def test_a_crash_that_cannot_be_told_keeps_its_exit_code(script: Path, redirection: str) -> None:
    body = "import ctypes; ctypes.string_at(0)"
    command = f'exec "$0" "$1" fork verify "{body}" {redirection}'
    done = subprocess.run(["/bin/sh", "-c", command, sys.executable, str(script)], env=environment(), check=False)
    assert done.returncode == 3


def test_the_trace_of_a_crash_is_shown_on_demand(script: Path) -> None:
    _, _, err = ends([script, "fork", "verify", "ctypes.string_at(0)"], env=environment(MMD_EXPORT_TRACEBACK="1"))
    assert err[0] == "Fatal Python error: Segmentation fault"
    assert err[-1].startswith("mmd-export: error: verify crashed")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_the_command_ends_it_as_without_a_supervisor(
    script: Path, tmp_path: Path, way: str, number: signal.Signals
) -> None:
    body = "with temporary(Path('x').absolute()): Path('x').touch(); print('ready', flush=True); time.sleep(60)"
    with started([script, way, "build", body], cwd=tmp_path) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert process.communicate(timeout=20) == ("", "")
        assert process.returncode == -number
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("way", WAYS)
def test_under_nohup_a_command_outlives_its_terminal(script: Path, way: str) -> None:
    body = "print('ready', flush=True); time.sleep(1); print('done')"
    with started([script, way, "build", body], before=("nohup",)) as process:
        assert told(process, signal.SIGHUP, "ready\n") == (0, "done\n")


@pytest.mark.parametrize("way", WAYS)
def test_a_command_that_saves_on_sigterm_does_so_and_gives_its_code(script: Path, way: str) -> None:
    body = """
seen = []
signal.signal(signal.SIGTERM, lambda *_: seen.append(1))
print("ready", flush=True)
while not seen:
    time.sleep(0.01)
print("saved")
code = 5
"""
    with started([script, way, "demo", body]) as process:
        assert told(process, signal.SIGTERM, "ready\n") == (5, "saved\n")


@pytest.mark.parametrize("way", WAYS)
def test_sigint_to_the_command_arrives_once(script: Path, way: str) -> None:
    with started([script, way, "demo", COUNTS]) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready False\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=20)[0] == "seen 1\n"


@pytest.mark.parametrize("way", WAYS)
def test_ctrl_c_at_a_terminal_arrives_once(at_a_terminal: Path, way: str) -> None:
    master, terminal = pty.openpty()
    with started(
        [at_a_terminal, way, "demo", COUNTS], stdin=terminal, stderr=terminal, start_new_session=True
    ) as process:
        os.close(terminal)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready True\n"
        os.write(master, b"\x03")
        assert process.communicate(timeout=20)[0] == "seen 1\n"
        assert process.returncode == 0
    os.close(master)


@pytest.mark.parametrize("way", WAYS)
def test_a_terminal_that_hangs_up_ends_the_command(at_a_terminal: Path, tmp_path: Path, way: str) -> None:
    body = "with temporary(Path('x').absolute()): Path('x').touch(); print('ready', flush=True); time.sleep(60)"
    master, terminal = pty.openpty()
    options: dict[str, Any] = {"stdin": terminal, "stderr": terminal, "start_new_session": True, "cwd": tmp_path}
    with started([at_a_terminal, way, "build", body], **options) as process:
        os.close(terminal)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        os.close(master)
        assert process.communicate(timeout=20)[0] == ""
        assert process.returncode == -signal.SIGHUP
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("way", WAYS)
def test_kill_9_leaves_no_child(script: Path, way: str) -> None:
    with started([script, way, "bench", "print(os.getpid(), flush=True); time.sleep(60)"]) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        assert child != process.pid
        process.kill()
        process.communicate(timeout=10)  # the child holds the other end of both pipes until it ends
    deadline = time.monotonic() + 10
    while runs(child):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def runs(process: int) -> bool:
    """A container may have nobody who reaps what has ended."""
    with suppress(ProcessLookupError, FileNotFoundError):
        os.kill(process, 0)
        stat = Path(f"/proc/{process}/stat")
        return not stat.parent.parent.is_dir() or stat.read_text().split()[2] not in "ZX"
    return False


@pytest.mark.parametrize(
    ("command", "more"),
    [
        ("finetune", {}),
        ("--help", {}),
        ("build", {"LOCAL_RANK": "0"}),
        *(("build", {"MMD_EXPORT_SUPERVISED": value}) for value in ("0", "a:b", "0:99")),
    ],
)
def test_what_runs_in_one_process(script: Path, command: str, more: dict[str, str]) -> None:
    with started([script, "fork", command, "print(os.getpid())"], env=environment(**more)) as process:
        assert process.communicate(timeout=20)[0] == f"{process.pid}\n"


def test_every_command_but_finetune_is_waited_for() -> None:
    assert {*COMMANDS, "finetune"} == set(get_group(app).commands)


NETWORK = """
import ctypes, os, signal
import torch
from torch import nn

class Net(nn.Module):
    sample_shape = (1, 8, 8)
    scheduler_config = {"_class_name": "DDIMScheduler", "prediction_type": "epsilon"}

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x, timestep):
        if torch.compiler.is_exporting():
            END
        return self.conv(x)
"""


@pytest.mark.parametrize(
    ("end", "says"),
    [
        ("ctypes.string_at(0)", "build crashed (SIGSEGV), called from ctypes/__init__.py"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "build was killed, often for want of memory (SIGKILL), with "),
        ("raise MemoryError('no 7 GB')", "out of memory: MemoryError: no 7 GB; free memory"),
    ],
)
def test_an_export_that_takes_the_process_with_it(tmp_path: Path, end: str, says: str) -> None:
    (tmp_path / "net.py").write_text(NETWORK.replace("END", end))
    (tmp_path / "out").mkdir()
    build = "-m mmd_export.cli build python:net:Net --target onnx --steps 1 --out out/b"
    code, out, err = ends([*build.split()], cwd=tmp_path)
    assert (code, out) == (3, ""), err
    assert err[-1].startswith(f"mmd-export: error: {says}")
    told = ["reading the checkpoint", "running the float64 reference", "capturing one network call"]
    assert err[:-1] == [f"mmd-export: {stage}" for stage in told]
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("error", "memory"),
    [
        (MemoryError(), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), True),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("onnxruntime: bad allocation"), True),
        (RuntimeError("allocation order differs"), False),
    ],
)
def test_an_error_that_says_that_memory_ran_out(
    capsys: pytest.CaptureFixture[str], error: Exception, memory: bool
) -> None:
    assert run(Mock(side_effect=error)) == (3 if memory else 1)
    assert ("out of memory: " in capsys.readouterr().err) is memory
    wrapped = BundleError("bundle b: model.xml cannot be loaded; rebuild the bundle")
    wrapped.__cause__ = error
    assert run(Mock(side_effect=wrapped)) == (3 if memory else 5)
    assert ("rebuild" in capsys.readouterr().err) is not memory


def test_a_compiler_that_crashes_leaves_no_half_made_bundle(tmp_path: Path) -> None:
    crash = """
import ctypes, sys
from mmd_export.targets.onnx import OnnxTarget
def compile(self, program, folder, options):
    (folder / "model.onnx").write_bytes(b"half")
    assert list(folder.parent.iterdir()) == [folder]
    ctypes.string_at(0)
OnnxTarget.compile = compile
from mmd_export.cli import main
main()
"""
    build = "build digits --target onnx --steps 1 --out b"
    code, _, err = ends(["-c", crash, *build.split()], cwd=tmp_path)
    assert code == 3, err
    assert "build crashed (SIGSEGV)" in err[-1]
    assert "; the last it said: compiling for onnx; nothing half-made was left; " in err[-1]
    assert "another --target" in err[-1]
    assert [line for line in err if "error" in line] == err[-1:]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("command", "other"), [("verify", ", another --runtime"), ("sample", ", another --runtime")])
def test_a_runtime_that_crashes_is_one_line(tmp_path: Path, digits_bundle: Path, command: str, other: str) -> None:
    crash = """
import ctypes
import mmd_runtime.onnxruntime as adapter
type(adapter.RUNTIME).open = lambda *_: ctypes.string_at(0)
from mmd_export.cli import main
main()
"""
    code, _, err = ends(["-c", crash, command, digits_bundle], cwd=tmp_path)
    assert code == 3, err
    assert err[-1].startswith(f"mmd-export: error: {command} crashed (SIGSEGV), called from ")
    assert other in err[-1]
    assert [line for line in err if "error" in line] == err[-1:]
    assert list(tmp_path.iterdir()) == []

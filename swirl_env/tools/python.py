"""The `python` tool: each call runs code in a fresh process that is cut off from the machine.

The process sees the Python installation (so what is installed can be imported) and the system libraries, read-only;
a private `/tmp`; no network, no home, no project, no environment variables, and not this package, whose data hold the
answers. Limits: wall-clock and processor time, memory, output, file size, files, processes. See `sandbox.py`.

Memory is limited for each process: at worst `PROCESSES` times as much is used. The random seed and the order of sets are
the same in every call. What is left out: notebooks that keep their variables between calls.
"""

import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from functools import cache
from pathlib import Path
from typing import Any

from swirl_env.errors import ConfigError, ToolError
from swirl_env.tools.base import describe

FILE_BYTES = 64 << 20
"""What one file, and all of /tmp together, may hold."""
PROCESSES = 16
FILES = 64
OUTPUT_BYTES = 6_000
"""Of longer output the first and the last half are kept."""

_FENCE = re.compile(r"\s*```[\w+-]*[ \t]*\n(.*?)\n?[ \t]*```\s*", re.S)


class SandboxError(ConfigError):
    """The sandbox could not be set up."""


class Python:
    """The `python` tool. Prints come back, and the value of a last expression, as in a notebook.

    Args:
        timeout: seconds a call may take, wall clock.
        memory: MiB of address space a process may have; numpy needs about 200.
        unsafe: run without isolation, with the limits only: the code can then read, write and send whatever you can.

    Raises:
        ConfigError: neither namespaces nor bubblewrap work here, and `unsafe` is not set.

    Examples:
        >>> import gymnasium as gym, swirl_env
        >>> env = gym.make("swirl/GSM8K-v0", tools=["python"])
        >>> text, info = env.reset(seed=0)
        >>> text, *_, info = env.step("<python>sum(range(10))</python>")
        >>> print(info["step"].observation)
        <result>45</result>
    """

    name = "python"

    def __init__(self, timeout: float = 5.0, memory: int = 512, unsafe: bool = False):
        for name, value in (("timeout", timeout), ("memory", memory)):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e6:
                raise ConfigError(f"python: {name} must be a positive number, got {value!r}.")
        if os.name != "posix":
            raise ConfigError("The tool python needs Linux (or, with unsafe=True, macOS).")
        self.timeout, self.memory, self.unsafe = timeout, memory, unsafe
        self.description, self.parameters = describe(self.__call__)
        if not unsafe:
            isolation()

    def __call__(self, code: str) -> str:
        """Runs Python code and shows what it prints; nothing is kept between calls.

        Args:
            code: Python code; the value of a last expression is shown.
        """
        if fenced := _FENCE.fullmatch(code):
            code = fenced[1]
        status, text = run(
            textwrap.dedent(code) if code[:1].isspace() else code,
            "unsafe" if self.unsafe else isolation(),
            self.timeout,
            self.memory,
        )
        if status == 0:
            return text or "(Nothing was printed. Print what you want to see.)"
        if status is None:
            printed = f" It had printed:\n{text}" if text else ""
            raise ToolError(f"The code was stopped: it took longer than {self.timeout:g} seconds.{printed}")
        if status == 1 and text:
            raise ToolError(text)
        how = f"ended with status {status}"
        if status > 128:
            how = f"was ended by {_signal_name(status - 128)} (a crash, or one of the limits)"
        raise ToolError(f"The code {how}.\n{text}".strip())


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


@cache
def isolation() -> str:
    """`namespaces` or `bwrap`, whichever first works on this machine; tried once in a process.

    Namespaces come first because they need nothing installed and also hold for root, whose processes bubblewrap cannot
    limit. bubblewrap is for systems that allow user namespaces to it alone.

    Raises:
        ConfigError: neither does, with the reasons.
    """
    reasons = []
    for way in ("namespaces", "bwrap"):
        try:
            status, text = run("print(6 * 7)", way, timeout=20.0, memory=512)
            if (status, text) == (0, "42"):
                return way
            reasons.append(f"{way}: the trial ended with {status} and {text[:200]!r}")
        except SandboxError as error:
            reasons.append(str(error))
    raise ConfigError(
        f"The tool python cannot be isolated here ({'; '.join(reasons)}). Install bubblewrap 0.8 or newer "
        "(`apt install bubblewrap`), allow user namespaces, or give a container the right to make them "
        "(`--cap-add SYS_ADMIN`). In a throw-away container or machine, unsafe=True runs the code without isolation."
    )


def run(code: str, way: str, timeout: float, memory: float) -> tuple[int | None, str]:
    """(exit status, output) of code in a fresh process; status `None`: the time ran out; 128 + n: ended by signal n.

    Args:
        way: `namespaces`, `bwrap` or `unsafe`.
        timeout: seconds.
        memory: MiB.

    Raises:
        SandboxError: the process could not be isolated.
    """
    with tempfile.TemporaryDirectory(prefix="swirl-", ignore_cleanup_errors=True) as folder:
        home = folder if way == "unsafe" else "/tmp"
        settings = {
            "way": way, "root": folder, "readable": _readable(), "hidden": _hidden(), "timeout": timeout,
            "memory": int(memory) << 20, "file_bytes": FILE_BYTES, "processes": PROCESSES, "files": FILES,
        }  # fmt: skip
        source = Path(__file__).with_name("sandbox.py").read_text(encoding="utf-8")
        command = [sys.executable, "-s", "-P", "-B", "-X", "utf8", "-c", source, json.dumps(settings)]
        with tempfile.TemporaryFile() as text:
            text.write(code.encode("utf-8", "surrogatepass"))
            text.seek(0)
            try:
                process = subprocess.Popen(
                    [*_bwrap(), *command] if way == "bwrap" else command,
                    stdin=text,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    cwd=folder,
                    env=_environment(home),
                    start_new_session=True,
                    bufsize=0,
                )
            except OSError as error:
                raise SandboxError(f"{way}: {error}") from error
        try:
            output, in_time = _collect(process, time.monotonic() + timeout)
            if not in_time and way == "unsafe":  # it kills what left the process group, then itself
                process.terminate()
                try:
                    process.wait(0.5)
                except subprocess.TimeoutExpired:
                    pass
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                pass
            status = process.wait()
            process.stdout.close()  # type: ignore[union-attr]
    text_out = output.decode(errors="replace")
    if not text_out.startswith("\0"):
        if not in_time:
            return None, ""
        raise SandboxError(f"{way}: {text_out.strip()[-300:] or f'ended with status {status}'}")
    return (128 - status if status < 0 else status) if in_time else None, text_out[1:].strip("\n")


def _collect(process: subprocess.Popen, deadline: float) -> tuple[bytes, bool]:
    """(output, whether the process ended in time); whoever else holds the pipe open is not waited for."""
    pipe: Any = process.stdout
    half = OUTPUT_BYTES // 2
    head, tail, cut = b"", b"", 0
    in_time = True
    while True:
        left = deadline - time.monotonic()
        ended = process.poll() is not None
        if left <= 0 and not ended:
            in_time = False
            break
        if not select.select([pipe], [], [], 0 if ended else min(left, 0.05))[0]:
            if ended:
                break
            continue
        chunk = os.read(pipe.fileno(), 65_536)
        if not chunk:
            try:
                process.wait(max(left, 0))
            except subprocess.TimeoutExpired:
                in_time = False
            break
        if ended and cut > FILE_BYTES:
            break  # something that outlived the process prints for ever
        room = half - len(head)
        head, tail = head + chunk[:room], tail + chunk[room:] if room < len(chunk) else tail
        if len(tail) > half:
            cut += len(tail) - half
            tail = tail[-half:]
    if cut:
        return head + f"\n... ({cut:,} bytes of output were cut) ...\n".encode() + tail, in_time
    return head + tail, in_time


def _environment(home: str) -> dict[str, str]:
    """All that the process knows of ours: nothing secret."""
    environment = {
        "PATH": "/usr/bin:/bin", "HOME": home, "TMPDIR": home, "LANG": "C.UTF-8", "PYTHONHASHSEED": "0",
        "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
    }  # fmt: skip
    if "LD_LIBRARY_PATH" in os.environ:  # without it some clusters' Python does not start
        environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
    return environment


@cache
def _readable() -> list[str]:
    """What Python needs to run, outermost folders only."""
    paths = {Path(name) for name in ("/usr", "/bin", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/localtime")}
    for prefix in (Path(sys.prefix), Path(sys.base_prefix)):
        paths |= {prefix / name for name in ("bin", "lib", sys.platlibdir, "pyvenv.cfg")}
    paths |= {path.resolve() for path in paths}
    kept: list[Path] = []
    for path in sorted(path for path in paths if path.exists()):
        if not any(path.is_relative_to(outer) for outer in kept):
            kept.append(path)
    return [str(path) for path in kept]


def _hidden() -> list[str]:
    """Where this package would be seen: its data hold the answers."""
    package = Path(__file__).resolve().parents[1]
    seen = [(Path(path), Path(path).resolve()) for path in _readable()]
    return [str(path / package.relative_to(real)) for path, real in seen if package.is_relative_to(real)]


def _bwrap() -> list[str]:
    """The command line of bubblewrap. Raises `SandboxError` where it is not installed or would not limit root."""
    found = shutil.which("bwrap")
    if found is None:
        raise SandboxError("bwrap: not installed")
    if os.getuid() == 0:
        raise SandboxError("bwrap: cannot limit the processes of root")
    binds = [part for path in _readable() for part in ("--ro-bind", path, path)]
    devices = [f"/dev/{name}" for name in ("null", "zero", "full", "random", "urandom")]
    return [
        found, "--unshare-user", "--disable-userns", "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts",
        "--die-with-parent", "--new-session", "--cap-drop", "ALL",
        "--size", str(FILE_BYTES), "--tmpfs", "/tmp", *binds,
        *(part for path in devices for part in ("--dev-bind", path, path)), "--symlink", "/tmp", "/dev/shm",
        *(part for path in _hidden() for part in ("--tmpfs", path)),
        "--chdir", "/tmp", "--remount-ro", "/", "--",
    ]  # fmt: skip

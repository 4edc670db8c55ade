"""The `python` tool against code that means ill. Where the machine cannot isolate, the limits are tried with `unsafe`."""

import os
import pickle
import shutil
import socket
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from swirl_env.errors import ConfigError, ToolError
from swirl_env.testing import check_tool_contract
from swirl_env.tools import Python, call_tool
from swirl_env.tools import python as module
from swirl_env.types import ToolCall

try:
    ISOLATED = module.isolation()
except ConfigError:
    ISOLATED = None
needs_isolation = pytest.mark.skipif(ISOLATED is None, reason="neither namespaces nor bubblewrap work here")
FAST = 1.0


@pytest.fixture(scope="module")
def tool():
    return Python(timeout=10, unsafe=ISOLATED is None)


@pytest.fixture(scope="module")
def hasty():
    return Python(timeout=FAST, unsafe=ISOLATED is None)


def refusal(tool, code):
    with pytest.raises(ToolError) as caught:
        tool(code)
    return str(caught.value)


def in_time(tool, code):
    """What a call says that must end soon after its timeout."""
    start = time.monotonic()
    result = call_tool({"python": tool}, ToolCall("python", {"code": code}))
    assert time.monotonic() - start < tool.timeout + 3
    assert result.error in (None, "tool_error")
    return result.text


def test_contract():
    check_tool_contract(
        Python(unsafe=ISOLATED is None), {"code": "1+1"}, [{"code": "1/0"}, {"code": "def f(:"}, {"code": "\0"}]
    )


@pytest.mark.parametrize(
    ("code", "shown"),
    [
        ("print(6 * 7)", "42"),
        ("x = 6\nx * 7", "42"),
        ("print('a')\n'b'", "a\n'b'"),
        ("```python\n3 + 4\n```", "7"),
        ("    a = 1\n    a + 1", "2"),
        ("'{' in 'a<b'", "False"),
        ("", "(Nothing was printed. Print what you want to see.)"),
        ("None", "(Nothing was printed. Print what you want to see.)"),
        ("import sys\nsys.exit()", "(Nothing was printed. Print what you want to see.)"),
        ("len(str(2 ** 20000))", "6021"),
        ("print('\\ud800')", "\\ud800"),
        ("import os\nos.write(1, b'\\xff')\nNone", "\ufffd"),
        ("import dataclasses\n@dataclasses.dataclass\nclass A:\n    x: int\nA(1)", "A(x=1)"),
        ("open('note', 'w').write('hi')\nopen('note').read()", "'hi'"),
        ("import threading\nthread = threading.Thread(target=print, args=(1,))\nthread.start()\nthread.join()", "1"),
        ("import multiprocessing\nwith multiprocessing.Pool(2) as pool:\n    print(pool.map(abs, [-1, -2]))", "[1, 2]"),
    ],
)
def test_what_is_shown(tool, code, shown):
    assert tool(code) == shown


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("print('before')\n1/0", "ZeroDivisionError: division by zero"),
        ("def f(:\n pass", "SyntaxError"),
        ("print(1)\0", "null bytes"),
        ("print('\ud800')", "surrogates not allowed"),
        ("def f():\n    return f()\nf()", "RecursionError"),
        ("import ctypes\nctypes.string_at(0)", "SIGSEGV"),
        ("import sys\nsys.exit(3)", "SystemExit: 3"),
        ("import os\nos._exit(3)", "status 3"),
        ("input()", "EOFError"),
        ("import sys, os\nsys.stdout.close()\nos.close(1)\nos.close(2)", "status 1"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("class E(Exception):\n    def __str__(self): 1/0\nraise E", "E: <exception str() failed>"),
    ],
)
def test_what_went_wrong(tool, code, said):
    assert said in refusal(tool, code)


def test_a_traceback_shows_the_line_and_nothing_of_ours(tool):
    text = refusal(tool, "print('before')\nx = 0\n1 / x")
    assert text.startswith("before\n")
    assert "line 3" in text and "1 / x" in text and "sandbox" not in text


def test_calls_share_nothing_and_repeat(tool):
    tool("x = 1\nopen('kept', 'w').write('x')")
    assert "NameError" in refusal(tool, "x")
    assert "FileNotFoundError" in refusal(tool, "open('kept')")
    code = "import random\nrandom.random(), hash('a'), {'a', 'b', 'c'}"
    assert tool(code) == tool(code)


def test_installed_packages_can_be_imported(tool):
    assert tool("import numpy as np\nint(np.arange(5).sum())") == "10"


def test_long_output_keeps_both_ends(tool):
    text = refusal(tool, "print('first')\nfor i in range(200_000): print(i)\n1/0")
    assert text.startswith("first") and text.endswith("division by zero") and "bytes of output were cut" in text
    assert len(text) < 8_000


@pytest.mark.parametrize(
    "code",
    [
        "import time\nprint('before', flush=True)\ntime.sleep(60)",
        "import signal\nfor s in range(1, 64):\n    try: signal.signal(s, signal.SIG_IGN)\n    except (OSError, ValueError): pass"
        "\nprint('before', flush=True)\nwhile True: pass",
        "print('before')\nwhile True: print('x' * 1000)",
        "import os, time\nprint('before', flush=True)\nfor _ in range(2):\n    if os.fork() == 0: os.setsid()\ntime.sleep(60)",
    ],
    ids=["sleep", "ignores signals", "prints for ever", "forks and sleeps"],
)
def test_the_timeout_holds(hasty, code):
    text = in_time(hasty, code)
    assert "longer than 1 seconds" in text and "before" in text


DAEMON = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        while True:
            print({marker!r}, flush=True)
            time.sleep(0.01)
    os._exit(0)
time.sleep(0.1)
print('done')
"""


@pytest.mark.parametrize("unsafe", [False, True])
def test_daemons_neither_delay_the_call_nor_live_on(unsafe):
    if not unsafe and ISOLATED is None:
        pytest.skip("neither namespaces nor bubblewrap work here")
    marker = uuid.uuid4().hex
    tool = Python(timeout=10, unsafe=unsafe)
    start = time.monotonic()
    assert "done" in tool(DAEMON.format(marker=marker))
    assert time.monotonic() - start < 5
    lives = Python(timeout=FAST, unsafe=unsafe)
    refusal(lives, DAEMON.format(marker=marker) + "while True: pass")
    deadline = time.monotonic() + 5
    while (left := _left_behind()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left


def _left_behind():
    """Processes of the sandbox whose parent is this process or gone."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes()
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if b"A single zero byte on standard output" in command and state != "Z":
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1]) if folder.exists() else 0
            if parent in (1, os.getpid()):
                found.append(folder.name)
    return found


def test_memory_and_file_size_are_limited(tool):
    assert "MemoryError" in refusal(tool, "x = 'a' * 10**10")
    assert "OSError" in refusal(
        tool, "with open('big', 'wb') as file:\n    for _ in range(10_000): file.write(b'x' * 10**6)"
    )
    assert "OSError" in refusal(tool, "import os\nfiles = [open('/dev/null') for _ in range(500)]")


def test_a_megabyte_of_code(tool):
    assert tool(f"x = '{'a' * 1_000_000}'\nlen(x)") == "1000000"


def test_calls_from_many_threads(tool):
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(tool, [f"{i} * 2" for i in range(8)])) == [str(i * 2) for i in range(8)]


def test_pickles():
    twin = pickle.loads(pickle.dumps(Python(timeout=7, memory=300, unsafe=ISOLATED is None)))
    assert (twin.timeout, twin.memory, twin("1 + 1")) == (7, 300, "2")


def test_no_folder_is_left_behind(tool, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    tool("open('note', 'w').write('x')")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("bad", [{"timeout": 0}, {"timeout": "5"}, {"memory": -1}, {"timeout": True}])
def test_bad_settings(bad):
    with pytest.raises(ConfigError, match="must be a positive number"):
        Python(unsafe=True, **bad)


def test_refuses_where_it_cannot_isolate(monkeypatch):
    def broken(code, way, **_):
        raise module.SandboxError(f"{way}: not here")

    module.isolation.cache_clear()
    monkeypatch.setattr(module, "run", broken)
    with pytest.raises(ConfigError, match=r"namespaces: not here.*bwrap: not here.*Install bubblewrap.*unsafe=True"):
        Python()
    Python(unsafe=True)
    module.isolation.cache_clear()


# -- isolation


@needs_isolation
@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import os\nos.listdir(os.path.expanduser('~/.ssh'))", "FileNotFoundError"),
        ("open('/proc/1/environ').read()", "FileNotFoundError"),
        ("open('/etc/passwd').read()", "FileNotFoundError"),
        ("open('/usr/x', 'w')", "Error: [Errno"),
        ("open('/x', 'w')", "Error: [Errno"),
        ("import os\nopen(os.__file__, 'a')", "Error: [Errno"),
        ("import swirl_env", "ModuleNotFoundError"),
        ("import os\nos.kill(os.getppid(), 9)\nos.kill(1, 9)\nprint('alive')", None),
        ("import os\nos.killpg(0, 0)\nprint('alive')", None),
        ("for i in range(100): open(f'/tmp/{i}', 'wb').write(b'x' * 10**6)", "No space left on device"),
        ("import ctypes\nlibc = ctypes.CDLL(None)\nassert libc.unshare(0x10000000) != 0\nprint('alive')", None),
        ("import ctypes\nlibc = ctypes.CDLL(None)\nassert libc.mount(b'x', b'/tmp', b'tmpfs', 0, None) != 0\n"
         "assert libc.umount2(b'/usr', 2) != 0\nprint('alive')", None),
    ],
)  # fmt: skip
def test_the_machine_is_out_of_reach(tool, code, said):
    assert tool(code) == "alive" if said is None else said in refusal(tool, code)


@needs_isolation
def test_files_outside_are_out_of_reach(tool, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("s3cret")
    assert "FileNotFoundError" in refusal(tool, f"open({str(secret)!r}).read()")
    assert "FileNotFoundError" in refusal(tool, f"open({str(Path(__file__).resolve())!r}).read()")


@needs_isolation
def test_the_answers_of_an_installed_package_are_hidden(tool, monkeypatch, tmp_path):
    shutil.copytree(Path(module.__file__).parents[1] / "data", tmp_path / "lib" / "package" / "data")
    readable = [*module._readable(), str(tmp_path / "lib")]
    monkeypatch.setattr(module, "_readable", lambda: readable)
    listing = f"import os\nos.listdir({str(tmp_path / 'lib' / 'package')!r})"
    assert tool(listing) == "['data']"
    monkeypatch.setattr(module, "_hidden", lambda: [str(tmp_path / "lib" / "package")])
    assert tool(listing) == "[]"


@needs_isolation
def test_environment_variables_are_not_passed_on(tool, monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "s3cret")
    assert "s3cret" not in tool("import os\nprint(dict(os.environ))")


@needs_isolation
def test_sockets_lead_nowhere(tool):
    abstract = f"\0swirl-{uuid.uuid4().hex}"
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX) as unix:
        unix.bind(abstract)
        unix.listen()
        for family, address in (("AF_INET", tcp.getsockname()), ("AF_UNIX", abstract)):
            code = f"import socket\nsocket.socket(socket.{family}).connect({address!r})"
            exec(code)  # from here there is someone
            assert "Error: [Errno" in refusal(tool, code)


@needs_isolation
def test_fork_bombs_fizzle_out(hasty, tool):
    bomb = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"
    assert "longer than 1 seconds" in in_time(hasty, bomb)
    count = "import os, time\nn = 0\ntry:\n    while n < 200:\n        if os.fork() == 0: time.sleep(60)\n        n += 1\nexcept OSError:\n    print(n)"
    assert 0 < int(tool(count)) < module.PROCESSES


@needs_isolation
def test_many_calls_at_once_do_not_share_the_process_limit(tool):
    codes = ["import os, time\nfor _ in range(5):\n    if os.fork() == 0: time.sleep(1)\ntime.sleep(0.5)\n'fine'"] * 6
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(tool, codes)) == ["'fine'"] * 6


def test_a_call_does_not_disturb_other_threads(tool):
    """Signals and waits of a call are its own."""
    before = threading.active_count()
    tool("1")
    assert threading.active_count() == before

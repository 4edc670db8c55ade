"""What runs inside the fresh process of the `python` tool: limits, isolation, then the model's code.

The text of this file is given to `python -c`, with the settings as JSON in its argument and the code on standard input;
it imports the standard library only. Three ways, chosen by `python.py`:

`namespaces` (Linux): new user, mount, process, network and IPC namespaces; the root becomes a small tmpfs with the system
libraries and the Python installation bound in read-only, and `/tmp` as the only place that can be written. There is no
/proc. When the first process of the namespace ends, the kernel kills all others. Real root gives up its user id first,
because the kernel does not count the processes of root.
`bwrap`: bubblewrap has made the same already; only the limits are left to set.
`unsafe`: limits only. What the code leaves behind is killed as far as it can be found.

A single zero byte on standard output says that the code begins; whatever comes before it is a failure of the set-up.
"""

import ast
import ctypes
import json
import linecache
import os
import random
import resource
import signal
import sys
import traceback
import types

NEWNS, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
NOSUID, NODEV, BIND, REC, PRIVATE = 2, 4, 4096, 16384, 1 << 18
NOBODY = 65534
DEVICES = ("null", "zero", "full", "random", "urandom")


def checked(result, what):
    if result != 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")


def libc():
    return ctypes.CDLL(None, use_errno=True)


def mount(source, target, kind=None, flags=0, options=None):
    encode = lambda text: None if text is None else os.fsencode(text)  # noqa: E731
    done = libc().mount(encode(source), encode(target), encode(kind), ctypes.c_ulong(flags), encode(options))
    checked(done, f"mount {target}")


def unshare(flags, proc):
    """New namespaces; in a new user namespace the user keeps the own id. `proc`: descriptor of /proc."""
    user, group = os.getuid(), os.getgid()
    checked(libc().unshare(flags), "unshare")
    if flags & NEWUSER:
        for name, text in (
            ("self/setgroups", "deny"),
            ("self/uid_map", f"{user} {user} 1"),
            ("self/gid_map", f"{group} {group} 1"),
            ("sys/user/max_user_namespaces", "0"),  # the code can make none of its own, where it would have privileges
        ):
            file = os.open(name, os.O_WRONLY, dir_fd=proc)
            os.write(file, text.encode())
            os.close(file)


def enter_root(root, readable, hidden, bytes_written):
    """Make `root` (an empty folder) the root of the file system, with `readable` in it."""
    mount(None, "/", None, REC | PRIVATE)
    mount("tmpfs", root, "tmpfs", NOSUID | NODEV, "size=1m,mode=755")
    os.mkdir(root + "/tmp")  # before the others: the Python installation may lie in it
    mount("tmpfs", root + "/tmp", "tmpfs", NOSUID | NODEV, f"size={bytes_written},nr_inodes=4096,mode=1777")
    for path in readable:
        if os.path.isdir(path):
            os.makedirs(root + path, exist_ok=True)
        else:
            os.makedirs(os.path.dirname(root + path), exist_ok=True)
            open(root + path, "a").close()
        mount(path, root + path, None, BIND | REC)
    os.makedirs(root + "/dev", exist_ok=True)
    for name in DEVICES:
        open(f"{root}/dev/{name}", "w").close()
        mount(f"/dev/{name}", f"{root}/dev/{name}", None, BIND)
    os.symlink("/tmp", root + "/dev/shm")
    for path in hidden:
        mount("tmpfs", root + path, "tmpfs", 0, "size=4k")
    call, recursive, attributes = libc().syscall, 0x8000, ctypes.c_uint64 * 4  # to set, to clear, -, -
    mount_setattr, pivot_root = 442, {"x86_64": 155, "aarch64": 41}[os.uname().machine]
    read_only, writable = attributes(1 | NOSUID), attributes(0, 1)
    checked(call(mount_setattr, -100, os.fsencode(root), recursive, read_only, 32), "mount_setattr")
    checked(call(mount_setattr, -100, os.fsencode(root + "/tmp"), 0, writable, 32), "mount_setattr /tmp")
    os.chdir(root)
    checked(call(pivot_root, b".", b"."), "pivot_root")
    checked(libc().umount2(b".", 2), "umount the old root")
    os.chdir("/tmp")


def drop_privileges():
    """No capability is left, and none can come back."""
    checked(libc().prctl(38, 1, 0, 0, 0), "no_new_privs")
    header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    checked(libc().capset(header, none), "capset")


def die_with_parent():
    if sys.platform == "linux":
        libc().prctl(1, signal.SIGKILL)


def supervise(run):
    """Run `run` in a child; what it ended with, as a shell tells it."""
    child = os.fork()
    if child == 0:
        try:
            run()
        except BaseException as error:
            os.write(1, f"{type(error).__name__}: {error}".encode())
        os._exit(125)
    while True:
        pid, status = os.wait()
        if pid == child:
            return 128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def sweep():
    """Kill what is left of this process's descendants: orphans are its children (it is their subreaper)."""
    while True:
        try:
            with open(f"/proc/self/task/{os.getpid()}/children") as file:
                children = [int(pid) for pid in file.read().split()]
            for pid in children:
                os.kill(pid, signal.SIGKILL)
            os.waitpid(-1, 0)
        except (OSError, ValueError):
            return


def limit(settings):
    seconds = int(settings["timeout"]) + 1
    for name, value in (
        ("RLIMIT_CPU", seconds),
        ("RLIMIT_AS", settings["memory"]),
        ("RLIMIT_FSIZE", settings["file_bytes"]),
        ("RLIMIT_NPROC", settings["processes"]),
        ("RLIMIT_NOFILE", settings["files"]),
        ("RLIMIT_CORE", 0),
    ):
        number = getattr(resource, name)
        hard = resource.getrlimit(number)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        try:
            resource.setrlimit(number, (value, value))
        except (ValueError, OSError):  # macOS knows some of them by name only
            if sys.platform == "linux":
                raise


def execute(text):
    """Run code as a notebook does: the value of a last expression is shown. Returns the exit status."""
    lines = text.splitlines(keepends=True)
    linecache.cache["<code>"] = (len(text), None, lines, "<code>")
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    try:
        tree = compile(text, "<code>", "exec", ast.PyCF_ONLY_AST)
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, "<code>", "exec"), module.__dict__)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), "<code>", "eval"), module.__dict__)
            if value is not None:
                print(repr(value))
        sys.stdout.flush()
        return 0
    except BaseException as error:
        if isinstance(error, SystemExit) and error.code in (None, 0):
            return 0
        frames = error.__traceback__.tb_next  # without this function's own
        shown = traceback.TracebackException(type(error), error, frames, limit=-3, compact=True)
        complain("".join(shown.format(chain=False)))
        return 1


def complain(text):
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        pass
    os.write(1, text.encode(errors="backslashreplace"))


def run_code(text, settings):
    limit(settings)
    random.seed(0)
    sys.set_int_max_str_digits(0)
    sys.argv[1:] = []
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    os.write(1, b"\0")
    status = 1
    try:
        status = execute(text)
        sys.stdout.flush()
    except (OSError, ValueError):  # the code closed its own output
        pass
    finally:
        os._exit(status)


def main():
    settings = json.loads(sys.argv[1])
    text = sys.stdin.buffer.read().decode("utf-8", "surrogatepass")
    os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
    way, root = settings["way"], os.getuid() == 0

    def first_process():
        die_with_parent()
        enter_root(settings["root"], settings["readable"], settings["hidden"], settings["file_bytes"])
        if root:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
            libc().prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE: or its own /proc/self is not its own
            die_with_parent()  # a change of user id undoes it
            unshare(NEWUSER, proc)  # processes are counted here alone
        os.close(proc)
        drop_privileges()
        os._exit(supervise(lambda: run_code(text, settings)))

    def unsafe_process():
        die_with_parent()
        run_code(text, settings)

    if way == "bwrap":
        run_code(text, settings)
    die_with_parent()
    if way == "namespaces":
        proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY)
        unshare(NEWNS | NEWPID | NEWNET | NEWIPC | NEWUTS | (0 if root else NEWUSER), proc)
        os._exit(supervise(first_process))
    if sys.platform == "linux":
        libc().prctl(36, 1, 0, 0, 0)  # subreaper
    signal.signal(signal.SIGTERM, lambda *_: (sweep(), os._exit(124)))
    status = supervise(unsafe_process)
    sweep()
    os._exit(status)


if __name__ == "__main__":
    main()

"""Run trimix as Windows or macOS would have it: without what only Linux, or only POSIX, has.

    python other_system.py win32 '[{"arguments": ["list"], "stdin": ""}, …]'    # JSON on stdout
    python other_system.py win32 serve --port 0                                 # as it is

Names are taken from this package alone (trimix_gguf, and what it converts with): the standard
library and the libraries of others have their own code for each system. Files that are open or
mapped cannot be renamed or removed, by anyone, as on Windows.
"""

import asyncio
import builtins
import ctypes
import importlib
import io
import json
import os
import sys
import traceback
import types
from pathlib import Path

OURS = "trimix_gguf"
MODULES = {  # what `import` does not find on Windows
    "fcntl", "grp", "posix", "pty", "pwd", "readline", "resource", "spwd", "syslog", "termios",
    "tty",
}  # fmt: skip
NAMES = {  # module -> what it has on POSIX only
    "os": {
        "WEXITSTATUS", "WIFEXITED", "WIFSIGNALED", "WNOHANG", "WTERMSIG", "O_CLOEXEC",
        "O_DIRECTORY", "O_NOFOLLOW", "O_NONBLOCK", "O_SYNC", "chown", "chroot", "confstr",
        "ctermid", "fchmod",
        "fchown", "fork", "forkpty", "fstatvfs", "getegid", "geteuid", "getgid", "getgroups",
        "getloadavg", "getpgid", "getpgrp", "getpriority", "getresuid", "getsid", "getuid",
        "initgroups", "killpg", "lchown", "lockf", "mkfifo", "mknod", "nice", "openpty", "pathconf",
        "posix_fadvise", "posix_fallocate", "posix_spawn", "posix_spawnp", "pread", "preadv",
        "pwrite", "pwritev", "readv", "register_at_fork", "sched_getaffinity", "sched_getparam",
        "sched_setaffinity", "sched_yield", "sendfile", "setegid", "seteuid", "setgid", "setgroups",
        "setpgid", "setpriority", "setsid", "setuid", "statvfs", "sync", "sysconf", "tcgetpgrp",
        "tcsetpgrp", "ttyname", "uname", "wait", "wait3", "wait4", "waitid", "writev",
    },
    "signal": {
        "SIGALRM", "SIGBUS", "SIGCHLD", "SIGCONT", "SIGHUP", "SIGKILL", "SIGPIPE", "SIGPROF",
        "SIGQUIT", "SIGSTOP", "SIGTSTP", "SIGTTIN", "SIGTTOU", "SIGUSR1", "SIGUSR2", "SIGWINCH",
        "alarm", "pause", "pthread_kill", "pthread_sigmask", "setitimer", "siginterrupt",
        "sigpending", "sigtimedwait", "sigwait", "sigwaitinfo",
    },
    "locale": {"nl_langinfo", "CODESET"},
    "mmap": {"MADV_DONTNEED", "MADV_FREE", "MADV_SEQUENTIAL", "MADV_WILLNEED", "MAP_PRIVATE",
             "MAP_SHARED", "PROT_READ", "PROT_WRITE"},
    "socket": {"AF_UNIX", "SO_REUSEPORT", "socketpair"},
    "time": {"clock_gettime", "tzset"},
}  # fmt: skip
LINUX_ONLY = {  # macOS lacks these
    "os": {"O_DIRECT", "memfd_create", "posix_fadvise", "posix_fallocate", "sched_getaffinity",
           "sched_setaffinity", "copy_file_range", "eventfd", "getrandom", "pidfd_open", "splice"},
    "signal": {"pidfd_send_signal", "sigtimedwait", "sigwaitinfo"},
}  # fmt: skip


class _Without(types.ModuleType):
    """A module, seen without some of its names, and with others in the place of its own."""

    def __init__(self, module, hidden=(), **instead):
        super().__init__(module.__name__)
        vars(self).update(_module=module, _hidden=frozenset(hidden), _instead=instead)

    def __getattr__(self, name):
        if name in self._hidden:
            raise AttributeError(f"module {self._module.__name__!r} has no attribute {name!r}")
        return self._instead[name] if name in self._instead else getattr(self._module, name)

    def __setattr__(self, name, value):
        setattr(self._module, name, value)


def take_away(system):
    """From here on, what this package imports is as on `system`: win32 or darwin."""
    windows = system == "win32"
    # Some builds for macOS have no readline.
    missing, gone = (NAMES, MODULES) if windows else (LINUX_ONLY, {"readline"})
    seen = {name: _Without(importlib.import_module(name), missing[name]) for name in missing}
    os_name = {"name": "nt" if windows else "posix"}
    seen["os"] = _Without(os, missing["os"], **os_name)
    seen["sys"] = _Without(sys, platform=system)
    if windows:
        seen["ctypes"] = _Without(ctypes, CDLL=_windows_cdll)
        asyncio.SelectorEventLoop.add_signal_handler = _no_signal_handler
        for name in ("replace", "rename", "unlink", "remove"):
            setattr(os, name, _refusing_open_files(getattr(os, name)))
    find = builtins.__import__

    def our_import(name, globals=None, locals=None, fromlist=(), level=0):
        importer = (globals or {}).get("__name__") or ""
        if level == 0 and importer.partition(".")[0] == OURS:
            if name in gone:
                raise ImportError(f"No module named {name!r}")
            if name in seen:
                return seen[name]
        return find(name, globals, locals, fromlist, level)

    builtins.__import__ = our_import


def _windows_cdll(name, *arguments, **options):
    if name is None:
        raise TypeError("argument of type 'NoneType' is not iterable")  # as on Windows
    return ctypes.CDLL(name, *arguments, **options)


def _no_signal_handler(self, *_):
    raise NotImplementedError


def _refusing_open_files(function):
    def refusing(path, *others, dir_fd=None, **options):
        for one in (path, *others):
            if dir_fd is not None:
                one = os.path.join(f"/proc/self/fd/{dir_fd}", os.fspath(one))
            if _in_use(os.path.realpath(one)):
                raise PermissionError(13, "The process cannot access the file", os.fspath(path))
        given = {} if dir_fd is None else {"dir_fd": dir_fd}
        return function(path, *others, **given, **options)

    return refusing


def _in_use(path):
    """Whether this process has a file open or mapped; of folders Windows does not mind so much."""
    if not os.path.isfile(path):
        return False
    numbers = Path("/proc/self/fd")
    opened = set()
    for number in os.listdir(numbers):
        try:
            opened.add(os.readlink(numbers / number))
        except OSError:
            continue  # the one that listed them
    maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="surrogateescape")
    return path in opened or any(line.endswith(f" {path}") for line in maps.splitlines())


def run(arguments, stdin):
    """One command: exit code, what it printed, and the traceback of what it did not catch."""
    from trimix_gguf.cli import main

    texts = io.BytesIO(stdin.encode()), io.BytesIO(), io.BytesIO()
    kept = sys.stdin, sys.stdout, sys.stderr, sys.argv
    sys.stdin, sys.stdout, sys.stderr = (io.TextIOWrapper(t, encoding="utf-8") for t in texts)
    sys.argv = ["trimix", *arguments]
    code, trace = None, ""
    try:
        main()
    except SystemExit as end:
        code = end.code
    except BaseException:
        trace = traceback.format_exc()
    finally:
        ours = sys.stdin, sys.stdout, sys.stderr
        sys.stdin, sys.stdout, sys.stderr, sys.argv = kept
        for stream in ours[1:]:
            stream.flush()
    out, err = (text.getvalue().decode() for text in texts[1:])
    return {"code": code, "out": out, "err": err, "trace": trace}


if __name__ == "__main__":
    # What is not ours is imported first, and whole.
    import filelock  # noqa: F401
    import gguf  # noqa: F401
    import psutil  # noqa: F401
    import uvicorn.protocols.http.h11_impl  # noqa: F401

    take_away(sys.argv[1])
    if sys.argv[2].startswith("["):
        print(json.dumps([run(**command) for command in json.loads(sys.argv[2])]))
    else:
        from trimix_gguf.cli import main

        sys.argv = ["trimix", *sys.argv[2:]]
        main()

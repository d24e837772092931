"""This machine's processor: its name, and the instruction sets that it offers."""

import os
import platform
import sys
from contextlib import suppress
from functools import cache

_ENOUGH = 1 << 14  # bytes of /proc/cpuinfo that hold the first core; the rest says the same


@cache
def describe() -> tuple[str, str]:
    """Name and instruction sets, as the system spells them; what is unknown is empty."""
    with suppress(OSError):
        if sys.platform == "linux":
            return _linux()
        if sys.platform == "darwin":
            return _macos()
    # Windows names family, model and stepping here, which decide the instruction sets.
    return os.environ.get("PROCESSOR_IDENTIFIER", platform.machine()), platform.machine()


def _linux() -> tuple[str, str]:
    with open("/proc/cpuinfo", "rb") as file:
        lines = file.read(_ENOUGH).decode("utf-8", errors="replace").split("\n\n")[0].splitlines()
    facts = {
        key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)
    }
    name = facts.get("model name") or f"{platform.machine()} {facts.get('CPU part', '')}".strip()
    return name, facts.get("flags") or facts.get("Features", "")


def _macos() -> tuple[str, str]:
    import ctypes

    libc = ctypes.CDLL("/usr/lib/libSystem.dylib")

    def read(key: bytes) -> str:
        size = ctypes.c_size_t(1024)
        value = ctypes.create_string_buffer(size.value)
        failed = libc.sysctlbyname(key, value, ctypes.byref(size), None, ctypes.c_size_t(0))
        return "" if failed else value.value.decode("utf-8", errors="replace")

    keys = (b"machdep.cpu.features", b"machdep.cpu.leaf7_features")
    return read(b"machdep.cpu.brand_string"), " ".join(filter(None, map(read, keys)))

"""The memory and the processors that a container, or a service, leaves to this process.

Linux limits them by control groups, of version 1 or 2 or both at once; a group's limit holds for
all groups below it. Source: Documentation/admin-guide/cgroup-v1 and cgroup-v2.rst of Linux.
"""

import math
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_ROOT = Path("/")
_UNLIMITED = 1 << 60  # version 1 says 2^63 less a page, version 2 "max"


def memory_limit(root: Path = _ROOT) -> int | None:
    """Bytes that all processes of the container may have together; None without a limit."""
    limits = [limit for folder in _groups("memory", root) if (limit := _memory_limit(folder))]
    return min(limits, default=None)


def memory_left(root: Path = _ROOT) -> int | None:
    """Bytes that the container can still give; None without a limit.

    Pages of files that were read count as free: the kernel takes them back.
    """
    left = []
    for folder in _groups("memory", root):
        if (limit := _memory_limit(folder)) is not None:
            used = _number(folder / "memory.current", folder / "memory.usage_in_bytes") or 0
            left.append(max(0, limit - max(0, used - _file_pages(folder))))
    return min(left, default=None)


def processors(root: Path = _ROOT) -> int | None:
    """Processors that the container's share of time comes to, rounded up; None without a limit."""
    shares = []
    for folder in _groups("cpu", root):
        quota = period = None
        with suppress(OSError, ValueError):
            quota, period = map(int, (folder / "cpu.max").read_text(encoding="ascii").split())
        if quota is None:
            quota = _number(folder / "cpu.cfs_quota_us")
            period = _number(folder / "cpu.cfs_period_us")
        if quota is not None and period and quota > 0:
            shares.append(max(1, math.ceil(quota / period)))
    return min(shares, default=None)


def _memory_limit(folder: Path) -> int | None:
    names = ("memory.max", "memory.high", "memory.limit_in_bytes")
    found = [n for name in names if (n := _number(folder / name)) is not None and n < _UNLIMITED]
    return min(found, default=None)


def _file_pages(folder: Path) -> int:
    """Bytes of a group and those below it that hold pages of files."""
    with suppress(OSError, ValueError):
        lines = (folder / "memory.stat").read_text(encoding="ascii").splitlines()
        counts = {name: int(n) for name, n in (line.split() for line in lines)}
        # Version 1 counts a group's own pages without "total_".
        prefix = "total_" if "total_inactive_file" in counts else ""
        return sum(counts.get(f"{prefix}{kind}_file", 0) for kind in ("inactive", "active"))
    return 0


def _number(*files: Path) -> int | None:
    """What the first of the files that can be read says; None for "max"."""
    for file in files:
        with suppress(OSError, ValueError):
            return int(file.read_text(encoding="ascii"))
    return None


def _groups(controller: str, root: Path) -> Iterator[Path]:
    """The folders of this process' groups that limit `controller`, and of the groups above."""
    mounts = _lines(root / "proc/self/mountinfo")
    for line in _lines(root / "proc/self/cgroup"):
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and controller not in controllers.split(","):
            continue
        for mount in mounts:
            left, _, right = mount.partition(" - ")
            fields, kind = left.split(), right.split()
            if len(fields) < 5 or len(kind) < 3:
                continue
            version_2 = kind[0] == "cgroup2" and not controllers
            version_1 = kind[0] == "cgroup" and controller in kind[2].split(",") and controllers
            if version_1 or version_2:
                top = root / fields[4].lstrip("/")
                # Without a name space of its own, a container sees its path as the host does.
                below = path.removeprefix(fields[3]) if path.startswith(fields[3]) else ""
                folder = top / below.strip("/")
                if ".." not in folder.parts:
                    yield from (f for f in (folder, *folder.parents) if f.is_relative_to(top))


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:  # not Linux
        return []

"""Kill exports and imports of a trio at random points, and complete each by the same call.

    python benchmarks/kills.py --n 100 > benchmarks/results/kills.txt

Each run is a process that sends itself SIGKILL before one of the file operations that an
undisturbed run makes: of a random kind (open, write, fsync, rename, and so on), a random one. No
half trio may be seen then; the same call once more must leave the whole trio, each hash compared,
and nothing beside it. Ends in a line of JSON.
"""

import argparse
import json
import multiprocessing
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from trimix_gguf.trios.bundle import export_trio, import_trio
from trimix_gguf.trios.store import resolve, verify
from trimix_gguf.trios.triofile import FILENAME, TrioFile

# What a run does to files, by the names of Python's functions for it.
OPERATIONS = frozenset(
    ("open", "read", "write", "flush", "fsync", "close", "truncate", "seek", "stat", "statvfs")
    + ("mkdir", "rmdir", "scandir", "replace", "rename", "unlink", "utime")
)
FORMS = ("export to a tar", "export to a folder", "import of a tar", "import of a folder")
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["trimix_gguf.trios.bundle"])


def run(form: str, source: str, target: str, kill_at: int = 0) -> int:
    """The form once, in a process of its own; its exit code. Killed before operation `kill_at`.

    `source` is a trio or a bundle; `target` a path, or the store. Operations are noted in
    target.log, one a line.
    """
    process = _processes.Process(target=_work, args=(form, source, target, kill_at))
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def _work(form: str, source: str, target: str, kill_at: int) -> None:
    log = os.open(f"{target}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    n = 0

    def watch(frame: Any, event: str, function: Any) -> None:
        nonlocal n
        of_text = isinstance(getattr(function, "__self__", None), str)  # str.replace
        if event == "c_call" and function.__name__ in OPERATIONS and not of_text:
            n += 1
            os.write(log, f"{function.__name__}\n".encode())
            if n == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    os.environ["TRIMIX_HOME"] = target if form.startswith("import") else os.devnull
    trio = resolve(source) if form.startswith("export") else None
    sys.setprofile(watch)
    try:
        if trio is not None:
            export_trio(trio, Path(target))
        else:
            import_trio(Path(source), name="carried")
    finally:
        sys.setprofile(None)


def operations(target: str) -> list[str]:
    """Those of the last run, in order."""
    return Path(f"{target}.log").read_text(encoding="utf-8").split()


def visible(form: str, target: str) -> TrioFile | None:
    """The trio that anyone would find there now; None where there is none."""
    path = Path(target)
    if form == "export to a tar":
        if not path.exists():
            return None
        folder = path.parent / "unpacked"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.unpack_archive(path, folder, "tar", filter="data")
        return TrioFile.read(folder / FILENAME)
    folder = path / "trios" / "carried" if form.startswith("import") else path
    return TrioFile.read(folder / FILENAME) if (folder / FILENAME).exists() else None


def left_over(form: str, target: str) -> list[str]:
    """Names beside the whole trio that should not be there."""
    path = Path(target)
    if form == "export to a tar":
        return [p.name for p in path.parent.glob(f".{path.name}*")]
    if form == "export to a folder":
        return [p.name for p in path.glob(".*")]
    return [p.name for p in path.glob("trios/*") if p.name != "carried"] + [
        str(p) for p in path.glob("trios/carried/.*")
    ]


def kill_and_complete(form: str, source: str, target: str, kill_at: int) -> None:
    """Kill a run before an operation, check what is seen, complete it.

    Raises AssertionError where a half trio is seen, or the second run leaves less or more.
    """
    assert run(form, source, target, kill_at) == -signal.SIGKILL
    seen = visible(form, target)
    if seen is not None:
        assert set(verify(seen).values()) == {"whole"}, (
            f"half a trio is seen after operation {kill_at}"
        )
    assert run(form, source, target) == 0
    done = visible(form, target)
    assert done is not None and set(verify(done).values()) == {"whole"}
    assert left_over(form, target) == [], left_over(form, target)


def kill_many(form: str, trio: str, folder: Path, n: int, seed: int) -> Counter[str]:
    """`n` kills of a form at random operations; how often before which.

    Every other export goes to where a whole one was before.
    """
    draw, source, target = random.Random(seed), trio, str(folder / "target")
    if form.startswith("import"):
        source = str(folder / ("bundle.tar" if form.endswith("tar") else "bundle"))
        assert run("export", trio, source) == 0
    elif form.endswith("tar"):
        target += ".tar"
    killed, made = Counter[str](), {}
    for fresh in (True, False):  # to nothing, and where a whole one was before
        if fresh or form.startswith("export"):
            assert run(form, source, target) == 0
            made[fresh] = operations(target)
    for i in range(n):
        fresh = i % 2 == 0 or form.startswith("import")
        if fresh:
            path = Path(target)
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        kind = draw.choice(sorted(set(made[fresh])))
        at = draw.choice([i for i, name in enumerate(made[fresh], 1) if name == kind])
        kill_and_complete(form, source, target, at)
        killed[kind] += 1
    return killed


def main() -> None:
    """Measure, and print; the last line is JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--n", type=int, default=100, help="kills of exports, and of imports")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trio", default="nano")
    options = parser.parse_args()
    print(f"{platform.platform()}, Python {platform.python_version()}, seed {options.seed}")
    killed = {}
    for form in FORMS:
        with tempfile.TemporaryDirectory() as folder:
            n = options.n // 2
            killed[form] = kill_many(form, options.trio, Path(folder), n, options.seed)
        before = ", ".join(f"{name} {times}" for name, times in killed[form].most_common())
        print(f"{form}: {n} kills, each completed and verified; before: {before}", flush=True)
    print(json.dumps({"n": options.n, "seed": options.seed, "failures": 0, "killed": killed}))


if __name__ == "__main__":
    main()

"""This program beside an exported trio: wheels, and scripts that install from them.

    DIR/README.txt  install.sh  install.ps1
    DIR/program/wheels/*.whl, SHA256SUMS
    DIR/program/made-for.txt    a system and a Python on each line, as linux-x86_64:3.11
    DIR/program/trios.txt       a trio and a first prompt on each line: ug<TAB>…

The scripts are written last: where there is an install.sh, what it installs is whole.
"""

import platform
import re
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.tags import sys_tags

from trimix_gguf.errors import ProgramError
from trimix_gguf.machine import build
from trimix_gguf.machine.files import write_bytes, write_text
from trimix_gguf.trios import wheels
from trimix_gguf.trios.bundle_files import cannot_write
from trimix_gguf.trios.triofile import FILENAME, TrioFile
from trimix_gguf.trios.wheel_folder import HERE, Notify, WheelFolder, complete

SCRIPTS = ("install.sh", "install.ps1")
_LLAMA = "llama-cpp-python"
_FIRST = {  # language -> the prompt that install.sh has answered; short words that all models know
    "kk": "Қазақстанның астанасы",
    "ug": "ئۈرۈمچى",
    "": "The capital of Kazakhstan is",
}
_README = """\
trimix on this stick: the program, {trios}, and all that they need. No network is used.

Linux, macOS:  sh install.sh
Windows:       powershell -ExecutionPolicy Bypass -File install.ps1

Give these in a terminal, in this folder. Python must be there already.
The wheels here are for {made_for}.{glibc}
Another folder for the program: sh install.sh FOLDER
For another system or Python: on a computer that has it, or with --for-python,
run the same `trimix export … --with-program` to this stick again.
"""


def check_place(target: Path, folder: Path, pythons: Sequence[str]) -> None:
    """Raise ProgramError where the program and the trio could not go there together."""
    for python in pythons:
        found = re.fullmatch(r"3\.(\d+)", python)
        if found is None or int(found[1]) < 11:
            raise ProgramError(f"--for-python {python}: give 3.11 or newer, for example 3.12")
    inside = target.resolve()
    if folder.resolve() not in inside.parents:
        raise ProgramError(
            f"{target} is not in {folder}, where install.sh looks for the trio; "
            f"export it to {folder / 'NAME'}"
        )
    if (folder.resolve() / "program") in (inside, *inside.parents):
        raise ProgramError(f"{target}: program is where the wheels go; choose another name")
    if folder.exists() and not folder.is_dir():
        raise ProgramError(f"{folder} is a file; name a folder for the program")


def export_program(
    folder: Path, trio: TrioFile, target: Path, *, pythons: Sequence[str] = (), notify: Notify
) -> None:
    """Put this program into `folder`, for this system and these Pythons (and the one that runs).

    `target` is where in the folder the trio was exported. What is there and whole is kept.
    Raises ProgramError, which names the package that cannot be had; TrioFileError for the disk.
    """
    versions = sorted({HERE, *pythons}, key=lambda version: int(version.split(".")[1]))
    program = folder / "program"
    try:
        (program / "wheels").mkdir(parents=True, exist_ok=True)
        for name in SCRIPTS:
            (folder / name).unlink(missing_ok=True)
        stick = WheelFolder(program / "wheels", notify)
        notify("packing trimix-gguf")
        own_wheel = stick.add(wheels.own_wheel)
        _bring_llama(stick, notify)
        for version in versions:
            complete(stick, own_wheel, version, notify)
        stick.drop_damaged()
        _write_texts(folder, trio, target, versions)
    except OSError as error:
        raise cannot_write(folder, error) from None


def system() -> str:
    """This system as made-for.txt has it; the scripts ask their Python for the same."""
    return f"{platform.system()}-{platform.machine()}".lower()


def _bring_llama(stick: WheelFolder, notify: Notify) -> None:
    """llama.cpp for any processor of this kind, not the one built only for this machine."""
    installed = metadata.distribution(_LLAMA)
    wanted = Requirement(f"{_LLAMA}=={installed.version}")
    if stick.find(wanted, sys_tags()) is not None:
        return
    if _is_portable(installed):  # came from such a folder itself
        notify(f"packing {_LLAMA} {installed.version}")
        stick.add(lambda scratch: wheels.repack(installed, scratch))
        return
    notify(f"making {_LLAMA} {installed.version} for all processors of this kind (minutes, once)")
    stick.add(lambda scratch: build.wheel(scratch, portable=True))


def _is_portable(llama: metadata.Distribution) -> bool:
    """Whether llama.cpp has a library for each kind of CPU, as libggml-cpu-haswell.so."""
    return any(re.match(r"(lib)?ggml-cpu-\w+\.", path.name) for path in llama.files or [])


def _write_texts(folder: Path, trio: TrioFile, target: Path, versions: Sequence[str]) -> None:
    program = folder / "program"
    others = [line for line in _lines(program / "made-for.txt")
              if not line.startswith(f"{system()}:")]  # fmt: skip
    made_for = [*others, *(f"{system()}:{version}" for version in versions)]
    path = target.resolve().relative_to(folder.resolve()).as_posix()
    prompt = next((_FIRST[lang] for lang in trio.languages if lang in _FIRST), _FIRST[""])
    trios = [line for line in _lines(program / "trios.txt") if _is_there(folder, line, path)]
    trios.append(f"{path}\t{prompt}")
    _write_lines(program / "made-for.txt", made_for)
    _write_lines(program / "trios.txt", trios)
    text = _README.format(
        trios="the trio " + ", ".join(line.split("\t")[0] for line in trios),
        made_for=", ".join(line.replace(":", " with Python ") for line in made_for),
        glibc=_glibc(program / "wheels"),
    )
    write_text(folder / "README.txt", text)
    for name in SCRIPTS:
        script = (Path(__file__).parent / name).read_bytes()
        write_bytes(folder / name, script.replace(b"\r\n", b"\n"))


def _glibc(folder: Path) -> str:
    """What the wheels need of a Linux, by the oldest glibc in each one's name."""
    libc, here = platform.libc_ver()
    needed = []
    for wheel in folder.glob("*.whl"):
        if named := re.findall(r"manylinux_2_(\d+)_", wheel.name):
            needed.append(min(map(int, named)))
        elif "-linux_" in wheel.name and libc == "glibc":  # built here, for none that is older
            needed.append(int(here.split(".")[1]))
    return f"\nThose for Linux need glibc 2.{max(needed)} or newer." if needed else ""


def _is_there(folder: Path, line: str, new: str) -> bool:
    """Whether a line of trios.txt is of another trio that is still on the stick."""
    path = line.partition("\t")[0]
    there = folder / path
    return path != new and (there.is_file() or (there / FILENAME).is_file())


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []


def _write_lines(path: Path, lines: Sequence[str]) -> None:
    write_text(path, "".join(f"{line}\n" for line in lines))

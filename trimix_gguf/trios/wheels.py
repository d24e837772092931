"""One wheel: packed again from what is installed here, built from a checkout, or downloaded."""

import base64
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from email import message_from_bytes, message_from_string
from importlib import metadata
from itertools import product
from pathlib import Path

from packaging.requirements import Requirement
from packaging.tags import Tag, parse_tag

from trimix_gguf.errors import ProgramError
from trimix_gguf.machine.files import write_text
from trimix_gguf.machine.folders import cache_folder
from trimix_gguf.machine.hashes import sha256_of
from trimix_gguf.machine.typed_json import parse

PACKAGE = "trimix-gguf"
_FILE = Path(__file__).resolve()
_ROOT = _FILE.parents[2]  # site-packages, or the checkout
_SOURCES = ("pyproject.toml", "README.md", "LICENSE", "trimix_gguf", "convert")
# What the installer adds to a wheel's own files.
_INSTALLERS = ("INSTALLER", "REQUESTED", "direct_url.json", "RECORD", "RECORD.jws")


# -- what is installed here -------------------------------------------------------------------


def tags(distribution: metadata.Distribution) -> set[Tag]:
    """The Pythons and systems for which a distribution was made; none where it does not say."""
    lines = message_from_string(distribution.read_text(filename="WHEEL") or "").get_all("Tag") or []
    return {tag for line in lines for tag in parse_tag(line)}


def repack(distribution: metadata.Distribution, folder: Path) -> Path:
    """Make the wheel again from which a distribution was installed; every file is compared.

    The same files give the same bytes. Raises ProgramError where they are not just the wheel's.
    """
    name = f"{distribution.metadata['Name']} {distribution.version}"
    made_for = tags(distribution)
    files = list(_own_files(distribution, name))
    info = next((path.parts[0] for path, _ in files if path.parts[0].endswith(".dist-info")), None)
    if not made_for or info is None:
        raise ProgramError(f"{name} was not installed from a wheel")
    parts = [{t.interpreter for t in made_for}, {t.abi for t in made_for}]
    parts.append({t.platform for t in made_for})
    if len(made_for) != len(list(product(*parts))):
        raise ProgramError(f"{name} has tags that no file name can hold")
    out = folder / "-".join(
        [info.removesuffix(".dist-info"), *(".".join(sorted(part)) for part in parts)]
    )
    out = out.with_name(f"{out.name}.whl")
    rows = []
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for path, source in files:
            content = source.read_bytes()
            digest = _digest(content)
            if path.hash is not None and path.hash.mode == "sha256" and path.hash.value != digest:
                raise ProgramError(f"{source} was altered since {name} was installed")
            rows.append(f"{_quoted(path.as_posix())},sha256={digest},{len(content)}\n")
            _add(archive, path.as_posix(), content, executable=os.access(source, os.X_OK))
        record = f"{info}/RECORD"
        _add(archive, record, "".join([*rows, f"{record},,\n"]).encode())
    return out


def _own_files(
    distribution: metadata.Distribution, name: str
) -> Iterator[tuple[metadata.PackagePath, Path]]:
    """What the wheel held, by RECORD; not what its installer made."""
    scripts = {entry.name for entry in distribution.entry_points}
    for path in sorted(distribution.files or [], key=str):
        if path.suffix == ".pyc" or (
            path.parent.suffix == ".dist-info" and path.name in _INSTALLERS
        ):
            continue
        if path.parts[0] == ".." or path.is_absolute():
            if path.name in scripts or path.stem in scripts:  # made of the entry points
                continue
            raise ProgramError(f"{name} has files outside of its folder: {path}")
        source = Path(str(distribution.locate_file(path)))
        if not source.is_file():
            raise ProgramError(f"{source} of {name} is missing; install it again")
        yield path, source


def _digest(content: bytes) -> str:
    """A file's hash as RECORD has it."""
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()


def _quoted(path: str) -> str:
    return f'"{path}"' if "," in path else path


def _add(archive: zipfile.ZipFile, name: str, content: bytes, *, executable: bool = False) -> None:
    entry = zipfile.ZipInfo(name)  # of no time: the same files give the same bytes
    entry.external_attr = (0o100755 if executable else 0o100644) << 16
    entry.compress_type = zipfile.ZIP_DEFLATED
    archive.writestr(entry, content)


# -- this program -----------------------------------------------------------------------------


def own_wheel(folder: Path) -> Path:
    """This program's wheel: built where it runs from a checkout, else packed again."""
    installed = _own_distribution()
    if installed is not None:
        return repack(installed, folder)
    try:
        kept = cache_folder() / "program"
    except RuntimeError:
        kept = folder / "kept"
    made_from, stamp = _hash_of_sources(), kept / "made-from.json"
    try:
        found = parse(stamp.read_text(encoding="utf-8"), object)
        wheel = kept / found["wheel"]
        if found["sources"] == made_from and found["sha256"] == sha256_of(wheel):
            return _copied(wheel, folder)
    except (OSError, ValueError, TypeError, KeyError):
        pass
    kept.mkdir(parents=True, exist_ok=True)
    for old in kept.glob("*.whl"):
        old.unlink()
    wheel = _build(kept)
    found = {"sources": made_from, "wheel": wheel.name, "sha256": sha256_of(wheel)}
    write_text(stamp, json.dumps(found))
    return _copied(wheel, folder)


def _own_distribution() -> metadata.Distribution | None:
    """The distribution that this file belongs to; None for a checkout, editable or not."""
    try:
        distribution = metadata.distribution(PACKAGE)
    except metadata.PackageNotFoundError:
        return None
    if distribution.read_text(filename="WHEEL") is None:  # a checkout's own egg-info
        return None
    paths = (str(distribution.locate_file(path)) for path in distribution.files or []
           if path.name == Path(__file__).name)  # fmt: skip
    return distribution if any(Path(path).resolve() == _FILE for path in paths) else None


def _copied(wheel: Path, folder: Path) -> Path:
    out = folder / wheel.name
    out.write_bytes(wheel.read_bytes())
    return out


def _hash_of_sources() -> str:
    digest = hashlib.sha256()
    for name in _SOURCES:
        top = _ROOT / name
        for path in sorted(top.rglob("*")) if top.is_dir() else [top]:
            if path.is_file() and path.suffix != ".pyc":
                digest.update(f"{path.relative_to(_ROOT).as_posix()} {sha256_of(path)}\n".encode())
    return digest.hexdigest()


def _build(folder: Path) -> Path:
    """The checkout's wheel; nothing is written into the checkout."""
    with tempfile.TemporaryDirectory() as scratch:
        config = Path(scratch, "setup.cfg")
        config.write_text(
            f"[build]\nbuild_base = {scratch}\n[egg_info]\negg_base = {scratch}\n", encoding="utf-8"
        )
        done = _pip("wheel", "--no-deps", "--wheel-dir", str(folder), str(_ROOT),
                    DIST_EXTRA_CONFIG=str(config))  # fmt: skip
    if done.returncode:
        raise ProgramError(
            f"no wheel could be made of the checkout {_ROOT}: {_reason(done)} "
            "(the first time it needs a network, for setuptools)"
        )
    return next(folder.glob("*.whl"))


# -- the package index ------------------------------------------------------------------------


def download(requirement: Requirement, python: str, folder: Path) -> Path:
    """Download a wheel for Python `python` on this system; raises ProgramError."""
    plain = Requirement(str(requirement))
    plain.marker = None
    done = _pip("download", "--no-deps", "--only-binary", ":all:", "--retries", "2",
                "--python-version", python, "--dest", str(folder), str(plain))  # fmt: skip
    if done.returncode:
        raise ProgramError(f"{plain} for Python {python} could not be had: {_reason(done)}")
    return next(folder.glob("*.whl"))


def check_pip() -> None:
    """Raise ProgramError where this Python has no pip."""
    if importlib.util.find_spec("pip") is None:
        raise ProgramError(
            f"this Python environment has no pip; `{sys.executable} -m ensurepip` adds it"
        )


def _pip(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    check_pip()
    return subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments],
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
        env={**os.environ, **env},
    )


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    """Why pip failed, in one line."""
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    text = "\n".join(lines)
    if "No space left on device" in text:
        return "the disk is full"
    if any(sign in text for sign in ("NewConnectionError", "NameResolution", "ConnectTimeout")):
        return "the package index cannot be reached; is there a network?"
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return (errors or lines or ["pip gave no reason"])[-1]


# -- what a wheel says ------------------------------------------------------------------------


def requirements(wheel: Path) -> list[Requirement]:
    """What a wheel needs, with markers; raises ProgramError where it cannot be read."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            name = next(
                n for n in archive.namelist()
                if n.count("/") == 1 and n.endswith(".dist-info/METADATA")
            )  # fmt: skip
            message = message_from_bytes(archive.read(name))
    except (zipfile.BadZipFile, StopIteration, OSError) as error:
        raise ProgramError(f"{wheel} is no wheel: {error}") from None
    return [Requirement(line) for line in message.get_all("Requires-Dist") or []]

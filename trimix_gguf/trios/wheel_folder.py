"""A folder of wheels with the SHA-256 of each, from which pip can install without a network."""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from importlib import metadata
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.tags import Tag, compatible_tags, cpython_tags, sys_tags
from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename

from trimix_gguf.errors import ProgramError
from trimix_gguf.machine.files import place_flushed, temporary_path, write_text
from trimix_gguf.machine.hashes import sha256_of
from trimix_gguf.trios import wheels

SUMS = "SHA256SUMS"
HERE = "{}.{}".format(*sys.version_info)
Notify = Callable[[str], None]


class WheelFolder:
    """Wheels whose hashes stand in SHA256SUMS; each is there whole, or counts as missing.

    A wheel is renamed into place, then listed: what was stopped goes on from the last one.
    """

    def __init__(self, folder: Path, notify: Notify) -> None:
        self.folder, self._notify = folder, notify
        self._sums = _read_sums(folder / SUMS)
        self._whole: set[str] = set()

    def __contains__(self, name: str) -> bool:
        """Whether a wheel is here and whole; it is read once."""
        if name not in self._whole and name in self._sums:
            path = self.folder / name
            if path.is_file() and sha256_of(path) == self._sums[name]:
                self._whole.add(name)
        return name in self._whole

    def find(self, requirement: Requirement, usable: Iterable[Tag]) -> Path | None:
        """A whole wheel that meets a requirement on a Python and system of these tags."""
        usable, wanted = set(usable), canonicalize_name(requirement.name)
        for name in sorted(self._sums):
            project, version, _, made_for = parse_wheel_filename(name)
            fits = project == wanted and made_for & usable
            if fits and requirement.specifier.contains(version, prereleases=True) and name in self:
                return self.folder / name
        return None

    def add(self, make: Callable[[Path], Path]) -> Path:
        """Put in the wheel that `make(folder)` makes; an older one for the same Pythons goes."""
        with temporary_path(self.folder / "wheel", "part") as scratch:
            scratch.mkdir(parents=True)
            made = make(scratch)
            name, digest = made.name, sha256_of(made)
            if self._sums.get(name) == digest and name in self:
                return self.folder / name
            place_flushed(made, self.folder / name)
        project, _, _, made_for = parse_wheel_filename(name)
        for other in list(self._sums):
            its_project, _, _, its_tags = parse_wheel_filename(other)
            if other != name and its_project == project and its_tags == made_for:
                self._drop(other)
        self._sums[name] = digest
        self._whole.add(name)
        self._write_sums()
        return self.folder / name

    def drop_damaged(self) -> None:
        """Take out what is damaged and was not wanted here: wheels for another system, say."""
        for name in [name for name in self._sums if name not in self]:
            self._notify(f"{name} is damaged, and gone; export again on the system it was for")
            self._drop(name)
        self._write_sums()

    def _drop(self, name: str) -> None:
        (self.folder / name).unlink(missing_ok=True)
        del self._sums[name]

    def _write_sums(self) -> None:
        text = "".join(f"{self._sums[name]}  {name}\n" for name in sorted(self._sums))
        write_text(self.folder / SUMS, text)


def _read_sums(path: Path) -> dict[str, str]:
    """Hash of each wheel by its name; lines that are none are left out."""
    sums = {}
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            digest, _, name = line.partition("  ")
            if len(digest) == 64 and _is_wheel(name):
                sums[name] = digest
    return sums


def _is_wheel(name: str) -> bool:
    """Whether this is a wheel's name, and no path."""
    try:
        parse_wheel_filename(name)
    except InvalidWheelFilename:
        return False
    return Path(name).name == name


# -- everything that a wheel needs ------------------------------------------------------------


def complete(stick: WheelFolder, wheel: Path, python: str, notify: Notify) -> None:
    """Bring in all that `wheel` needs on Python `python`, in the versions installed here.

    For the Python that runs, what is installed is packed again: no network is needed. Raises
    ProgramError, which names the package.
    """
    usable, environment = list(_usable(python)), _environment(python)
    waiting = [(r, "") for r in wheels.requirements(wheel)]
    seen: set[tuple[str, str]] = set()
    while waiting:
        requirement, extra = waiting.pop(0)
        if requirement.marker and not requirement.marker.evaluate({**environment, "extra": extra}):
            continue
        extras = sorted(requirement.extras | {""})
        new = [e for e in extras if (canonicalize_name(requirement.name), e) not in seen]
        seen.update((canonicalize_name(requirement.name), e) for e in new)
        if new:
            found = _bring(stick, requirement, python, usable, notify)
            waiting += [(r, e) for e in new for r in wheels.requirements(found)]


def _bring(
    stick: WheelFolder, requirement: Requirement, python: str, usable: list[Tag], notify: Notify
) -> Path:
    """The wheel of a requirement, of the version that is installed here where that can be had."""
    installed, pinned = _installed(requirement), requirement
    if installed is not None:
        pinned = Requirement(f"{requirement.name}=={installed.version}")
    if found := stick.find(pinned, usable):
        return found
    if installed is not None and _fits(installed, usable):
        notify(f"packing {requirement.name} {installed.version}")
        try:
            return stick.add(lambda folder: wheels.repack(installed, folder))
        except ProgramError as error:
            notify(f"{error}; it is downloaded instead")
    if found := stick.find(requirement, usable):
        return found
    notify(f"downloading {requirement.name} for Python {python}")
    if installed is not None:
        with suppress(ProgramError):  # the version here may have no wheel for that Python
            return stick.add(lambda folder: wheels.download(pinned, python, folder))
    return stick.add(lambda folder: wheels.download(requirement, python, folder))


def _fits(installed: metadata.Distribution, usable: list[Tag]) -> bool:
    """Whether a wheel of what is installed here would do: not one compiled on this machine."""
    made_for = wheels.tags(installed)
    own_build = any(tag.platform.startswith("linux_") for tag in made_for)
    return not own_build and bool(made_for & set(usable))


def _installed(requirement: Requirement) -> metadata.Distribution | None:
    """What is installed here of a requirement, where it meets it."""
    try:
        found = metadata.distribution(requirement.name)
    except metadata.PackageNotFoundError:
        return None
    return found if requirement.specifier.contains(found.version, prereleases=True) else None


def _usable(python: str) -> Iterator[Tag]:
    """The tags of wheels that a Python of this system can install."""
    if python == HERE:
        return sys_tags()
    major, minor = map(int, python.split("."))
    return _tags_of((major, minor))


def _tags_of(version: tuple[int, int]) -> Iterator[Tag]:
    yield from cpython_tags(version)
    yield from compatible_tags(version, f"cp{version[0]}{version[1]}")


def _environment(python: str) -> dict[str, str]:
    environment = {**default_environment()}
    if python != HERE:
        environment |= {"python_version": python, "python_full_version": f"{python}.0"}
    return environment  # type: ignore[return-value]

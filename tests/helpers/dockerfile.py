"""The Dockerfile and .dockerignore, read as an engine reads them; unknown syntax is refused."""

import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

KNOWN = (
    "FROM", "RUN", "COPY", "ENV", "USER", "WORKDIR", "VOLUME", "EXPOSE", "HEALTHCHECK",
    "ENTRYPOINT", "CMD",
)  # fmt: skip
# What an engine sets where the base image says nothing.
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True)
class Instruction:
    name: str
    value: str

    @property
    def options(self) -> dict[str, str]:
        """--from=build and the like."""
        return dict(re.findall(r"(?:^|(?<=\s))--([a-z-]+)=(\S+)", self._parts()[0]))

    @property
    def rest(self) -> str:
        """What follows the options."""
        return self._parts()[1]

    def words(self) -> list[str] | None:
        """The exec form's list; None for the shell form."""
        if not self.rest.startswith("["):
            return None
        return [str(word) for word in json.loads(self.rest)]

    def _parts(self) -> tuple[str, str]:
        found = re.match(r"((?:--[a-z-]+=\S+\s+)*)(.*)", self.value, re.S)
        assert found
        return found[1], found[2]


@dataclass
class Stage:
    base: str
    name: str
    instructions: list[Instruction] = field(default_factory=list)

    def last(self, name: str) -> Instruction:
        """Of an instruction given twice the last counts; ValueError where there is none."""
        found = [i for i in self.instructions if i.name == name]
        if not found:
            raise ValueError(f"stage {self.name} has no {name}")
        return found[-1]

    def health_command(self) -> list[str]:
        """The HEALTHCHECK's command, in exec form."""
        check = self.last("HEALTHCHECK")
        kind, _, command = check.rest.partition(" ")
        words = Instruction("CMD", command.strip()).words()
        if kind != "CMD" or words is None:
            raise ValueError(f"HEALTHCHECK {check.rest}: expected CMD in exec form")
        return words


def read_stages(path: Path) -> list[Stage]:
    """The stages in order; the last is the image."""
    stages: list[Stage] = []
    for instruction in _instructions(path.read_text(encoding="utf-8")):
        if instruction.name == "FROM":
            base, _, name = instruction.value.partition(" AS ")
            stages.append(Stage(base, name or str(len(stages))))
        elif not stages:
            raise ValueError(f"{path}: {instruction.name} before the first FROM")
        else:
            stages[-1].instructions.append(instruction)
    return stages


def _instructions(text: str) -> Iterator[Instruction]:
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    for line in re.split(r"(?<!\\)\n", "\n".join(lines)):
        name, _, value = line.replace("\\\n", "").strip().partition(" ")
        if name not in KNOWN or "<<" in value:
            raise ValueError(f"{line!r}: not understood; known are {', '.join(KNOWN)}")
        yield Instruction(name, value.strip())


def environment(value: str, known: dict[str, str]) -> dict[str, str]:
    """ENV's names and values, $NAME taken from `known`."""
    pairs = (word.partition("=") for word in shlex.split(value))
    return {
        name: re.sub(r"\$\{?(\w+)\}?", lambda found: known.get(found[1], ""), text)
        for name, _, text in pairs
    }


def context_files(folder: Path) -> list[Path]:
    """Relative paths of the files and links that a build may copy: those not in .dockerignore."""
    lines = (folder / ".dockerignore").read_text(encoding="utf-8").splitlines()
    rules = [
        (_pattern(line.removeprefix("!")), line.startswith("!"))
        for line in map(str.strip, lines)
        if line and not line.startswith("#")
    ]

    def is_kept(path: Path) -> bool:
        kept = True
        for pattern, brings_back in rules:  # the last rule that fits a path, or a folder above it
            if any(pattern.fullmatch(str(p)) for p in (path, *path.parents)):
                kept = brings_back
        return kept

    found = []
    tops = [p for p in folder.iterdir() if p.name not in (".git", ".venv")]
    for path in [*tops, *(p for top in tops if top.is_dir() for p in top.rglob("*"))]:
        relative = path.relative_to(folder)
        if (path.is_symlink() or path.is_file()) and is_kept(relative):
            found.append(relative)
    return sorted(found)


def _pattern(glob: str) -> re.Pattern[str]:
    parts = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    tokens = re.findall(r"\*\*/|\*\*|\*|\?|[^*?]+", glob.strip("/"))
    return re.compile("".join(parts.get(t, re.escape(t)) for t in tokens))


def sources_of(copy: Instruction, files: list[Path]) -> dict[str, list[Path]]:
    """For each source that a COPY from the context names, the files in it."""
    *sources, _ = copy.rest.split()
    return {s: [f for f in files if Path(s) in (f, *f.parents)] for s in sources}

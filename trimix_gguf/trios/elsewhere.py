"""Models that other programs hold on this machine: Ollama, LM Studio, the Hugging Face cache."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from trimix_gguf.errors import TrioFileError
from trimix_gguf.machine.parts import is_here
from trimix_gguf.machine.typed_json import parse

_LATER_PART = re.compile(r".+-(?!00001)\d{5}-of-\d{5}\.gguf")
_MODEL = "application/vnd.ollama.image.model"
_ADAPTER = "application/vnd.ollama.image.adapter"
_LIBRARY = ("registry.ollama.ai", "library")  # what a short name of Ollama leaves out
_SERVICE = "/usr/share/ollama/.ollama/models"
_MOST_NAMED = 5  # in an error's message


@dataclass(frozen=True)
class Found:
    """A model of another program: how `find` names it, and its file."""

    source: str
    path: Path


def find(source: str) -> Path:
    """The file that a user means: FILE, DIR, hf:OWNER/NAME/FILE, ollama:NAME, lmstudio:OWNER/NAME.

    Nothing is fetched. Raises TrioFileError where it is not here, or one of several is meant.
    """
    scheme, _, name = source.partition(":")
    if scheme in _HOLDERS and name and not Path(source).exists():
        return _held(scheme, source)
    path = Path(source)
    if path.is_dir():
        return _only(source, [Found(file.name, file) for file in _ggufs(path, deep=False)])
    if not path.is_file():
        raise TrioFileError(
            f"{source}: there is no such file; `trimix create --found` lists the models of other "
            "programs"
        )
    return path


def everywhere() -> list[Found]:
    """All models that other programs hold here."""
    return [found for holder in _HOLDERS.values() for found in holder()]


def _held(scheme: str, source: str) -> Path:
    held = list(_HOLDERS[scheme]())
    named = [found for found in held if found.source in (source, f"{source}:latest")]
    below = [found for found in held if found.source.startswith(f"{source.rstrip('/')}/")]
    if found := named or below:
        return _only(source, found)
    near = get_close_matches(source, [found.source for found in held], 1, 0.5)
    hint = f"did you mean {near[0]}?" if near else "`trimix create --found` lists what there is"
    raise TrioFileError(f"{source} is not on this machine; {hint}")


def _only(source: str, found: list[Found]) -> Path:
    if len(found) == 1:
        return found[0].path
    names = ", ".join(f.source for f in found[:_MOST_NAMED])
    raise TrioFileError(
        f"{source} has {len(found)} models ({names}); name one"
        if found
        else f"{source} has no GGUF file; `trimix convert hf` makes one of a checkpoint folder"
    )


# -- where they are ---------------------------------------------------------------------------


def _hub() -> Iterator[Found]:
    """Of each repository the snapshot that its branch `main` leads to, or else every one."""
    home = os.environ.get("HF_HOME") or _home(".cache", "huggingface")
    folder = Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub")
    for repo in sorted(folder.glob("models--*--*")):
        name = repo.name.removeprefix("models--").replace("--", "/", 1)
        main, snapshots = repo / "refs" / "main", sorted(repo.glob("snapshots/*"))
        if main.is_file():
            commit = main.read_text(encoding="utf-8").strip()
            snapshots = [s for s in snapshots if s.name == commit] or snapshots
        for snapshot in snapshots:
            for file in _ggufs(snapshot):
                yield Found(f"hf:{name}/{file.relative_to(snapshot).as_posix()}", file)


def _ollama() -> Iterator[Found]:
    chosen = os.environ.get("OLLAMA_MODELS")
    # Its service on Linux has a home of its own.
    places = [chosen] if chosen else [_home(".ollama", "models"), _SERVICE]
    for folder in map(Path, places):
        manifests = folder / "manifests"
        for manifest in sorted(p for p in manifests.rglob("*") if _is_file(p)):
            blob = _blob(manifest, folder / "blobs")
            *parts, name, tag = manifest.relative_to(manifests).parts
            if blob is not None and parts:
                short = [] if tuple(parts) == _LIBRARY else parts
                short = short[1:] if short[:1] == [_LIBRARY[0]] else short
                yield Found(f"ollama:{'/'.join([*short, name])}:{tag}", blob)


def _blob(manifest: Path, blobs: Path) -> Path | None:
    """The file of the model, or of the adapter, that a manifest of Ollama names."""
    try:
        layers = parse(manifest.read_text(encoding="utf-8"), object)["layers"]
        digests = {layer["mediaType"]: layer["digest"] for layer in layers}
        digest = str(digests.get(_ADAPTER) or digests[_MODEL])
    except (OSError, ValueError, KeyError, TypeError):
        return None  # not a manifest of a model
    if not re.fullmatch(r"sha256:[0-9a-f]{64}", digest):
        return None
    blob = blobs / digest.replace(":", "-")
    return blob if _is_file(blob) else None


def _lm_studio() -> Iterator[Found]:
    for place in (_home(".lmstudio", "models"), _home(".cache", "lm-studio", "models")):
        folder = Path(place)
        for file in _ggufs(folder):
            yield Found(f"lmstudio:{file.relative_to(folder).as_posix()}", file)


_HOLDERS = {"hf": _hub, "ollama": _ollama, "lmstudio": _lm_studio}


def _home(*parts: str) -> str:
    return os.path.join(os.path.expanduser("~"), *parts)


def _ggufs(folder: Path, *, deep: bool = True) -> list[Path]:
    """The models below a folder; of a split one the first file."""
    found = folder.rglob("*.gguf") if deep else folder.glob("*.gguf")
    models = (p for p in found if not _LATER_PART.fullmatch(p.name) and "mmproj" not in p.name)
    return sorted(path for path in models if _is_file(path) and is_here(path))


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # another user's
        return False

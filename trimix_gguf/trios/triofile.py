"""trio.toml: what makes a trio, in one file: its models, where they come from, how they are run."""

import re
import tomllib
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from trimix_gguf.choosing.methods import runtime_methods
from trimix_gguf.errors import TrioFileError, WeightsError
from trimix_gguf.machine.files import write_text
from trimix_gguf.machine.hashes import kept_sha256
from trimix_gguf.machine.parts import is_here, parts_of
from trimix_gguf.machine.threads import MOST_THREADS
from trimix_gguf.mixing.fusion import METHODS, Mix, Weights
from trimix_gguf.roles import ROLES
from trimix_gguf.trio import tuned
from trimix_gguf.trios.names import check_name
from trimix_gguf.trios.toml_text import nested_lines, table_lines

VERSION = 1
FILENAME = "trio.toml"
MODELS = (*ROLES, "large_base")  # what a trio file may name; large_base need not be there
LOADING_FIELDS = {  # a model's key here, and its option -> the fields of Loading that it sets
    "gpu_layers": ("n_gpu_layers",),
    "device": ("device",),
    "threads": ("n_threads",),
    "kv_type": ("type_k", "type_v"),
}
MOST_BYTES = 1 << 20  # of a trio file: far more than one has


@dataclass(frozen=True)
class ModelEntry:
    """One model of a trio: the file at `path`, where it was published, how it is loaded.

    `path` is relative to the trio file's folder, with '/', or absolute. Without `file`, `repo`
    is a checkpoint that is converted to `quantization`. `adapter_of` makes it a LoRA adapter.
    """

    path: str
    repo: str | None = None
    revision: str = "main"
    file: str | None = None
    quantization: str | None = None
    licence: str | None = None
    adapter_of: str | None = None
    sha256: str | None = None
    n_bytes: int | None = None
    gpu_layers: int | str | None = None
    device: str | None = None
    threads: int | None = None
    kv_type: str | None = None

    def load_settings(self) -> dict[str, Any]:
        """Fields of Loading that are set for this model."""
        found = ((getattr(self, key), names) for key, names in LOADING_FIELDS.items())
        return {name: value for value, names in found if value is not None for name in names}


@dataclass(frozen=True)
class TrioFile:
    """A trio by its manifest; `folder` is where relative paths of `models` start.

    `method` is one of runtime_methods(); `weights`, where they are set, stand in its place.
    """

    folder: Path
    name: str
    models: dict[str, ModelEntry]
    filename: str = FILENAME
    languages: tuple[str, ...] = ()
    description: str = ""
    method: str | None = None
    weights: Weights | None = None
    n_ctx: int | None = None
    gpu_layers: int | str | None = None
    chat_template: str | None = None
    tuning: tuned.Tuning | None = None

    @property
    def file(self) -> Path:
        """Where the manifest is, or will be."""
        return self.folder / self.filename

    @classmethod
    def read(cls, file: Path | str, *, inside: bool = False) -> "TrioFile":
        """Read a manifest; with `inside`, each model must lie in its folder.

        Raises TrioFileError, which names file and key.
        """
        file = Path(file)
        return parse_trio(_read_text(file), file, inside=inside)

    def write(self) -> None:
        """Write `file`, whole or not at all; raises TrioFileError."""
        text = to_toml(self)
        parse_trio(text, self.file)  # what is written can be read
        try:
            write_text(self.file, text)
        except OSError as error:
            raise TrioFileError(f"cannot write {self.file}: {error.strerror or error}") from None

    def path(self, role: str) -> Path:
        """Where a model's file is, or will be."""
        return self.folder / self.models[role].path

    def paths(self) -> dict[str, Path]:
        """The files as arguments of Trio.load; an adapter is its `small_cpt_lora`."""
        adapter = self.models["small_cpt"].adapter_of is not None
        return {
            f"{role}_lora" if role == "small_cpt" and adapter else role: self.path(role)
            for role in ROLES
        }

    @property
    def fixed_mix(self) -> Mix | None:
        """That of `weights`, or of a method that has its own; None where a prompt chooses."""
        if self.method in METHODS:
            return METHODS[self.method]
        return None if self.weights is None else Mix(self.weights)

    def missing(self) -> list[str]:
        """Models of which a file is not there."""
        return [role for role in self.models if not is_here(self.path(role))]

    def check_files(self) -> None:
        """Raise TrioFileError where a model's file is not there."""
        for role in self.missing():
            entry = self.models[role]
            mend = "`trimix pull` fetches it" if entry.repo else "put it there, or name its repo"
            path = next(part for part in parts_of(self.path(role)) if not part.is_file())
            raise TrioFileError(f"{self.file}: models.{role}: {path} is not there; {mend}")

    def load_arguments(self) -> dict[str, Any]:
        """Arguments of Trio.load: files, context, template, each model's settings in `per_role`."""
        shared = {} if self.gpu_layers is None else {"n_gpu_layers": self.gpu_layers}
        per_role = {role: {**shared, **self.models[role].load_settings()} for role in ROLES}
        given = {
            "n_ctx": self.n_ctx,
            "chat_template": self.chat_template,
            "tuning": None if self.changed_since_tuning() else self.tuning,
        }
        given = {name: value for name, value in given.items() if value is not None}
        return {**self.paths(), **given, "per_role": per_role}

    def changed_since_tuning(self) -> str | None:
        """The first model whose file is not the one that was tuned; None where all are."""
        if self.tuning is None:
            return None
        here = {role: self.path(role) for role in ROLES}
        changed = (r for r in ROLES if kept_sha256(here[r]) != self.tuning.models[r])
        return next(changed, None)

    def with_model(self, role: str, **changes: Any) -> "TrioFile":
        """The same with some of a model's entry changed: its hash, once that is known."""
        entry = replace(self.models[role], **changes)
        return replace(self, models={**self.models, role: entry})


# -- reading ----------------------------------------------------------------------------------


def parse_trio(text: str, file: Path, *, inside: bool = False) -> TrioFile:
    """The text of a manifest that is, or will be, at `file`; raises TrioFileError."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise TrioFileError(f"{file}: not TOML: {error}") from None
    except ValueError:  # Python's own words speak of Python
        raise TrioFileError(f"{file}: a number in it has thousands of digits") from None
    except RecursionError:
        raise TrioFileError(f"{file}: not a trio file: nested too deep") from None
    try:
        return _parse_table(table, file, inside)
    except (TrioFileError, WeightsError) as error:
        raise TrioFileError(f"{file}: {error}") from None


def _read_text(file: Path) -> str:
    try:
        with open(file, "rb") as source:
            raw = source.read(MOST_BYTES + 1)
    except OSError as error:
        raise TrioFileError(f"{file}: {error.strerror}") from None
    if len(raw) > MOST_BYTES:
        raise TrioFileError(f"{file}: larger than a trio file can be ({MOST_BYTES >> 20} MiB)")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TrioFileError(f"{file}: not UTF-8 (byte {error.start}), so not a trio file") from None


def _parse_table(table: dict[str, Any], file: Path, inside: bool) -> TrioFile:
    version = table.get("version")
    if version is None or not _is_int(version, low=1):
        raise TrioFileError(f"version: expected {VERSION}, got {_shown(version)}")
    if version > VERSION:
        raise TrioFileError(
            f"version {version} is newer than this program's {VERSION}; update trimix-gguf"
        )
    values = _checked(table, _TRIO_KEYS, "")
    for key in ("name", "models"):
        if key not in values:
            raise TrioFileError(f"{key} is missing")
    if "method" in values and "weights" in values:
        raise TrioFileError("method and weights are both set; keep one")
    given = values.pop("models")
    for role in given:
        if role not in MODELS:
            raise TrioFileError(f"models.{role}: unknown{_nearest(role, MODELS)}")
    for role in ROLES:
        if role not in given:
            raise TrioFileError(f"models.{role} is missing; a trio has {', '.join(ROLES)}")
    models = {role: _parse_model(role, given[role], inside) for role in MODELS if role in given}
    del values["version"]
    weights = values.pop("weights", None)
    tuning = _parse_tuning(values.pop("tuning", None))
    language = values.pop("language", ())
    return TrioFile(
        folder=file.parent,
        filename=file.name,
        models=models,
        languages=(language,) if isinstance(language, str) else tuple(language),
        weights=None if weights is None else Weights(*(float(w) for w in weights)),
        tuning=tuning,
        **values,
    )


def _parse_tuning(table: Any) -> tuned.Tuning | None:
    try:
        tuning = None if table is None else tuned.Tuning.from_table(table)
        return tuning if tuning is None or tuning.version == tuned.VERSION else None
    except WeightsError as error:
        raise TrioFileError(f"tuning: {error}") from None


def _parse_model(role: str, table: Any, inside: bool) -> ModelEntry:
    if not isinstance(table, dict):
        raise TrioFileError(f"models.{role}: expected a table, got {_shown(table)}")
    values = _checked(table, _MODEL_KEYS, f"models.{role}.")
    adapter = values.get("adapter_of") is not None
    if adapter and role != "small_cpt":
        raise TrioFileError(f"models.{role}.adapter_of: only small_cpt can be an adapter")
    for key in ("file", "revision"):
        if key in values and "repo" not in values:
            raise TrioFileError(f"models.{role}.{key}: goes with repo, which is missing")
    entry = ModelEntry(**{"path": f"{role}{'_lora' if adapter else ''}.gguf", **values})
    if inside and not is_inside(entry.path):
        raise TrioFileError(
            f"models.{role}.path: {entry.path!r} leads out of the trio's folder; refused"
        )
    return entry


def is_inside(path: str) -> bool:
    """Whether a relative path stays in its folder on any system, by its text."""
    parts = PurePosixPath(path).parts
    rooted = PurePosixPath(path).is_absolute() or bool(PureWindowsPath(path).anchor)
    return bool(parts) and not rooted and ".." not in parts and "\\" not in path


# -- keys and their values --------------------------------------------------------------------


def _checked(table: dict[str, Any], keys: dict[str, Any], prefix: str) -> dict[str, Any]:
    """The table, where each key is known and its value as expected."""
    for key, value in table.items():
        if key not in keys:
            raise TrioFileError(f"{prefix}{key}: unknown{_nearest(key, tuple(keys))}")
        expected, fits = keys[key]
        if not fits(value):
            raise TrioFileError(f"{prefix}{key}: expected {expected}, got {_shown(value)}")
    return dict(table)


def _nearest(word: str, known: tuple[str, ...]) -> str:
    near = get_close_matches(word, known, 1)
    return f"; did you mean {near[0]}?" if near else f"; known are {', '.join(known)}"


def _shown(value: Any) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _is_int(value: Any, low: int = 0, high: int = 1 << 62) -> bool:
    return type(value) is int and low <= value <= high  # a bool is not a number here


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value.strip() != "" and "\0" not in value


def _is_line(value: Any) -> bool:
    # A trio file may come from others, and is shown in terminals, which obey control characters.
    return _is_text(value) and not any(unicodedata.category(c) == "Cc" for c in value)


def _is_name(value: Any) -> bool:
    return _is_line(value) and check_name(value) == value


def _is_languages(value: Any) -> bool:
    return _is_line(value) or (isinstance(value, list) and all(map(_is_line, value)))


def _is_weights(value: Any) -> bool:
    given = value if isinstance(value, list) else []
    return [isinstance(w, float) or _is_int(w, low=-(1 << 62)) for w in given] == [True, True]


def _is_layers(value: Any) -> bool:
    return value == "auto" or _is_int(value, low=-1, high=1 << 30)


def _is_inside_line(value: Any) -> bool:
    return _is_line(value) and is_inside(value)


def _matches(pattern: str) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and re.fullmatch(pattern, value) is not None


_METHODS = runtime_methods()
_LAYERS = ("'auto' or a number from -1 (all)", _is_layers)
_TRIO_KEYS = {  # key -> (what is expected, whether a value is that)
    "version": ("a number", _is_int),
    "name": ("a name", _is_name),
    "language": ("a code or a list of codes", _is_languages),
    "description": ("a line of text", _is_line),
    "method": (f"one of {', '.join(_METHODS)}", lambda value: value in _METHODS),
    "weights": ("two numbers, as [0.1, 0.9]", _is_weights),
    "n_ctx": ("a number of tokens from 8", lambda value: _is_int(value, low=8, high=1 << 31)),
    "gpu_layers": _LAYERS,
    "chat_template": ("text", _is_text),
    "models": ("a table", lambda value: isinstance(value, dict)),
    "tuning": ("the table that `trimix tune` writes", lambda value: isinstance(value, dict)),
}
_MODEL_KEYS = {
    "path": ("a path", _is_line),
    "repo": ("OWNER/NAME", _matches(r"(?!\.+/)[\w.-]+/(?!\.+$)[\w.-]+")),
    "revision": ("a branch, tag or commit", _is_line),
    "file": ("a file of the repo", _is_inside_line),
    "quantization": ("a type such as 'q4_k_m'", _matches(r"[a-z0-9_]+")),
    "licence": ("a line of text", _is_line),
    "adapter_of": ("'small_base'", lambda value: value == "small_base"),
    "sha256": ("64 hexadecimal digits", _matches(r"[0-9a-f]{64}")),
    "n_bytes": ("a number of bytes", _is_int),
    "gpu_layers": _LAYERS,
    "device": ("a device's name", _is_line),
    "threads": ("a number of threads", lambda value: _is_int(value, high=MOST_THREADS)),
    "kv_type": ("a type such as 'q8_0'", _matches(r"[a-z0-9_]+")),
}


# -- writing ----------------------------------------------------------------------------------


def to_toml(trio: TrioFile) -> str:
    """A manifest as text; what is not set is left out."""
    languages = trio.languages[0] if len(trio.languages) == 1 else list(trio.languages)
    top = {
        "version": VERSION,
        "name": trio.name,
        "language": languages or None,
        "description": trio.description or None,
        "method": trio.method,
        "weights": trio.weights and [trio.weights.alpha, trio.weights.beta],
        "n_ctx": trio.n_ctx,
        "gpu_layers": trio.gpu_layers,
        "chat_template": trio.chat_template,
    }
    lines = table_lines(top)
    for role, entry in trio.models.items():
        values = {f.name: getattr(entry, f.name) for f in fields(entry)}
        if entry.repo is None:
            del values["revision"]
        lines += ["", f"[models.{role}]", *table_lines(values)]
    if trio.tuning is not None:
        lines += nested_lines("tuning", trio.tuning.to_table())
    return "\n".join([*lines, ""])

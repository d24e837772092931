"""What decoding cost in earlier runs, so that drafts are planned from the first round on.

One JSON file in the user's cache: a model on a machine -> ids decoded at once -> median seconds.
They are kept whatever the context held: a longer one costs a little more, as attention reads
it all. A machine also runs hotter or busier than last time. So of a stored profile the shape
counts, brought to the pace of what this run has already measured; and as one value a size, which
two new ones outvote.
"""

import json
import math
import os
import statistics
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

from trimix_gguf.answering.drafting import MOST_DRAFTED
from trimix_gguf.machine import native
from trimix_gguf.trio.model import Model
from trimix_gguf.trio.trio import Trio

_MOST = MOST_DRAFTED + 1  # ids decoded at once that drafts may come to
# No such file or no room; not JSON; no home directory, or JSON nested too deep.
_UNUSABLE = (OSError, ValueError, RuntimeError)


@contextmanager
def kept_costs(trio: Trio, wanted: bool = True) -> Iterator[None]:
    """Start from the stored costs and leave this run's, where `wanted`; however it ends."""
    if wanted:
        load_costs(trio)
    try:
        yield
    finally:
        if wanted:
            save_costs(trio)


def load_costs(trio: Trio) -> None:
    """Give each model what is stored of the sizes that it has not decoded yet."""
    stored, machine = _read(), _machine()
    for model in trio.models.values():
        times = model.decode_seconds
        known = _profile(stored.get(_key(model, machine)))
        # The first decode of a size is slow: its one time is no pace.
        both = [n for n in known if len(times.get(n, ())) > 1]
        ratios = [statistics.median(times[n]) / known[n] for n in both]
        pace = statistics.median(ratios) if ratios else 1.0
        for n in known.keys() - times.keys():
            times[n] = deque([known[n] * pace], maxlen=5)


def save_costs(trio: Trio) -> None:
    """Merge the models' medians into the file, whole or not at all; of two at once the last."""
    stored, machine = _read(), _machine()
    for model in trio.models.values():
        new = {n: statistics.median(t) for n, t in model.decode_seconds.items() if n <= _MOST}
        key = _key(model, machine)
        merged = sorted({**_profile(stored.get(key)), **new}.items())
        stored[key] = {str(n): seconds for n, seconds in merged}
    with suppress(*_UNUSABLE):
        path = _path()
        path.parent.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False) as file:
            partial = Path(file.name)
        try:
            partial.write_text(json.dumps(stored, indent=1), encoding="utf-8")
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def cache_folder() -> Path:
    """$TRIMIX_CACHE, or where this platform keeps a user's caches. RuntimeError without a home."""
    if own := os.environ.get("TRIMIX_CACHE"):
        return Path(own)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "trimix"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "trimix"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trimix"


def _path() -> Path:
    return cache_folder() / "costs.json"


def _read() -> dict[str, Any]:
    """The file's contents; empty where it is none of ours."""
    try:
        stored = json.loads(_path().read_text(encoding="utf-8"))
    except _UNUSABLE:
        return {}
    return stored if isinstance(stored, dict) else {}


def _profile(entry: Any) -> dict[int, float]:
    """One model's entry: ids decoded at once -> seconds, of what can be read as that."""
    named = entry if isinstance(entry, dict) else {}
    times = {n: named.get(str(n)) for n in range(1, _MOST + 1)}
    return {n: s for n, s in times.items() if isinstance(s, float) and 0 < s < math.inf}


@cache
def _machine() -> list[str]:
    return [*(d.description for d in native.devices()), *native.build_info().values()]


def _key(model: Model, machine: list[str]) -> str:
    """All that a cost hangs on. Of the file its size will do: other weights decode as fast."""
    file = [model.path.name, model.file.file_size, model.lora.name if model.lora else None]
    attention = [*model.kv_types, model.flash_attn]
    return json.dumps([*file, *attention, model.device, model.n_threads, *machine])

"""What decoding cost in earlier runs, so that drafts are planned from the first round on.

One JSON file in the user's cache: a model on a machine -> ids decoded at once -> median seconds.
The length of the context is left out: a longer one costs a little more, as attention reads all of
it. A machine may also be hotter or busier than last time. So only the shape of a stored profile is
used, scaled to what this run has measured; and each size is one value, which two new ones outvote.
"""

import json
import math
import statistics
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from trimix_gguf.answering.drafting import MOST_DRAFTED
from trimix_gguf.machine import native
from trimix_gguf.machine.notes import read_table, write_note
from trimix_gguf.trio.model import Model
from trimix_gguf.trio.trio import Trio

_MOST = MOST_DRAFTED + 1  # ids decoded at once: the longest draft and one more
_NOTE = "costs.json"
_MOST_KEPT = 200  # models on machines, a kilobyte each


@contextmanager
def kept_costs(trio: Trio, wanted: bool = True) -> Iterator[None]:
    """Start from the stored costs, if `wanted`, and store this run's, however it ends."""
    if wanted:
        load_costs(trio)
    try:
        yield
    finally:
        if wanted and not sys.is_finalizing():  # Python imports nothing then
            save_costs(trio)


def load_costs(trio: Trio) -> None:
    """Give each model the stored times of sizes that it has not decoded yet."""
    stored, machine = read_table(_NOTE), _machine()
    for model in trio.models.values():
        known = _at_pace(_profile(stored.get(_key(model, machine))), model)
        for n in known.keys() - model.decode_seconds.keys():
            model.decode_seconds[n] = deque([known[n]], maxlen=5)


def save_costs(trio: Trio) -> None:
    """Merge the models' medians into the file; of two runs at once, the last one counts."""
    stored, machine = read_table(_NOTE), _machine()
    for model in trio.models.values():
        new = {n: statistics.median(t) for n, t in model.decode_seconds.items() if n <= _MOST}
        key = _key(model, machine)
        known = _at_pace(_profile(stored.get(key)), model)  # one profile is of one pace
        stored.pop(key, None)  # so that the newest is the last
        stored[key] = {str(n): seconds for n, seconds in sorted({**known, **new}.items())}
    newest = dict(list(stored.items())[-_MOST_KEPT:])
    write_note(_NOTE, json.dumps(newest, indent=1))


def _at_pace(known: dict[int, float], model: Model) -> dict[int, float]:
    """A stored profile, as it would be had this run measured it."""
    times = model.decode_seconds
    # The first decode of a size is slow, so one time says nothing about the pace.
    both = [n for n in known if len(times.get(n, ())) > 1]
    pace = statistics.median([statistics.median(times[n]) / known[n] for n in both] or [1.0])
    return {n: seconds * pace for n, seconds in known.items()}


def _profile(entry: Any) -> dict[int, float]:
    """One model's entry: ids decoded at once -> seconds; what is not that is left out."""
    named = entry if isinstance(entry, dict) else {}
    times = {n: named.get(str(n)) for n in range(1, _MOST + 1)}
    return {n: s for n, s in times.items() if isinstance(s, float) and 0 < s < math.inf}


@cache
def _machine() -> list[str]:
    return [*(d.description for d in native.devices()), *native.build_info().values()]


def _key(model: Model, machine: list[str]) -> str:
    """All that a cost depends on; of the file only the size, as other weights are as fast."""
    file = [model.path.name, model.file.file_size, model.lora.name if model.lora else None]
    attention = [*model.kv_types, model.flash_attn]
    return json.dumps([*file, *attention, model.device, model.n_threads, *machine])

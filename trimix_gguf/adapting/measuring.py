"""How fast a model learns here: a few real steps, before it is said how long the rest takes."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from trimix_gguf.adapting.extras import need, quiet
from trimix_gguf.adapting.rows import Rows
from trimix_gguf.adapting.taught import make_taught

N_MEASURED = 3  # passes; the first warms up


def tokens_per_second(model: Any, rows: Rows, dtype: str) -> float:
    """Of forward and backward passes of all the rows; the model stays as it was."""
    torch = need("torch")
    taught = make_taught(model, rows)
    ids = torch.from_numpy(np.asarray(rows.ids, np.int64))
    counts = torch.from_numpy(np.array(rows.counts))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    taught.to(device)
    seconds = []
    for _ in range(N_MEASURED):
        started = time.perf_counter()
        with quiet(), torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = taught(ids.to(device), counts.to(device))
        loss.backward()
        float(loss.detach())  # waits for a card
        seconds.append(time.perf_counter() - started)
        taught.zero_grad(set_to_none=True)
    return float(rows.ids.size / min(seconds[1:]))

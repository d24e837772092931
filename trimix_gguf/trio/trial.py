"""The self-test's child: read with the nano models, and compare with logits that are known.

machine/self_test.py runs main() in a process of its own, since a wrong build of llama.cpp ends it.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trimix_gguf.machine.loading import Loading
from trimix_gguf.machine.self_test import WRONG
from trimix_gguf.roles import ROLES
from trimix_gguf.trio.model import Model
from trimix_gguf.trio.trio import NANO

SIZES = (1, 8, 64)  # tokens read at once: llama.cpp has other code for each
TOLERANCE = 0.2  # right builds differ by up to 0.05: instruction sets round in their own ways
_KNOWN = Path(__file__).parent / "trial.json"  # role/size -> token id -> logit


def main() -> None:
    """Print each stage before it begins, so that a death can be placed; exit 3 where wrong."""
    if sys.platform == "win32":
        import ctypes

        ctypes.windll.kernel32.SetErrorMode(0x8003)  # no dialog box for a crash
    known = json.loads(_KNOWN.read_text(encoding="utf-8"))
    for name, logits in _rows():
        differences = [abs(logits[int(i)] - value) for i, value in known[name].items()]
        if not max(differences) <= TOLERANCE:  # NaN is wrong too
            sys.exit(WRONG)
    print("passed", flush=True)


def keep() -> None:
    """Write this machine's logits as the known ones: for a new nano trio (`make nano`)."""
    known = {}
    for name, logits in _rows():
        ids = range(300, len(logits), len(logits) // 16)
        known[name] = {str(i): round(float(logits[i]), 3) for i in ids}
    _KNOWN.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


def _rows() -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Role and size, and the last row [n_vocab], for every nano model and size."""
    for role in ROLES:
        model = Model(NANO / f"{role}.gguf", Loading(n_ctx=128, device="CPU"))
        for size in SIZES:
            print(f"reading {size} token{'s' * (size > 1)}", flush=True)
            model.rewind(0)
            yield f"{role}/{size}", model.decode([300 + 7 * i for i in range(size)])[0]
        model.close()

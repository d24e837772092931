"""The child that llama.cpp may end: it tries the library itself, or files that are new.

machine/self_test.py runs main() in a process of its own: without an argument to read with the
nano models and compare with logits that are known, with one to load the files that it names
(machine/file_trial.py).
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trimix_gguf.errors import ModelFileError, TrimixError
from trimix_gguf.machine import native
from trimix_gguf.machine.file_trial import REFUSED
from trimix_gguf.machine.loading import Loading
from trimix_gguf.machine.self_test import WRONG
from trimix_gguf.roles import ROLES
from trimix_gguf.trio.model import Model
from trimix_gguf.trio.trio import NANO

SIZES = (1, 8, 64)  # tokens read at once: llama.cpp has other code for each
TOLERANCE = 0.2  # right builds differ by up to 0.05: instruction sets round in their own ways
PROBE = "Қазақстан 12 x\n\n  Don't ঁ ᠮ 汉 🙂\t<|end|>"
_KNOWN = Path(__file__).parent / "trial.json"  # role/size -> token id -> logit


def main() -> None:
    """Print each stage before it begins, so that a death can be placed; exit 3 where wrong."""
    if sys.platform == "win32":
        import ctypes

        ctypes.windll.kernel32.SetErrorMode(0x8003)  # no dialog box for a crash
    if len(sys.argv) > 1:
        try:
            _try_files(json.loads(sys.argv[1]))
        except TrimixError as error:
            print(type(error).__name__, " ".join(str(error).split()), flush=True)
            sys.exit(REFUSED)
    else:
        _compare()
    print("passed", flush=True)


def _compare() -> None:
    known = json.loads(_KNOWN.read_text(encoding="utf-8"))
    for name, logits in _rows():
        differences = [abs(logits[int(i)] - value) for i, value in known[name].items()]
        if not max(differences) <= TOLERANCE:  # NaN is wrong too
            sys.exit(WRONG)


def _try_files(asked: list[dict[str, Any]]) -> None:
    """Open each file as it will be opened, and use it once."""
    for number, one in enumerate(asked):
        print(number, "reading its tokenizer", flush=True)
        ids = native.tokenize_texts(one["path"], [PROBE], special=True)[0]
        if not one["decode"]:
            continue
        print(number, "loading it", flush=True)
        loading = Loading(**one["loading"])
        model = Model(one["path"], loading, lora=one["lora"], tokenizer=one["tokenizer"])
        if one["tokenizer"]:
            print(number, "making text of its tokens", flush=True)
            ids = model.bos + ids
            for token in (*ids, *model.end_of_generation(), *model.special_tokens().values()):
                model.piece(token, special=True)
        n_most = max(1, min(32, model.n_ctx - 1))
        for some in (ids[:n_most], ids[:1])[: 1 + (model.n_ctx > 1)]:
            print(number, f"decoding {len(some)} tokens", flush=True)
            if not np.isfinite(model.decode(some)).all():
                raise ModelFileError(f"{one['path']}: it gives no numbers, but NaN or infinity")
        model.close()


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

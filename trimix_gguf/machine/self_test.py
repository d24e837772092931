"""Does llama.cpp run and compute right here? A child process tries it, once for a machine.

A library that was built for another processor, or by a compiler with a fault, ends the process.
So before this process loads llama.cpp, a child reads with the nano models and compares the logits
with values that the package holds. A good verdict is kept in the cache folder, with the libraries
and the processor that it is for. A bad one is not kept: the next start tries again.
machine/file_trial.py has the same child try each new file. TRIMIX_SELF_TEST=0 skips all of it.
"""

import os
import re
import signal
import sys
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from trimix_gguf.errors import BuildError
from trimix_gguf.machine import processor
from trimix_gguf.machine.notes import read_note, write_note

TRIAL = "trimix_gguf.trio.trial"  # what the child runs: it loads llama.cpp, this module must not
_VERDICT = "self_test.txt"  # the fingerprint that passed last
WRONG = 3  # its exit code where the logits differ
SECONDS = 120  # an old laptop under load takes a few
_BUILD_FOLDER = re.compile(r"^\S*/(?=[^/\s]+:\d+: )")  # before a source file's name and line
_WINDOWS = {  # exit codes there; a signal's name elsewhere
    0xC000001D: "an illegal instruction",
    0xC0000005: "an access violation",
    0xC0000409: "an abort",
}


@dataclass(frozen=True)
class Outcome:
    """How a child ended: its exit code, the last line of its output, and of its errors."""

    code: int | None  # None: it did not end in time
    said: str
    reason: str

    @property
    def cause(self) -> str:
        """In words, why the child is dead: 'died of SIGABRT (GGML_ASSERT(…) failed)'."""
        if self.code is None:
            return "did not end in time"
        reason = _BUILD_FOLDER.sub("", self.reason)
        because = f" ({reason})" if reason else ""
        return f"died of {_cause(self.code)}{because}"


def is_skipped() -> bool:
    """Whether nothing is to be tried, or cannot be."""
    return os.environ.get("TRIMIX_SELF_TEST") == "0" or not sys.executable


def require() -> None:
    """Raise BuildError where llama.cpp does not run here; costs nothing once it was seen to."""
    if not is_skipped() and read_note(_VERDICT) != fingerprint():
        run()


def run() -> None:
    """Try llama.cpp in a child, and remember that it passed; raises BuildError with the repair."""
    outcome = try_in_child()
    stage = outcome.said or "loading"
    if outcome.code is None:
        raise _failure(f"did not end in {SECONDS} seconds", "")
    if outcome.code == 0 and stage == "passed":
        write_note(_VERDICT, fingerprint())
        return
    if outcome.code == WRONG:  # it ran, and computed something else
        raise _failure("computes wrongly", stage)
    if outcome.code == 1:  # a Python error, such as a library that is missing
        raise _failure(f"cannot be used: {outcome.reason or 'no reason given'}", "")
    raise _failure(f"died of {_cause(outcome.code)}", stage)


def try_in_child(*arguments: str, seconds: int = SECONDS) -> Outcome:
    """Run the trial in a process of its own, which llama.cpp may end.

    Without arguments it tries llama.cpp itself; trio/trial.py has what else there is.
    """
    import subprocess  # 5 ms that a start with a kept verdict has no use for

    program = f"import sys; sys.path[:] = {sys.path!r}; from {TRIAL} import main; main()"
    switches = {"TRIMIX_SELF_TEST": "0", "PYTHONIOENCODING": "utf-8", "GGML_NO_BACKTRACE": "1"}
    try:
        done = subprocess.run(
            [sys.executable, "-c", program, *arguments],
            env={**os.environ, **switches},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        return Outcome(None, "", "")
    said, reason = (
        next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")
        for text in (done.stdout, done.stderr)
    )
    return Outcome(done.returncode, said, reason)


def _failure(what: str, stage: str) -> BuildError:
    name = processor.describe()[0] or "this processor"
    when = f" while {stage}" if stage else ""
    return BuildError(
        f"llama.cpp {what}{when} ({library_folder()}; {name}); build it for this machine: "
        "trimix doctor --mend"
    )


def _cause(code: int) -> str:
    if code < 0:
        with suppress(ValueError):
            return signal.Signals(-code).name
    return _WINDOWS.get(code & 0xFFFFFFFF, f"exit code {code}")


def library_folder() -> Path:
    """Where llama-cpp-python takes its libraries from; raises BuildError where it is not."""
    if chosen := os.environ.get("LLAMA_CPP_LIB_PATH"):
        return Path(chosen)
    spec = find_spec("llama_cpp")
    if spec is None or not spec.submodule_search_locations:
        raise BuildError(
            "llama-cpp-python is not installed; `trimix help install` has the ways to install it"
        )
    return Path(spec.submodule_search_locations[0]) / "lib"


def fingerprint() -> str:
    """The libraries as the file system knows them, and the processor."""
    parts = [*processor.describe(), os.environ.get("GGML_BACKEND_PATH", "")]
    for path in sorted(library_folder().glob("*")):
        seen = path.stat()
        parts.append(f"{path} {seen.st_size} {seen.st_mtime_ns} {seen.st_ctime_ns} {seen.st_ino}")
    return ascii(parts)

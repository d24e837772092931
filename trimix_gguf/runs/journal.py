"""The answers of a run so far, beside its output: OUT.part, which survives a kill.

It begins with a line of JSON that says what is answered, and how. A line for each answer follows:
the line's number, a space, the answer. An empty line ends the header and each group of answers;
what comes after the last empty line was cut off by a kill, and is answered again.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from trimix_gguf.errors import DataError
from trimix_gguf.machine import typed_json
from trimix_gguf.machine.files import whole_file
from trimix_gguf.machine.locking import alone
from trimix_gguf.machine.packed import packing_writer


class Journal:
    """What is answered of a run whose output is `out`; another run's is refused by DataError."""

    def __init__(self, out: Path, header: Mapping[str, Any]) -> None:
        self._out, self._path = out, journal_path(out)
        asked = json.loads(json.dumps(header))  # as it comes back from the file
        self._places: dict[int, tuple[int, int]] = {}  # number -> offset and length of its answer
        self._file = open(self._path, "a+b")  # noqa: SIM115
        try:
            kept = self._read()
            if kept is None:
                self._append([json.dumps(header) + "\n"])
            elif kept != asked:
                names = [name for name in asked if kept.get(name) != asked[name]]
                raise DataError(
                    f"{self._path} is of a run with other {', '.join(names) or 'settings'}; choose "
                    "another output, or --force to begin again"
                )
        except BaseException:
            self.close()
            raise

    def _read(self) -> Any:
        """The header, or None; what a kill left after the last empty line is cut off."""
        self._file.seek(0)
        new: dict[int, tuple[int, int]] = {}
        header, end, at = None, 0, 0
        for line in self._file:
            if line == b"\n":
                self._places.update(new)
                new, end = {}, at + 1
            elif at == 0:
                header = self._parse(line)
            elif line.endswith(b"\n"):
                number, _, answer = line.partition(b" ")
                new[self._parse(number, int)] = (at + len(number) + 1, len(answer))
            at += len(line)
        self._file.truncate(end)
        return header if end else None

    def _parse(self, text: bytes, shape: Any = None) -> Any:
        try:
            return typed_json.parse(text, {str: object} if shape is None else shape)
        except ValueError:
            if not text.endswith(b"\n") and shape is None:
                return None  # the header itself was cut off
            raise DataError(f"{self._path} is damaged; --force begins again") from None

    def __contains__(self, number: int) -> bool:
        return number in self._places

    def __len__(self) -> int:
        return len(self._places)

    def add(self, answers: Mapping[int, str]) -> None:
        """Keep a group of answers by their lines' numbers: all of them, or none."""
        at = self._file.seek(0, os.SEEK_END)
        for number, answer in answers.items():
            n_before, n_bytes = len(f"{number} "), len(answer.encode())
            self._places[number] = (at + n_before, n_bytes)
            at += n_before + n_bytes
        self._append(f"{number} {answer}" for number, answer in answers.items())

    def _append(self, lines: Iterable[str]) -> None:
        self._file.write(("".join(lines) + "\n").encode())
        self._file.flush()
        os.fsync(self._file.fileno())

    def finish(self) -> int:
        """Write the output, in the order of the lines; this is then gone. Returns its errors."""
        n_errors = 0
        with (
            whole_file(self._out) as unfinished,
            packing_writer(unfinished, self._out) as output,
        ):
            for number in sorted(self._places):
                offset, n_bytes = self._places[number]
                self._file.seek(offset)
                answer = self._file.read(n_bytes)
                n_errors += self._parse(answer).get("error") is not None
                output.write(answer)
        self.close()
        self._path.unlink()
        return n_errors

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()


def journal_path(out: Path) -> Path:
    """Where the journal of an output is."""
    return out.with_name(f"{out.name}.part")


@contextmanager
def claim(out: Path, *, force: bool) -> Iterator[None]:
    """Keep other processes from an output; `force` removes the journal of an earlier run.

    Raises DataError where there is an output and no journal to go on with, where it is a folder or
    a device, or another process writes it.
    """
    if not out.parent.is_dir():
        raise DataError(f"{out.parent}: no such folder")
    if out.exists() and not out.is_file():  # renaming would fail at the end, or replace a device
        raise DataError(f"{out} is no file that can be replaced; name a file, or - for stdout")
    lock = out.with_name(f".{out.name}.lock")
    busy = DataError(f"{out} is being written by another run; wait for it, or stop it")
    with alone(lock, busy):
        try:
            if force:
                journal_path(out).unlink(missing_ok=True)
            elif out.exists() and not journal_path(out).exists():
                raise DataError(f"{out} exists; choose another name, or --force to replace it")
            yield
        finally:
            if not journal_path(out).exists():  # nothing is left beside the output
                with suppress(OSError):  # Windows keeps a file that is open
                    lock.unlink()

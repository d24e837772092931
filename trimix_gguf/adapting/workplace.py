"""The folder of one run: what was asked, so that going on with something else is refused."""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trimix_gguf.errors import DataError
from trimix_gguf.machine.files import write_text
from trimix_gguf.machine.hashes import sha256_of
from trimix_gguf.machine.locking import alone
from trimix_gguf.machine.typed_json import parse

ASKED, DECIDED, REPORT, LOCK = "asked.json", "decided.json", "report.json", "lock"


class Workplace:
    """A folder whose run may be stopped and goes on; its files are written whole.

    A run deletes what is in its folder. Raises DataError for a folder that another one made.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.is_busy = False
        folder.mkdir(parents=True, exist_ok=True)
        names = {path.name for path in folder.iterdir()} - {LOCK}
        others = [name for name in names if not name.startswith(f".{ASKED}.")]  # left by a kill
        if others and ASKED not in names:
            raise DataError(
                f"{folder} holds {min(others)}, which is no part of a run, and a run deletes all "
                "in its folder; set --work to another one"
            )

    @contextmanager
    def held(self) -> Iterator[None]:
        """Only for this process; raises DataError where another one works there: `is_busy`."""
        busy = DataError(f"another process works in {self.folder}; wait for it, or set --work")
        self.is_busy = True  # until the lock is held
        with alone(self.folder / LOCK, busy):
            self.is_busy = False
            yield

    def check_asked(self, settings: Mapping[str, Any], files: Sequence[Path]) -> None:
        """Write down what is asked; raises DataError, which names what is other than before.

        Before training begins, another wish begins again.
        """
        asked = {**settings, "files": {str(file.resolve()): sha256_of(file) for file in files}}
        before = self.read(ASKED)
        if self.read(DECIDED) is None:
            if before != json.loads(json.dumps(asked)):
                self._empty()
            self.write(ASKED, asked)
            return
        mend = f"give it as before, or remove {self.folder} to begin again"
        for key, value in json.loads(json.dumps(settings)).items():
            if before.get(key, value) != value:  # an earlier version may not have written it
                raise DataError(
                    f"this run was begun with --{key.replace('_', '-')} {before[key]}, "
                    f"not {value}; {mend}"
                )
        for name in sorted({*before["files"], *asked["files"]}):
            if before["files"].get(name) != asked["files"].get(name):
                there = name in asked["files"] and name in before["files"]
                what = "changed" if there else "was not there, or is not any more"
                raise DataError(f"{name} {what} since this run was begun; {mend}")

    def _empty(self) -> None:
        self.write(ASKED, None)  # stays: where a kill ends this, the folder is still a run's
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name not in (LOCK, ASKED):
                path.unlink()

    def read(self, name: str) -> Any:
        """A JSON file; None where it is not there. Raises DataError where it is damaged."""
        file = self.folder / name
        if not file.is_file():
            return None
        try:
            return parse(file.read_text(encoding="utf-8"), object)
        except ValueError:
            raise DataError(f"{file} is damaged; remove {self.folder} to begin again") from None

    def write(self, name: str, value: Any) -> None:
        """Write a JSON file."""
        write_text(self.folder / name, json.dumps(value, ensure_ascii=False, indent=1) + "\n")

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """What the file has; where it is not there, what `make` gives, which is then kept."""
        found = self.read(name)
        if found is None:
            found = make()
            self.write(name, found)
        return found

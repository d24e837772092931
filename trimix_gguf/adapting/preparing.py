"""Raw text -> documents to learn from and documents to measure with, on disk."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from trimix_gguf.adapting.cleaning import OFTEN, Boilerplate, clean
from trimix_gguf.adapting.documents import Document, read_documents
from trimix_gguf.adapting.duplicates import Exact, Near
from trimix_gguf.adapting.grams import digest
from trimix_gguf.adapting.keeping_out import KeptOut
from trimix_gguf.adapting.report import Part, Report
from trimix_gguf.adapting.scripts import count_scripts, main_script, script_name, share_of
from trimix_gguf.errors import DataError
from trimix_gguf.machine.files import whole_file
from trimix_gguf.machine.typed_json import parse

FEWEST_LETTERS = 20  # of a document
HELD_OUT_CHARACTERS = (24_000, 120_000)  # at least, where that is not too much of the text; at most
FOR_EXERCISES = 10_000  # characters that exercises need: up to a quarter of a very short text
_READ, LEARNED, HELD_OUT = "read.jsonl", "learned.jsonl", "heldout.jsonl"

ShowRead = Callable[[str, int], None]  # a file's name, documents so far


@dataclass(frozen=True)
class Wanted:
    """Which text to keep: in `script` (a code of ISO 15924, or None for the commonest)."""

    script: str | None = None
    keep_out: Sequence[Path] = ()


def prepare(
    files: Sequence[Path], folder: Path, wanted: Wanted, progress: ShowRead = lambda *_: None
) -> Report:
    """Write LEARNED and HELD_OUT to `folder`; they share no document. Raises DataError.

    The text is read once and lies in `folder` twice while it is worked at; memory holds a few
    numbers for each document.
    """
    report, kept_out = Report(), KeptOut(wanted.keep_out)
    furniture, read = Boilerplate(), folder / _READ
    with whole_file(read) as path:
        _write(path, _read(files, report, furniture, progress))
    report.script = _check_script(report, wanted.script)
    kept = folder / "kept.jsonl"
    with whole_file(kept) as path:
        _write(path, _keep(documents_of(read), report, furniture, kept_out))
    read.unlink()
    _split(kept, folder, report)
    kept.unlink()
    return report


def documents_of(file: Path) -> Iterator[Document]:
    """The documents that prepare() wrote."""
    with open(file, encoding="utf-8") as lines:
        for line in lines:
            yield Document(*parse(line, [str]))


def _write(path: Path, documents: Iterable[Document]) -> None:
    with open(path, "w", encoding="utf-8", newline="\n") as out:
        for one in documents:
            out.write(json.dumps([one.source, one.text], ensure_ascii=False) + "\n")


def _read(
    files: Sequence[Path], report: Report, furniture: Boilerplate, progress: ShowRead
) -> Iterator[Document]:
    """Cleaned documents, each once."""
    exact = Exact()
    for file in files:
        part = report.files.setdefault(str(file), Part())
        for document in read_documents(file):
            part.add(document.text)
            progress(file.name, part.n_documents)
            if not document.is_utf8:
                report.drop("that are not UTF-8", document.text)
                continue
            text = clean(document.text)
            scripts = count_scripts(text)
            if sum(scripts.values()) < FEWEST_LETTERS:
                report.drop("with hardly a letter", text)
            elif not exact.is_new(text):
                report.drop("that came before", text)
            else:
                report.scripts.update(scripts)
                furniture.count(text)
                yield Document(document.source, text)


def _check_script(report: Report, wanted: str | None) -> str:
    """The script to keep; raises DataError where the text is in another than was named."""
    if not report.scripts:
        raise DataError(f"the text holds no letters; give text{report.dropped_in_short()}")
    found = main_script(report.scripts)
    script = found if wanted is None else wanted
    name = script_name(script)
    share = share_of(found, report.scripts)
    if wanted is None and share < 0.5:
        raise DataError(
            f"no script has half of the letters; {found} ({name}) has most, {share:.0%}; name the "
            "one to keep with --script"
        )
    if script != found and share_of(script, report.scripts) < 0.5:
        raise DataError(
            f"--script {script} ({name}), but {share:.0%} of the letters are {found} "
            f"({script_name(found)}); give other text, or --script {found}"
        )
    return script


def _keep(
    documents: Iterable[Document], report: Report, furniture: Boilerplate, kept_out: KeptOut
) -> Iterator[Document]:
    near = Near()
    for document in documents:
        text, gone = furniture.split(document.text)
        for line in gone:
            report.drop(f"lines that stand in {OFTEN} documents or more", line)
        text, leaked = kept_out.split(text)
        for line in leaked:
            report.drop("lines of the sets to keep out", line)
        scripts = count_scripts(text)
        if sum(scripts.values()) < FEWEST_LETTERS:
            continue  # all of it was counted line by line
        if share_of(report.script, scripts) < 0.5:
            report.drop("in another script", text)
        elif not near.is_new(text):
            report.drop("nearly as one before", text)
        else:
            yield Document(document.source, text)


def _split(kept: Path, folder: Path, report: Report) -> None:
    """Hold out some documents: by a hash of them, so that they stay the same if others come."""
    sizes = [(digest(one.text), len(one.text)) for one in documents_of(kept)]
    if len(sizes) < 2:
        raise DataError(
            "the text is too short: after cleaning less than two documents are left"
            f"{report.dropped_in_short()}"
        )
    least, most = HELD_OUT_CHARACTERS
    total = sum(n for _, n in sizes)
    some = max(0.1 * total, min(FOR_EXERCISES, 0.25 * total))
    wanted = min(max(0.02 * total, min(least, some)), most)
    held: set[int] = set()
    n_held = 0
    for key, n in sorted(sizes):
        if held and n_held + n > wanted:
            break
        held.add(key)
        n_held += n
    for name, part, is_held in (
        (LEARNED, report.learned, False),
        (HELD_OUT, report.heldout, True),
    ):
        with whole_file(folder / name) as path:
            _write(path, _counted(kept, part, held, is_held))


def _counted(kept: Path, part: Part, held: set[int], is_held: bool) -> Iterator[Document]:
    for document in documents_of(kept):
        if (digest(document.text) in held) == is_held:
            part.add(document.text)
            yield document

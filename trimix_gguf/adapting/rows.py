"""Documents -> rows of token ids, all of one length, in the order in which they are learned."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trimix_gguf.adapting.bases import Tokenizer
from trimix_gguf.adapting.teaching import Pieces
from trimix_gguf.machine.files import whole_file, write_text
from trimix_gguf.machine.typed_json import parse

SAMPLED = 200  # documents whose tokens say how many all have


@dataclass(frozen=True)
class Rows:
    """`ids` int32 [n_rows, n_block]; `counts` uint8, of that shape: each token's weight."""

    ids: NDArray[np.int32]
    counts: NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.ids)

    @staticmethod
    def load(folder: Path) -> "Rows | None":
        """What write_rows() left in a folder, mapped; None where it did not get to its end."""
        if not (folder / "rows.json").is_file():
            return None
        shape = tuple(parse((folder / "rows.json").read_text(encoding="utf-8"), [int]))
        ids = np.memmap(folder / "rows.ids", np.int32, "r", shape=shape)
        return Rows(ids, np.memmap(folder / "rows.counts", np.uint8, "r", shape=shape))


def write_rows(
    documents: Iterable[Pieces], tokenizer: Tokenizer, folder: Path, *, n_rows: int, n_block: int
) -> Rows:
    """Write the first `n_rows` rows of the documents, end to end, to `folder`."""
    made = zip(blocks(documents, tokenizer, n_block), range(n_rows), strict=False)
    with (
        whole_file(folder / "rows.ids") as ids,
        whole_file(folder / "rows.counts") as counts,
        ids.open("wb") as a,
        counts.open("wb") as b,
    ):
        for (row, weights), _ in made:
            a.write(np.asarray(row, np.int32).tobytes())
            b.write(np.asarray(weights, np.uint8).tobytes())
    write_text(folder / "rows.json", json.dumps([n_rows, n_block]))
    rows = Rows.load(folder)
    assert rows is not None
    return rows


def blocks(
    documents: Iterable[Pieces], tokenizer: Tokenizer, n_block: int
) -> Iterator[tuple[list[int], list[int]]]:
    """Rows of ids and what each counts; an end-of-text token stands after each document."""
    ids: list[int] = []
    counts: list[int] = []
    for pieces in documents:
        for text, count in pieces:
            found = tokenizer.ids(text)
            ids += found
            counts += [count] * len(found)
        ids.append(tokenizer.end)
        counts.append(1)
        n_whole = len(ids) // n_block * n_block
        for at in range(0, n_whole, n_block):
            yield ids[at : at + n_block], counts[at : at + n_block]
        ids, counts = ids[n_whole:], counts[n_whole:]


def measured_rows(texts: Sequence[str], tokenizer: Tokenizer, *, n_rows: int, n_block: int) -> Rows:
    """Rows to measure with, from the first texts on; fewer or shorter where there is less."""
    found = list(
        zip(
            blocks(([(text, 1)] for text in texts), tokenizer, n_block), range(n_rows), strict=False
        )
    )
    if not found and texts:
        ids = [i for text in texts for i in tokenizer.ids(text)]
        found = [((ids, [1] * len(ids)), 0)]
    ids_, counts = zip(*(row for row, _ in found), strict=True)
    return Rows(np.asarray(ids_, np.int32), np.asarray(counts, np.uint8))


def count_tokens(texts: Sequence[str], tokenizer: Tokenizer, n_characters: int) -> int:
    """About how many tokens all texts have, from SAMPLED of them, evenly spread."""
    step = max(1, len(texts) // SAMPLED)
    chosen = [texts[at] for at in range(0, len(texts), step)]
    n_sampled = sum(map(len, chosen))
    n_tokens = sum(len(tokenizer.ids(text)) for text in chosen)
    return round(n_tokens * n_characters / max(n_sampled, 1))

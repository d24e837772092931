"""Decoupled weights: beside alpha and beta a gamma for the size of the model, by a fourth model.

    L = small_base + α·(large_ins − large_base) + β·(small_cpt − small_base)
      + γ·(large_base − small_base)

If γ = α, large_base cancels: this is the mix of three. For any fixed γ it is a mix of three models
that stand for the four, so scoring and mixing are those of three.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trimix_gguf.evaluation.names.compared import LARGE_BASE
from trimix_gguf.machine.gguf_file import GGUFFile, read_gguf
from trimix_gguf.machine.loading import Loading
from trimix_gguf.machine.memory import check_fits_beside
from trimix_gguf.machine.vocabulary import check_contract
from trimix_gguf.mixing.fusion import Rows
from trimix_gguf.roles import ROLES
from trimix_gguf.trio.model import Logits, Model
from trimix_gguf.trio.trio import Trio


def three_of_four(rows: Mapping[str, Logits], gamma: float) -> Rows:
    """Logits of three models: their mix by (α, β) is that of the four in `rows` by (α, β, γ)."""
    small, large = rows["small_base"], rows[LARGE_BASE]
    base = small + np.float32(gamma) * (large - small)
    return {
        "large_ins": base + (rows["large_ins"] - large),
        "small_cpt": base + (rows["small_cpt"] - small),
        "small_base": base,
    }


def check_fourth(path: Path, trio: Trio) -> None:
    """Whether large_base fits to an open trio.

    Raises ModelFileError, VocabularyMismatch if its ids are not the trio's, and MemoryNeededError
    if there is no memory for it.
    """
    file = read_gguf(path)
    files: dict[str, GGUFFile] = {r: m.file for r, m in trio.models.items()}
    check_contract({**files, LARGE_BASE: file})
    check_fits_beside(file, _loading(trio))


def open_fourth(path: Path, trio: Trio) -> Model:
    """Open large_base with the settings of large_ins; the trio has the tokenizer."""
    return Model(path, _loading(trio), tokenizer=False)


def _loading(trio: Trio) -> Loading:
    large = trio.models[ROLES[0]]
    return Loading(
        n_ctx=trio.n_ctx,
        n_window=trio.n_window,
        n_batch=large.n_batch,
        n_threads=large.n_threads,
        n_gpu_layers=large.n_gpu_layers,
    )


class FourthModel:
    """large_base, kept in step with a trio; all roles of the trio must hold the same ids."""

    def __init__(self, model: Model, trio: Trio) -> None:
        self.model, self._trio = model, trio
        self._ids: list[int] = []

    def beside(self, rows: Rows, n_ids: int) -> Mapping[str, Logits]:
        """`rows` [n, n_vocab] of the trio, and those of large_base after the same ids.

        They are the rows after each of the last n of the trio's first `n_ids` ids.
        """
        n = len(next(iter(rows.values())))
        four: dict[str, Logits] = {role: matrix for role, matrix in rows.items()}
        return four | {LARGE_BASE: self._rows(self._trio.ids[ROLES[0]][:n_ids], n)}

    def _rows(self, ids: list[int], n: int) -> NDArray[np.float32]:
        model, first = self.model, len(ids) - n
        pairs = enumerate(zip(ids, self._ids, strict=False))
        n_same = next((i for i, (a, b) in pairs if a != b), min(len(ids), len(self._ids)))
        model.rewind(min(n_same, first))
        for start in range(model.n_past, first, model.n_batch):
            model.decode(ids[start : min(start + model.n_batch, first)])
        self._ids = ids
        return model.decode(ids[first:], every_row=True)[:, : self._trio.n_vocab]

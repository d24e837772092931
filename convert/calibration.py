"""An importance matrix of a model, from text in the language that it is for.

The text goes through the model in chunks, as through llama.cpp's own tools/imatrix. All rows of a
chunk count: where no logits are asked for, llama.cpp skips most of the last layer.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np

from trimix_gguf.errors import ConversionError
from trimix_gguf.machine.gguf_file import GGUFFile, read_gguf
from trimix_gguf.machine.loading import N_BATCH, Loading
from trimix_gguf.machine.packed import damage, open_unpacked
from trimix_gguf.machine.products import Watch
from trimix_gguf.machine.threads import run_all
from trimix_gguf.trio.model import Model

from .imatrix import ImportanceMatrix, layer_matrices, write_imatrix
from .output import refuse_input, whole_output

N_TOKENS = 65536  # 128 chunks, about what usual calibration texts hold
N_CTX = 512
_BLOCK = 1 << 16  # characters that are tokenized at once, about; whole lines
Progress = Callable[[int, int], None]  # tokens read, tokens in all


class Stopped(KeyboardInterrupt):
    """Ctrl-C came: what was read until then is written."""


def calibrate(
    model: Path,
    texts: Sequence[Path],
    out: Path,
    *,
    lora: Path | None = None,
    n_tokens: int = N_TOKENS,
    n_ctx: int = N_CTX,
    n_threads: int = 0,
    force: bool = False,
    progress: Progress | None = None,
) -> ImportanceMatrix:
    """Write the importance matrix of `model`, with an adapter if one is given, to `out`.

    Reads the first `n_tokens`, in equal parts from each text, in chunks of `n_ctx`. On Ctrl-C
    raises Stopped once `out` holds what was read; before the first chunk ends, nothing is written.
    A run that is killed leaves nothing, and starts again. Raises ConversionError, ModelFileError,
    ModelError.
    """
    refuse_input(out, model, *texts, *([] if lora is None else [lora]))
    file = read_gguf(model)
    matrices = layer_matrices(file)
    _check(file, n_ctx, n_matrices=len(matrices))
    result = ImportanceMatrix([text.name for text in texts], n_ctx)
    for name, shape in matrices.items():
        result.sums[name], result.counts[name] = np.zeros(shape), np.zeros(shape[0], np.int64)
    n_bytes = sum(4 * sums.size + 256 for sums in result.sums.values())
    batch = min(n_ctx, N_BATCH)
    loading = Loading(n_ctx=n_ctx, n_window=batch, n_batch=batch, n_threads=n_threads)
    stopped = False
    with whole_output(out, n_bytes=n_bytes, force=force) as partial:
        watch = Watch(result.sums, result.add)
        with closing(Model(model, loading, lora=lora, watch=watch)) as opened:
            share = -(-n_tokens // len(texts))
            ids = [i for text in texts for i in _ids(opened, text, share)]
            chunks = _chunks(ids[:n_tokens], n_ctx, opened.bos)
            try:
                for i, chunk in enumerate(chunks):
                    _read(opened, watch, chunk)
                    result.n_chunks = i + 1
                    if progress is not None:
                        progress((i + 1) * n_ctx, len(chunks) * n_ctx)
            except KeyboardInterrupt:
                if not result.n_chunks:
                    raise
                stopped = True
        _drop_unseen(result)
        write_imatrix(result, partial)
    if stopped:
        raise Stopped(f"stopped: {out} holds {result.n_chunks} of {len(chunks)} chunks")
    return result


def _check(file: GGUFFile, n_ctx: int, n_matrices: int) -> None:
    if file.metadata.get("general.type") == "adapter" or not n_matrices:
        raise ConversionError(f"{file.path} is not a whole model; give its base, and it as --lora")
    if n_ctx > file.n_ctx_train:
        raise ConversionError(
            f"{file.path} was trained on texts of {file.n_ctx_train} tokens, fewer than the "
            f"{n_ctx} of a chunk; give a smaller --ctx"
        )


def _ids(model: Model, text: Path, n_tokens: int) -> list[int]:
    """The first `n_tokens` of a text; raises ConversionError where it cannot be read."""
    ids: list[int] = []
    try:
        for block in _blocks(text):
            ids += model.tokenize(model.normalize(block))
            if len(ids) >= n_tokens:
                break
    except UnicodeDecodeError:
        raise ConversionError(f"{text} is not UTF-8; save it as UTF-8 and try again") from None
    except damage(text) as error:
        raise ConversionError(f"{text} cannot be read: {error}") from None
    return ids[:n_tokens]


def _blocks(text: Path) -> Iterator[str]:
    """A text in blocks of whole lines, unpacked where it is packed."""
    with ExitStack() as stack:
        lines = io.TextIOWrapper(open_unpacked(text, stack), encoding="utf-8-sig", newline="")
        while block := "".join(lines.readlines(_BLOCK)):
            yield block


def _chunks(ids: list[int], n_ctx: int, bos: list[int]) -> list[list[int]]:
    """`ids` in whole chunks, as llama.cpp cuts them; BOS takes the place of a later one's first."""
    if len(bos) + len(ids) < n_ctx:
        raise ConversionError(
            f"the text has {len(ids)} tokens, fewer than the {n_ctx} of one chunk; give more "
            "text, or a smaller --ctx"
        )
    ids = [*bos, *ids]
    whole = [ids[i : i + n_ctx] for i in range(0, len(ids) - n_ctx + 1, n_ctx)]
    return [[*bos, *chunk[len(bos) :]] for chunk in whole]


def _read(model: Model, watch: Watch, chunk: list[int]) -> None:
    """Read one chunk. On another thread: Ctrl-C inside of llama.cpp's callback would be lost."""
    model.rewind(0)
    with ThreadPoolExecutor(1) as pool:
        for i in range(0, len(chunk), model.n_batch):
            part = chunk[i : i + model.n_batch]
            run_all(pool, lambda part: model.decode(part, every_row=True), [part], aside=True)
            watch.check()


def _drop_unseen(result: ImportanceMatrix) -> None:
    """Leave out what is no product in this model's graph, such as convolutions."""
    for name in [name for name, counts in result.counts.items() if not counts.any()]:
        del result.sums[name], result.counts[name]

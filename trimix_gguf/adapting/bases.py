"""The small model that is taught: as GGUF for its tokens, and as PyTorch for its training."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimix_gguf.adapting.extras import need, quiet
from trimix_gguf.errors import ConversionError, TrioFileError
from trimix_gguf.machine.gguf_file import GGUFFile, read_gguf
from trimix_gguf.machine.loading import Loading
from trimix_gguf.machine.vocabulary import check_contract
from trimix_gguf.trio.model import Model
from trimix_gguf.trios.triofile import TrioFile

LONGEST_BLOCK = 512  # tokens of a row: most exercises fit whole
# A text whose tokens stand for English: what a vocabulary made for English does best.
ENGLISH = (
    "The town lies on both banks of the river, which is crossed by three bridges. Every autumn "
    "the farmers of the valley bring apples, grain and wool to the market, and traders come from "
    "far away to buy them. In winter the road over the mountains is closed for several weeks, so "
    "people store food and wood in good time. Most children go to the school next to the old "
    "library, where they learn to read and write before they are seven years old."
)


@dataclass(frozen=True)
class Base:
    """`gguf` is what the trio runs; `folder` has the same model for PyTorch, if it came so."""

    gguf: Path
    folder: Path | None = None

    @property
    def file(self) -> GGUFFile:
        """The header of the GGUF."""
        return read_gguf(self.gguf)

    @property
    def n_parameters(self) -> int:
        """Numbers in its tensors."""
        total = 0
        for tensor in self.file.tensors:
            n = 1
            for size in tensor.shape:
                n *= size
            total += n
        return total

    @property
    def n_block(self) -> int:
        """Tokens of a row of training."""
        return min(LONGEST_BLOCK, self.file.n_ctx_train)


def find_base(trio: TrioFile, given: Path | None, work: Path, *, alone: bool = False) -> Base:
    """The small_base of a trio, or `given` in its place: a GGUF, or a folder that is converted.

    Raises ConversionError, and VocabularyMismatch where it does not go with the trio's large_ins,
    unless it is to stand alone.
    """
    base = Base(trio.path("small_base"))
    if given is not None and given.is_dir():
        if not (given / "config.json").is_file():
            raise ConversionError(f"{given} has no config.json; give the folder of a checkpoint")
        from trimix_gguf.convert.hf import convert_hf

        base = Base(work / "small_base.gguf", given)
        if not base.gguf.is_file():
            convert_hf(given, base.gguf)
    elif given is not None:
        base = Base(given)
    if not alone:
        large_ins = read_gguf(trio.path("large_ins"))
        check_contract({"large_ins": large_ins, "small_base": read_gguf(base.gguf)})
    if trio.models["small_base"].adapter_of is not None:
        raise TrioFileError(f"{trio.file}: small_base is an adapter; give --base a whole model")
    return base


class Tokenizer:
    """llama.cpp's, as the trio will use it."""

    def __init__(self, model: Model) -> None:
        self._model = model
        ends = model.file.metadata.get("tokenizer.ggml.eos_token_id")
        self.end = int(ends) if ends is not None else min(model.end_of_generation())
        self.bos = model.bos

    def ids(self, text: str) -> list[int]:
        """Token ids, control tokens read as text."""
        return self._model.tokenize(self._model.normalize(text))


@contextmanager
def tokenizer_of(base: Base) -> Iterator[Tokenizer]:
    """The base's tokenizer; its weights are only mapped."""
    model = Model(base.gguf, Loading(n_ctx=8, n_window=1, n_batch=8, mmap=True, n_threads=1))
    try:
        yield Tokenizer(model)
    finally:
        model.close()


def load_base(base: Base, dtype: str) -> Any:
    """The base as a transformers model, on the CPU; a GGUF is dequantized.

    `dtype` is a name in torch. Raises ConversionError for a family that transformers cannot read.
    """
    torch, transformers = need("torch"), need("transformers")
    transformers.utils.logging.disable_progress_bar()
    options: dict[str, Any] = {"dtype": getattr(torch, dtype)}
    source = base.folder
    if source is None:
        source = base.gguf.parent
        options["gguf_file"] = base.gguf.name
        if hasattr(transformers, "GgufConfig"):  # since 5.2: weights stay packed otherwise
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        with quiet():
            model = transformers.AutoModelForCausalLM.from_pretrained(
                str(source), local_files_only=True, **options
            )
    except (ValueError, KeyError, OSError) as error:
        raise ConversionError(
            f"transformers cannot read {base.gguf if base.folder is None else source} "
            f"({' '.join(str(error).split())[:160]}); give --base the folder of its checkpoint"
        ) from None
    model.hf_quantizer = None  # it was dequantized in loading; else it cannot be saved
    model.config.__dict__.pop("quantization_config", None)
    model.config.architectures = [type(model).__name__]
    return model


def write_config(model: Any, folder: Path) -> None:
    """config.json of a model: what a conversion reads of a base."""
    folder.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"]

"""The small model that is taught: as GGUF for its tokens, and as PyTorch for its training."""

import os
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trimix_gguf.adapting.extras import need, quiet
from trimix_gguf.errors import ConversionError, ModelFileError
from trimix_gguf.machine import native
from trimix_gguf.machine.gguf_file import GGUFFile, read_gguf
from trimix_gguf.machine.loading import Loading
from trimix_gguf.machine.native import lib
from trimix_gguf.machine.parts import parts_of
from trimix_gguf.machine.typed_json import parse
from trimix_gguf.machine.vocabulary import check_contract
from trimix_gguf.trio.model import Model
from trimix_gguf.trios.triofile import TrioFile

LONGEST_BLOCK = 512  # tokens of a row: most exercises fit whole
MOST_APART = 0.3  # nats a token on average; files of 4 bits were 0.02 to 0.08 apart
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
    def is_tied(self) -> bool:
        """Whether the embeddings are the output layer as well."""
        return all(tensor.name != "output.weight" for tensor in self.file.tensors)

    @property
    def n_block(self) -> int:
        """Tokens of a row of training."""
        return min(LONGEST_BLOCK, self.file.n_ctx_train)


def find_base(trio: TrioFile, given: Path | None, work: Path, *, alone: bool = False) -> Base:
    """The small_base of a trio, or `given` in its place: a GGUF, or a folder that is converted.

    Raises ConversionError, and VocabularyMismatch where it does not go with the trio's large_ins,
    unless it is to stand alone.
    """
    base = given_base(given or trio.path("small_base"), work / "small_base.gguf")
    if not alone:
        large_ins = read_gguf(trio.path("large_ins"))
        check_contract({"large_ins": large_ins, "small_base": read_gguf(base.gguf)})
    return base


def given_base(given: Path, converted: Path) -> Base:
    """A model that a user gives: a GGUF, or a folder, of which `converted` is made."""
    if not given.is_dir():
        if (n := len(parts_of(given))) > 1:  # transformers would read the first one only
            raise ConversionError(
                f"{given} is one of {n} files, and a model that is taught has to be in one; give "
                "--base the folder of its checkpoint, or join them: llama-gguf-split --merge"
            )
        return Base(given)
    if not (given / "config.json").is_file():
        raise ConversionError(f"{given} has no config.json; give the folder of a checkpoint")
    from trimix_gguf.convert.hf import convert_hf

    if not converted.is_file():
        convert_hf(given, converted)
    return Base(converted, given)


class Tokenizer:
    """llama.cpp's, as the trio will use it; no weights are loaded for it."""

    def __init__(self, base: Base) -> None:
        params = lib.llama_model_default_params()
        params.vocab_only = True
        native.listen()
        handle = lib.llama_model_load_from_file(os.fsencode(base.gguf), params)
        if not handle:
            raise ModelFileError(f"{base.gguf}: llama.cpp cannot load it: {native.last_error()}")
        weakref.finalize(self, lib.llama_model_free, handle)
        self._vocab = lib.llama_model_get_vocab(handle)
        self.end = int(lib.llama_vocab_eos(self._vocab))
        adds_bos = lib.llama_vocab_get_add_bos(self._vocab)
        self.bos = [int(lib.llama_vocab_bos(self._vocab))] if adds_bos else []

    def ids(self, text: str) -> list[int]:
        """Token ids of a text in NFC; control tokens are read as text."""
        return native.tokenize(self._vocab, text, special=False)


def load_base(base: Base, dtype: str) -> Any:
    """The base as a transformers model, on the CPU; a GGUF is dequantized.

    `dtype` is a name in torch. Raises ConversionError for a family that transformers cannot read.
    """
    torch, transformers = need("torch"), need("transformers")
    transformers.utils.logging.disable_progress_bar()
    options: dict[str, Any] = {"dtype": getattr(torch, dtype)}
    source, name = base.folder, base.folder or base.gguf
    if source is None:
        source = base.gguf.parent
        options["gguf_file"] = base.gguf.name
        if hasattr(transformers, "GgufConfig"):  # since 5.2: weights stay packed otherwise
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        with quiet():
            model, found = transformers.AutoModelForCausalLM.from_pretrained(
                str(source), local_files_only=True, output_loading_info=True, **options
            )
    except (ValueError, KeyError, OSError, RuntimeError) as error:
        raise ConversionError(
            f"transformers cannot read {name} "
            f"({' '.join(str(error).split())[:160]}); give --base the folder of its checkpoint"
        ) from None
    if absent := found["missing_keys"]:  # transformers makes them up
        raise ConversionError(
            f"{name} lacks {len(absent)} tensors by transformers' names, such as {min(absent)}; "
            "give --base the folder of its checkpoint"
        )
    if model.config.get_text_config() is not model.config:
        raise ConversionError(
            f"{name} is a model for more than text, which cannot be taught; make a GGUF of it "
            "with `trimix convert hf`, and give that as --base"
        )
    model.hf_quantizer = None  # it was dequantized in loading; else it cannot be saved
    model.config.__dict__.pop("quantization_config", None)
    model.config.architectures = [type(model).__name__]
    return model


def check_alike(model: Any, base: Base, tokenizer: Tokenizer, dtype: str) -> None:
    """Raise ConversionError where `model`, of load_base(), is not what llama.cpp runs.

    Of a GGUF transformers may leave out what it does not know, such as a scaling of RoPE or biases.
    """
    torch, ids = need("torch"), tokenizer.ids(ENGLISH)[: base.n_block]
    running = Model(base.gguf, Loading(n_ctx=len(ids) + 1, mmap=True), tokenizer=False)
    try:
        parts = [ids[at : at + running.n_window] for at in range(0, len(ids), running.n_window)]
        # Copies: llama.cpp reuses the rows on the next decode.
        theirs = np.concatenate([running.decode(part, every_row=True).copy() for part in parts])
    finally:
        running.close()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        ours = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()
    nlls = [
        torch.nn.functional.cross_entropy(rows[:-1], torch.tensor(ids[1:]), reduction="none")
        for rows in (torch.from_numpy(theirs), ours)
    ]
    if (apart := float((nlls[0] - nlls[1]).abs().mean())) > MOST_APART:
        raise ConversionError(
            f"transformers computes {base.folder or base.gguf} otherwise than llama.cpp does, by "
            f"{apart:.1f} nats a token: it leaves out a part of the model; give --base "
            f"{'another model' if base.folder else 'the folder of its checkpoint'}"
        )


def write_config(model: Any, folder: Path) -> None:
    """config.json of a model: what a conversion reads of a base."""
    folder.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(folder)
    assert parse((folder / "config.json").read_text(encoding="utf-8"), {})["architectures"]

"""The taught model as files that a trio runs: an adapter over small_base, or a whole model."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from trimix_gguf.adapting.bases import Base, write_config
from trimix_gguf.adapting.extras import need, quiet
from trimix_gguf.adapting.taught import inner_model
from trimix_gguf.machine.files import put_in_place, write_text
from trimix_gguf.trios.store import installed_folder, temporary_folder, trios_folder
from trimix_gguf.trios.triofile import ModelEntry, TrioFile

ADAPTER, MODEL = "small_cpt_lora.gguf", "small_cpt.gguf"


def try_out(model: Any, work: Path, *, whole: bool) -> None:
    """Raise ConversionError for a model whose result could not be written after its training."""
    from trimix_gguf.convert.architectures import read_config, read_sizes

    write_config(inner_model(model), work / "base")
    read_sizes(*read_config(work / "base"))
    if not whole:
        write_adapter(model, work, work / ADAPTER)


def write_adapter(model: Any, work: Path, out: Path) -> None:
    """The PEFT pairs of a model as a GGUF adapter, and as PEFT's own folder in `work`."""
    from trimix_gguf.convert.lora import convert_lora

    write_config(inner_model(model), work / "base")
    with quiet():
        model.save_pretrained(work / "adapter", save_embedding_layers=False)
    convert_lora(work / "adapter", work / "base", out, force=True)


def merged(model: Any) -> Any:
    """A model in float32, its pairs merged where it has some (`model` is used up)."""
    model = model.to(need("torch").float32)  # else the sums would be rounded twice
    if not hasattr(model, "merge_and_unload"):
        return model
    with quiet():  # PEFT warns of a tied head, which has followed the embeddings all along
        return model.merge_and_unload()


def write_model(model: Any, base: Base, work: Path, out: Path, *, type: str = "q8_0") -> None:
    """A whole model as GGUF."""
    from trimix_gguf.convert.hf import convert_hf
    from trimix_gguf.convert.regraft import regraft

    folder = work / "merged"
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    if base.folder is None:
        regraft(base.gguf, folder, out, type=type, force=True)
    else:
        for file in base.folder.iterdir():  # tokenizer and its settings
            if file.is_file() and "safetensors" not in file.name and file.name != "config.json":
                shutil.copy(file, folder)
        convert_hf(folder, out, type=type, force=True)
    shutil.rmtree(folder)


def install(
    name: str,
    trio: TrioFile,
    base: Base,
    made: dict[str, Path],
    *,
    language: str | None,
    description: str,
) -> TrioFile:
    """A trio of that name in the store: the files of `made` are moved there, whole or not at all.

    large_ins, and small_base unless the base was converted for this, stay where they are.
    """
    trios_folder().mkdir(parents=True, exist_ok=True)
    hidden = temporary_folder("import", name)
    hidden.mkdir()
    for file in made.values():
        shutil.move(file, hidden / file.name)
    models = {"large_ins": _elsewhere(trio, "large_ins")}
    if MODEL in {file.name for file in made.values()}:
        models["small_cpt"] = ModelEntry(path=MODEL)
    if ADAPTER in {file.name for file in made.values()}:
        models["small_cpt"] = ModelEntry(path=ADAPTER, adapter_of="small_base")
    if "small_base" in made:
        models["small_base"] = ModelEntry(path=made["small_base"].name)
    elif base.gguf == trio.path("small_base"):
        models["small_base"] = _elsewhere(trio, "small_base")
    else:
        models["small_base"] = ModelEntry(path=_path(base.gguf))
    made_trio = TrioFile(
        folder=hidden,
        name=name,
        models=models,
        languages=(language,) if language else (),
        description=description,
        n_ctx=trio.n_ctx,
        chat_template=trio.chat_template,
    )
    made_trio.write()
    put_in_place(hidden, installed_folder(name))
    return replace(made_trio, folder=installed_folder(name))


def keep(trio: TrioFile, name: str, text: str) -> None:
    """Write a small text into a trio's folder."""
    write_text(trio.folder / name, text)


def _elsewhere(trio: TrioFile, role: str) -> ModelEntry:
    """A trio's model, by its path from anywhere."""
    return replace(trio.models[role], path=_path(trio.path(role)))


def _path(file: Path) -> str:
    return os.path.abspath(file).replace(os.sep, "/")

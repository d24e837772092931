"""Do three GGUF files make a trio? Everything that can be told without running them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gguf import LlamaFileType

from trimix_gguf.errors import ModelFileError, VocabularyMismatch
from trimix_gguf.machine import file_trial, memory, native
from trimix_gguf.machine.file_trial import FileTrial
from trimix_gguf.machine.gguf_file import GGUFFile, read_gguf
from trimix_gguf.machine.loading import N_CTX, Loading
from trimix_gguf.machine.vocabulary import check_contract
from trimix_gguf.roles import Role

# Sentences in the scripts that the method is for, and in English.
PROBES = {
    "Cyrillic (Kazakh)": "Барлық адамдар тумысынан азат және қадір-қасиеті тең.",
    "Arabic (Uyghur)": "ھەممە ئادەم زانىدىنلا ئەركىن، ئىززەت-ھۆرمەتتە باپباراۋەر.",
    "Tibetan": "འགྲོ་བ་མིའི་རིགས་རྒྱུད་ཡོངས་ལ་སྐྱེས་ཙམ་ཉིད་ནས་རང་དབང་ཡོད།",
    "Mongolian": "ᠬᠦᠮᠦᠨ ᠪᠦᠷ ᠲᠥᠷᠥᠵᠦ ᠮᠡᠨᠳᠡᠯᠡᠬᠦ ᠡᠷᠬᠡ ᠴᠢᠯᠥᠭᠡ ᠲᠡᠢ᠃",
    "Bengali": "সমস্ত মানুষ স্বাধীনভাবে সমান মর্যাদা এবং অধিকার নিয়ে জন্মগ্রহণ করে।",
    "Tamil": "மனிதப் பிறவியினர் சகலரும் சுதந்திரமாகவே பிறக்கின்றனர்.",
    "Telugu": "ప్రతిపత్తిస్వత్వముల విషయమున మానవులెల్లరును జన్మతః స్వతంత్రులు.",
    "Odia": "ସମସ୍ତ ମନୁଷ୍ୟ ଜନ୍ମକାଳରୁ ସ୍ୱାଧୀନ ଏବଂ ମର୍ଯ୍ୟାଦାରେ ସମାନ।",
    "Latin (English)": "All human beings are born free and equal in dignity and rights.",
}


def check_trio(
    *, large_ins: Path, small_cpt: Path, small_base: Path, n_ctx: int = N_CTX
) -> dict[str, Any]:
    """What the three files are, share and need; `small_cpt` may be an adapter over `small_base`.

    Keys: models (one object per role), n_common ids, n_ctx_max, tokens_per_character by script,
    memory (bytes, and whether they fit), notes (lines worth reading that stop nothing). Raises
    ModelFileError, VocabularyMismatch with the first thing that is wrong.
    """
    paths: dict[Role, Path] = {
        "large_ins": large_ins,
        "small_cpt": small_cpt,
        "small_base": small_base,
    }
    files = {role: read_gguf(path) for role, path in paths.items()}
    adapter = None
    if files["small_cpt"].metadata.get("general.type") == "adapter":
        adapter, files["small_cpt"] = files["small_cpt"], files["small_base"]
        _check_adapter(adapter, files["small_base"])
    n_common = check_contract(files)
    _check_sizes(files)
    loading = Loading(n_ctx=n_ctx)
    need = memory.estimate(memory.Models(files, dict.fromkeys(files, loading), adapter))
    free = memory.available()
    fits = sum(need.values()) <= free
    trials = [FileTrial(file.path, loading, decode=fits) for file in files.values()]
    if adapter is not None and fits:
        trials.append(FileTrial(small_base, loading, lora=adapter.path))
    file_trial.require(trials)
    models = {role: _describe(file) for role, file in files.items()}
    if adapter is not None:
        models["small_cpt"] |= {"file": small_cpt.name, "type": "adapter"}
    return {
        "models": models,
        "n_common": n_common,
        "n_ctx_max": min(file.n_ctx_train for file in files.values()),
        "tokens_per_character": _probe(files),
        "memory": {
            "n_ctx": n_ctx,
            **need,
            "needed": sum(need.values()),
            "free": free,
            "fits": fits,
        },
        "notes": _notes(files, n_ctx),
    }


def _describe(file: GGUFFile) -> dict[str, Any]:
    types = {int(t): t.name.lower().removeprefix("mostly_") for t in LlamaFileType}
    return {
        "file": file.path.name,
        "architecture": file.architecture,
        "type": types.get(file.metadata.get("general.file_type", -1), "?"),
        "n_parameters": file.n_weights,
        "n_ctx_train": file.n_ctx_train,
        "n_vocab": len(file.array("tokenizer.ggml.tokens") or ()),
        "bytes": file.file_size,
    }


def _check_adapter(adapter: GGUFFile, base: GGUFFile) -> None:
    shapes = {tensor.name: tensor.shape for tensor in base.tensors}
    for tensor in adapter.tensors:
        target, _, part = tensor.name.rpartition(".lora_")
        # Shapes are innermost first: A reads the base's input, B writes its output. Of embeddings,
        # llama.cpp looks up rows of A: one for each token.
        own, its = (0, 0) if part == "a" else (1, 1)
        if target == "token_embd.weight":
            own, its = (1, 1) if part == "a" else (1, 0)
        if target not in shapes or tensor.shape[own] != shapes[target][its]:
            expected = f"of {list(shapes[target])}" if target in shapes else "that is not there"
            raise ModelFileError(
                f"{adapter.path}: adapts {target} {expected} in {base.path.name}, with "
                f"{list(tensor.shape)}; convert it with the base it was trained on"
            )


def _check_sizes(files: dict[Role, GGUFFile]) -> None:
    large, cpt, base = (files[role] for role in ("large_ins", "small_cpt", "small_base"))
    for what in ("architecture", "n_embd", "n_layer"):
        if getattr(cpt, what) != getattr(base, what):
            raise ModelFileError(
                f"{cpt.path}: {what} is {getattr(cpt, what)} but {getattr(base, what)} in "
                f"{base.path.name}; small_cpt must be small_base after more training"
            )
    if large.n_weights < base.n_weights:
        raise ModelFileError(
            f"{large.path}: smaller than {base.path.name}; give the large model first, "
            "then small_base, then small_cpt"
        )


def _probe(files: dict[Role, GGUFFile]) -> dict[str, float]:
    """Tokens a character of each probe, having seen that all models cut them alike."""
    texts = list(PROBES.values())
    ids = {role: native.tokenize_texts(str(f.path), texts) for role, f in files.items()}
    for i, script in enumerate(PROBES):
        for role in files:
            if ids[role][i] != ids["large_ins"][i]:
                raise VocabularyMismatch(
                    f"{role} and large_ins cut {script} text differently; "
                    "convert both with one tokenizer"
                )
    return {s: len(ids["large_ins"][i]) / len(text) for i, (s, text) in enumerate(PROBES.items())}


def _notes(files: dict[Role, GGUFFile], n_ctx: int) -> list[str]:
    notes = []
    large, base = files["large_ins"], files["small_base"]
    if large.architecture != base.architecture:
        notes.append(f"large_ins is a {large.architecture}, the small models {base.architecture}")
    if "tokenizer.chat_template" not in large.metadata:
        notes.append("large_ins has no chat template: is it an instruct model?")
    notes += [
        f"{role} was trained for {file.n_ctx_train} tokens, fewer than {n_ctx}"
        for role, file in files.items()
        if file.n_ctx_train < n_ctx
    ]
    return notes

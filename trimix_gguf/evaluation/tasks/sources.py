"""Where the tasks' files come from, and the names of their languages.

A file is looked for in the data folder, then in the Hugging Face cache, then on the hub. Once it
is there, it is read without a network.
"""

import contextlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from trimix_gguf.errors import DataError

FLORES_CODES = {
    "kk": "kaz_Cyrl",
    "ug": "uig_Arab",
    "bo": "bod_Tibt",
    "mn": "khk_Cyrl",
    "bn": "ben_Beng",
    "ta": "tam_Taml",
    "te": "tel_Telu",
    "or": "ory_Orya",
    "en": "eng_Latn",
}
LANGUAGE_NAMES = {
    "kk": "Kazakh",
    "ug": "Uyghur",
    "bo": "Tibetan",
    "mn": "Mongolian",
    "bn": "Bengali",
    "ta": "Tamil",
    "te": "Telugu",
    "or": "Odia",
    "en": "English",
}


@dataclass(frozen=True)
class HubFile:
    """A file in a dataset repository of the Hugging Face hub."""

    repo: str
    filename: str


def find(
    data: Path,
    relative: str,
    *,
    hub: HubFile | None = None,
    mend: str = "put it there, or name the folder that has it",
) -> Path:
    """The path of `relative` in `data`, else of `hub`'s file.

    Raises DataError with `mend` if there is neither.
    """
    path = data / relative
    if path.is_file():
        return path
    absent = f"there is no {relative} in {data}"
    if hub is None:
        raise DataError(f"{absent}; {mend}")
    return _fetch(hub, absent, mend)


def _fetch(hub: HubFile, absent: str, mend: str) -> Path:
    # Here, not above: a report reads tasks, and trios.hub imports llama.cpp.
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import LocalEntryNotFoundError

    from trimix_gguf.trios.hub import client_errors, explain

    download = partial(hf_hub_download, hub.repo, hub.filename, repo_type="dataset")
    with contextlib.suppress(LocalEntryNotFoundError):  # not cached yet
        return Path(download(local_files_only=True))
    try:
        if not constants.HF_HUB_OFFLINE:
            # Once: where no hub answers, hf_hub_download tries and warns for half a minute.
            get_hf_file_metadata(hf_hub_url(hub.repo, hub.filename, repo_type="dataset"))
        return Path(download())
    except client_errors() as error:
        why = explain(error, f"https://huggingface.co/datasets/{hub.repo}")
    raise DataError(f"{absent}, nor {hub.filename} of {hub.repo} ({why}); or {mend}")

"""Trios of several languages over the same large_ins and small_base: an adapter each."""

import pytest
from person import adapter_folder
from served import ENDLESS

from trimix_gguf.roles import ROLES
from trimix_gguf.trios.triofile import ModelEntry, TrioFile

CODES = ("kk", "ug", "bo")
QUESTIONS = {
    "kk": "Қазақстанның астанасы қай қала?",
    "ug": "بۈگۈن ھاۋا قانداق؟",
    "bo": "བོད་ཀྱི་རྒྱལ་ས་གང་ཡིན།",
}


@pytest.fixture(scope="session")
def languages(tmp_path_factory, nano_files, checkpoint):
    """Code -> folder of a trio whose small_cpt is an adapter of its own."""
    from trimix_gguf.convert.lora import convert_lora

    folders = {}
    for seed, code in enumerate(CODES):
        folder = folders[code] = tmp_path_factory.mktemp("trios") / f"nano-{code}"
        folder.mkdir()
        convert_lora(
            adapter_folder(folder / "peft", seed, tuple(range(5))), checkpoint, folder / "lora.gguf"
        )
        models = {role: ModelEntry(path=str(nano_files[role])) for role in ROLES}
        models["small_cpt"] = ModelEntry(path="lora.gguf", adapter_of="small_base")
        about = {} if code == CODES[0] else {"description": f"Үштік: {code}"}
        TrioFile(folder, f"nano-{code}", models, languages=(code,), n_ctx=512, **about).write()
    return folders


@pytest.fixture(scope="session")
def strangers(tmp_path_factory, nano_files):
    """Name -> folder of a trio that has its large_ins for itself."""
    folders = {}
    for name, large in {"one": "small_cpt", "two": "small_base"}.items():
        folder = folders[name] = tmp_path_factory.mktemp("trios") / name
        folder.mkdir()
        models = {role: ModelEntry(path=str(nano_files[role])) for role in ROLES}
        models["large_ins"] = ModelEntry(path=str(nano_files[large]))
        TrioFile(folder, name, models, n_ctx=512).write()
    return folders


def options(folders):
    """--trio for each."""
    return [word for folder in folders for word in ("--trio", folder)]


def ask(served, model, question, **more):
    """The JSON of a greedy chat answer that must succeed."""
    body = {"messages": [{"role": "user", "content": question}], "temperature": 0}
    body |= {"max_tokens": 24, "trimix": {"weights": [0.2, 0.8]}, **ENDLESS, **more}
    body |= {} if model is None else {"model": model}
    response = served.post("/v1/chat/completions", body)
    assert response.status_code == 200, response.text
    return response.json()


def text_of(answer):
    return answer["choices"][0]["message"]["content"]

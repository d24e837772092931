"""Text that a small model learns in a minute, and `trimix adapt` in this process."""

import json
import random

import pytest
from click.testing import CliRunner

from trimix_gguf.cli import trimix as program

VERBS = ("қарады", "көрді", "айтты", "жазды", "ашты", "жапты", "алды", "берді", "оқыды", "салды")
NOUNS = ("үкімет", "мектеп", "бала", "дәрігер", "мұғалім", "қала", "ауыл", "кітап", "заң", "жол")
TIMES = ("бүгін", "кеше", "ертең", "былтыр", "жазда", "қыста", "күзде", "көктемде")
PLACES = ("Алматыда", "Астанада", "Шымкентте", "Атырауда", "Семейде", "Таразда", "Ақтөбеде")


def kazakh(n_documents=60, n_sentences=24):
    """Simple sentences, so that a small model learns them in a minute; no two documents alike."""
    rng = random.Random(5)
    for _ in range(n_documents):
        lines = []
        for _ in range(n_sentences):
            words = [rng.choice(part) for part in (TIMES, PLACES, NOUNS, NOUNS)]
            lines.append(f"{' '.join(words)} туралы {rng.randint(2, 999)} рет {rng.choice(VERBS)}.")
        yield "\n".join(lines)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "kazakh.jsonl"
    lines = [json.dumps({"text": text}) for text in kazakh()]
    file.write_text("\n".join(lines), encoding="utf-8")
    return file


@pytest.fixture
def adapt(monkeypatch, tmp_path):
    """Run `trimix adapt` in this process, in a home of its own."""
    monkeypatch.setenv("TRIMIX_HOME", str(tmp_path / "home"))

    def run(*words):
        return CliRunner().invoke(program, ["adapt", *map(str, words)])

    return run


@pytest.fixture
def with_torch():
    for name in ("torch", "transformers", "peft", "accelerate"):
        pytest.importorskip(name, reason="needs PyTorch: pip install -e '.[adapt]'")

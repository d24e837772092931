"""Shared fixtures: the shipped trio, a runner for the CLI, and where the real models are."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from browser import browser
from huggingface_hub import constants
from measured_matrix import measured  # noqa: F401  # a fixture
from zero_checkpoint import folder  # noqa: F401  # a fixture

from trimix_gguf import Trio
from trimix_gguf.trio.trio import NANO

# Threads that wait sleep: where other work runs beside the suite, those that spin take its cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if n_workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # more threads than cores are slower
    limit = max(1, (os.cpu_count() or 1) // int(n_workers))
    os.environ.setdefault("OMP_THREAD_LIMIT", str(limit))
pytest_plugins = ["person", "small_trio", "languages", "raw_text", "workers", "looping"]
ROOT = Path(__file__).parent.parent
REAL = Path(os.environ.get("TRIMIX_MODELS", Path.home() / ".cache" / "trimix-models"))
# A suite started in the background inherits an ignored Ctrl-C, and so would the commands it stops.
signal.signal(signal.SIGINT, signal.default_int_handler)

KAZAKH = "Қазақстан Республикасының Үкіметі бүгін жаңа заң жобасын қарады."


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Tests, and the commands that they run, leave the user's own cache and trios alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRIMIX_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("TRIMIX_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(scope="session")
def trio():
    with Trio.nano(n_threads=2) as opened:
        yield opened


@pytest.fixture(scope="session")
def real_files():
    """The 1.5B, 0.5B and adapter files; skips where they are not cached."""
    adapter = ROOT.parent / "shared" / "models" / "kk-cpt-lora-f16.gguf"
    files = {
        "large_ins": REAL / "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
        "small_base": REAL / "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
        "small_cpt_lora": Path(os.environ.get("TRIMIX_ADAPTER", adapter)),
    }
    for path in files.values():
        if not path.is_file():
            pytest.skip(f"real models are not cached here: {path.name}")
    return files


@pytest.fixture
def trimix():
    """Run the CLI as a user would: trimix(*arguments, stdin=…) -> CompletedProcess (bytes)."""

    def run(*arguments, stdin=b"", timeout=240):
        command = [sys.executable, "-m", "trimix_gguf.cli", *map(str, arguments)]
        return subprocess.run(command, input=stdin, capture_output=True, timeout=timeout)

    return run


@pytest.fixture(scope="module")
def window(tmp_path_factory):
    """A browser's window; the tests skip where there is none."""
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="session")
def nano_files():
    return {r: NANO / f"{r}.gguf" for r in ("large_ins", "small_base", "small_cpt")}


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def task_file(tmp_path):
    """A user's own task: topics of made-up Kazakh sentences."""
    sentences = {
        "спорт": ["Команда доп ойнады.", "Балуан жеңіске жетті.", "Жүгіруші рекорд жасады."],
        "саясат": ["Үкімет заң қабылдады.", "Президент сөз сөйледі.", "Сайлау өтті."],
        "денсаулық": ["Дәрігер науқасты емдеді.", "Аурухана ашылды.", "Вакцина егілді."],
    }
    rows = [{"instruction": "Classify the topic: спорт, саясат, денсаулық.", "language": "kk"}]
    for label, texts in sentences.items():
        for i, text in enumerate(texts):
            row = {"question": f"Text: {text}\nTopic:", "choices": list(sentences)}
            rows.append(row | {"answer": label} | ({"exemplar": True} if i == 0 else {}))
    path = tmp_path / "topics.jsonl"
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), "utf-8")
    return path


@pytest.fixture
def hub_cache(monkeypatch, tmp_path):
    """An empty cache and no network: a test that lacks its file fails at once."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"

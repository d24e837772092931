"""Where a task's data come from: a folder, the hub, a user's own file."""

import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
from made_tasks import load, prompt, write_all, write_jsonl, write_lines

from trimix_gguf.errors import DataError
from trimix_gguf.evaluation.names.settings import RunSettings
from trimix_gguf.evaluation.running.comparing import Comparison
from trimix_gguf.evaluation.tasks import custom_task
from trimix_gguf.evaluation.tasks.metrics import METRICS
from trimix_gguf.evaluation.tasks.sources import HubFile, find

pytestmark = pytest.mark.usefixtures("hub_cache")
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_all(tmp_path_factory.mktemp("data"))


# --- the hub ---

HUB_FILES = {
    "belebele": ("facebook/belebele", {"kaz_Cyrl.jsonl": "data/kaz_Cyrl.jsonl"}),
    "sib200": (
        "Davlan/sib200",
        {f"eval/kk/sib200/{p}.tsv": f"data/kaz_Cyrl/{p}.tsv" for p in ("train", "test")},
    ),
    "milic-to-en": (
        "pkupie/milic-eval",
        {
            f"data/translation_dialogue/ug/{p}.json": f"translation_dialogue/ug/{p}.json"
            for p in ("train_1", "test")
        },
    ),
}


def test_a_file_at_hand_is_not_asked_of_the_hub(data, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", None)
    assert load("belebele", "kk", data).examples


@pytest.mark.parametrize("name", HUB_FILES)
def test_a_file_in_the_hubs_cache_needs_no_network(name, data, hub_cache, tmp_path):
    lang = "ug" if name.startswith("milic") else "kk"
    repo, files = HUB_FILES[name]
    with pytest.raises(DataError) as caught:
        load(name, lang, tmp_path / "none")
    said = str(caught.value)
    assert "\n" not in said and f"in {tmp_path / 'none'}" in said and repo in said
    assert "it is not cached, and the hub does not answer: run once with a network" in said
    assert said.startswith("there is no ") and "put it there" in said
    folder = hub_cache / f"datasets--{repo.replace('/', '--')}"
    write_lines(folder / "refs" / "main", ["c0ffee"]).write_text("c0ffee")
    for local, remote in files.items():
        text = (data / local).read_text(encoding="utf-8")
        write_lines(folder / "snapshots" / "c0ffee" / remote, [text])
    assert load(name, lang, tmp_path / "none") == load(name, lang, data)


def test_a_set_of_no_known_repository_names_its_place(tmp_path):
    with pytest.raises(DataError, match=r"no eval/kk/tumlu/dev\.jsonl in .*; put it there"):
        load("tumlu", "kk", tmp_path)
    with pytest.raises(DataError, match=r"title_generation_200/ug/test.json in .*TriMix has it"):
        load("milic-title-generation", "ug", tmp_path)


class Hub(BaseHTTPRequestHandler):
    """The hub as far as a download sees it: one open file, one repository behind terms."""

    asked: list[str] = []

    def do_HEAD(self):  # noqa: N802
        self.asked.append(self.path)
        body = b'{"a": "x"}\n'
        if "/gated/" in self.path:
            self.send_response(403)
            self.send_header("X-Error-Code", "GatedRepo")
            body = b""
        elif self.path.endswith("/data/x.jsonl"):
            self.send_response(200)
            self.send_header("ETag", '"e7a6"')
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            body = b""
        self.send_header("X-Repo-Commit", "c0ffee" * 6 + "c0ff")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_GET = do_HEAD  # noqa: N815

    def log_message(self, *_):
        pass


FETCH = """
import sys
from pathlib import Path
from trimix_gguf.errors import DataError
from trimix_gguf.evaluation.tasks.rows import read_jsonl
from trimix_gguf.evaluation.tasks.sources import HubFile, find
for repo, name in (("open/set", "data/x.jsonl"), ("open/set", "data/y"), ("gated/set", "data/x")):
    try:
        print(read_jsonl(find(Path("here"), name, hub=HubFile(repo, name)), {"a": str})[0][1])
    except DataError as error:
        print(error)
"""


def test_the_hub_is_asked_once_and_its_refusals_are_told(tmp_path):
    """A hub of our own: a download, a missing file, a gated set; then the same once more."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    environment = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path)}
    environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
    outputs, n_asked = [], []
    try:
        for _ in range(2):
            run = subprocess.run(
                [sys.executable, "-c", FETCH],
                env=environment, capture_output=True, text=True, check=True, cwd=ROOT, timeout=60,
            )  # fmt: skip
            outputs.append(run.stdout.splitlines())
            n_asked.append(sum(path.endswith("x.jsonl") for path in Hub.asked))
    finally:
        server.shutdown()
        server.server_close()
    got, missing, gated = outputs[0]
    assert got == "{'a': 'x'}"
    assert "nor data/y of open/set (the hub has no such file)" in missing
    assert (
        "accept it at https://huggingface.co/datasets/gated/set, then run `hf auth login`" in gated
    )
    assert outputs[1] == outputs[0] and n_asked[0] == n_asked[1] > 0


def test_find_takes_the_folder_first(tmp_path):
    path = write_lines(tmp_path / "a" / "b.tsv", ["x"])
    assert find(tmp_path, "a/b.tsv", hub=HubFile("x/y", "z")) == path


# --- a user's own file ---


def test_a_custom_task(tmp_path):
    path = write_jsonl(
        tmp_path / "mine.jsonl",
        [
            {"instruction": "Answer in Kazakh.", "language": "kk", "n_exemplars": 1},
            {"question": "Қазақстан астанасы?", "answer": "Астана", "exemplar": True},
            {"question": "Абай кім?", "answer": "Ақын", "exemplar": True},
            {"question": "Ең ұзын өзен?", "answer": ["Ертіс", "Ертіс өзені"]},
        ],
    )
    task = custom_task(path)
    dataset = task.load(Path("nowhere"), "kk", 0)
    assert (task.name, task.languages, task.metrics) == ("mine", ("kk",), ("exact_match", "f1"))
    assert (task.n_exemplars, len(dataset.exemplars), task.max_tokens) == (1, 2, 64)
    assert dataset.examples[0].references == ("Ертіс", "Ертіс өзені")
    assert re.fullmatch(
        r"Answer in Kazakh\.\n\nQuestion: (Қазақстан астанасы\?\nAnswer: Астана"
        r"|Абай кім\?\nAnswer: Ақын)\n\nQuestion: Ең ұзын өзен\?\nAnswer:",
        prompt(task, dataset, dataset.examples[0]),
    )
    orders = {tuple(e.id for e in task.load(path, "kk", s).exemplars) for s in range(9)}
    assert orders == {("2", "3"), ("3", "2")}


def test_a_custom_task_with_choices(tmp_path):
    path = write_jsonl(
        tmp_path / "q.jsonl",
        [
            {"question": "2 + 2 = ?", "choices": ["3", "4"], "answer": "B"},
            {"question": "Which vitamin?", "choices": ["B", "A"], "answer": "A"},
        ],
    )
    task = custom_task(path)
    first, second = task.load(path, "und", 0).examples
    assert (task.metrics, task.max_tokens, task.n_exemplars) == (("accuracy",), 2, 0)
    assert first.question == "Question: 2 + 2 = ?\nA. 3\nB. 4\nAnswer:" and first.answer == "B"
    assert second.answer == "B"  # the text of a choice goes before a letter
    assert task.prediction(" b)", first.choices) == "B"


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"question": "a?"}], r"q\.jsonl:1: field 'answer' is missing; it has question"),
        ([{"question": "a?", "answer": []}], r":1: field 'answer' is missing"),
        ([{"question": "a?", "answer": 4}], r":1: field 'answer' should be a text or a list, got"),
        ([{"question": "a?", "answer": "x", "anwser": 1}], r":1: field 'anwser' is unknown; known"),
        ([{"question": "a?", "answer": "x", "exemplar": 1}], r"should be true or false, got a num"),
        ([{"question": "a?", "answer": "C", "choices": ["x", "y"]}], r"one of A, B; got 'C'"),
        ([{"question": "a?", "answer": "x", "exemplar": True}], r"no question to ask"),
        ([{"question": "a?", "answer": "A", "choices": ["x"] * 27}], r"at most 26"),
        ([{"metrics": ["bleurt"]}, {"question": "a?", "answer": "x"}],
         r"q\.jsonl:1: field 'metrics' should be one of accuracy, exact_match"),
        ([{"max_tokens": -1}, {"question": "a?", "answer": "x"}], r":1: field 'max_tokens' should"),
        ([{"question": "a?", "answer": "x"},
          {"question": "b?", "answer": "x", "choices": ["x"]}], r"some rows have choices"),
        ([{"instruction": "Answer."}], r"q\.jsonl has no question to ask"),
        ([{"max_tokens": 0}, {"question": "a?", "answer": "x"}], r"should be 1 or more, got 0"),
        ([{"question": " ", "answer": "x"}], r":1: field 'question' is missing"),
        ([{"question": "a?", "answer": ["x", "\n"]}], r":1: field 'answer' is missing"),
        ([{"question": "a?", "answer": [None]}], r":1: field 'answer' should be .*, got null"),
        ([{"question": "a?", "answer": "A", "choices": [["x"]]}], r"'choices' should be .* a list"),
        ([{"metrics": ["number"]}, {"question": "a?", "answer": ["4", "x"]}],
         r"q\.jsonl:2: metric 'number' compares numbers, and 'x' has none"),
        ([{"metrics": ["number"]}, {"question": "a?", "answer": "10 000"}],
         r"q\.jsonl:2: .* takes '10 000' for several numbers; write thousands without spaces"),
        (["a?"], r"q\.jsonl:1: expected a JSON object, got a text"),
    ],
)  # fmt: skip
def test_a_bad_custom_file_is_named(rows, said, tmp_path):
    with pytest.raises(DataError, match=said):
        custom_task(write_jsonl(tmp_path / "q.jsonl", rows))


@pytest.mark.parametrize("space", ["\u00a0", "\u202f"])
def test_the_answer_of_a_file_is_right_as_it_stands_there(space, tmp_path):
    """Bug: a no-break space became a space, so that 10 000 was 0, and 20 000 an answer to it."""
    answer = f"10{space}000  теңге"
    rows = [{"question": "a?", "answer": answer}]
    for name, others in {"number": ("10000", "20 000"), "accuracy": ("10 000 теңге", "0")}.items():
        path = write_jsonl(tmp_path / "q.jsonl", [{"metrics": [name]}, *rows])
        task = custom_task(path)
        [example] = task.load(path, "und", 0).examples
        scores = [
            METRICS[name].statistics(task.prediction(text), example.references)[0]
            for text in (answer, *others)
        ]
        assert scores == [1, 1, 0]


def test_an_id_that_comes_twice_is_refused_before_the_run(tmp_path):
    """Bug: one of the two was not asked, and the run never counted as finished."""
    write_all(tmp_path)
    path = tmp_path / "eval/kk/kazqad/validation.jsonl"
    path.write_text(path.read_text("utf-8").replace('"q1"', '"q0"'), "utf-8")
    comparison = Comparison("kk", ("kazqad",), tmp_path, RunSettings(("large_ins",)), {})
    with pytest.raises(DataError, match=r"kazqad: the id 'q0' comes 2 times"):
        comparison.check()

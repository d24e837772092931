"""`trimix tune`: exercises of raw text, their verdict, and where it is kept."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace

import pytest

from trimix_gguf.cli.tune import measure_and_keep
from trimix_gguf.errors import DataError, TrioFileError, WeightsError
from trimix_gguf.mixing.fusion import Weights
from trimix_gguf.roles import ROLES
from trimix_gguf.trio.trio import NANO, Trio
from trimix_gguf.trio.tuned import Free, Kind, Tuning
from trimix_gguf.trios.triofile import TrioFile, parse_trio, to_toml
from trimix_gguf.tuning import tune
from trimix_gguf.tuning.exercises import kinds_of
from trimix_gguf.tuning.probe import ask_all
from trimix_gguf.tuning.text import passages_of, read_passages
from trimix_gguf.tuning.verdict import FEWEST, judge, scores_of

TEXT = NANO / "text.txt"


@contextmanager
def quiet(_):
    yield lambda *_: None


@pytest.fixture
def own(tmp_path):
    """A copy of the nano trio that nobody has tuned."""
    folder = tmp_path / "own"
    shutil.copytree(NANO, folder)
    text = (folder / "trio.toml").read_text(encoding="utf-8").split("\n[tuning]")[0]
    (folder / "trio.toml").write_text(text, encoding="utf-8")
    return folder


# -- exercises --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def passages():
    return read_passages([TEXT])


def test_every_exercise_has_its_answer_once_among_its_choices(passages):
    pairs = [
        (f"Бұл {i} сөйлем, ол өте қысқа.", f"This is sentence {i}, it is short.") for i in range(80)
    ]
    for kind in kinds_of(passages, 0, pairs=pairs):
        asked = [*kind.exemplars, *(next(kind.exercises) for _ in range(20))]
        for one in asked:
            assert len(set(one.choices)) == len(one.choices) >= 3
            assert one.answer == one.choices[one.right]
        places = {one.right for one in asked}
        assert len(places) > 1, kind.name


def test_sentences_that_end_alike_and_pairs_with_one_translation_make_exercises_or_none():
    """Bug: with fewer than three translations in all, `tune` ended in a traceback."""
    names = [f"{a}{b}" for a in "абвгд" for b in "клмнопрст"] * 2
    lines = [f"Бұл {i} {name} туралы жаңа {name} былай деді екен." for i, name in enumerate(names)]
    alike = passages_of(lines)
    pairs = [(f"Бұл {i} сөйлем, ол өте қысқа.", "This is one sentence.") for i in range(80)]
    found = {kind.name: kind for kind in kinds_of(alike, 0, pairs=pairs)}
    assert "find" in found and not {"ending", "into"} & found.keys()
    assert all(len(set(one.choices)) == 3 for one in found["from"].exemplars)


def test_the_answer_stands_in_the_question(passages):
    kinds = {kind.name: kind for kind in kinds_of(passages, 0)}
    for _ in range(20):
        one = next(kinds["letter"].exercises)
        text, *options = one.question.splitlines()
        right = options[one.right].split(". ", 1)[1]
        assert right in text
        assert not any(
            o.split(". ", 1)[1].lower() in text.lower().split()
            for o in options
            if not o.endswith(right) and ". " in o
        )
        found = next(kinds["find"].exercises)
        assert found.answer in found.question.splitlines()[0]


def test_exercises_are_a_function_of_text_and_seed(passages):
    def drawn(seed):
        return [(k.name, k.exemplars, next(k.exercises)) for k in kinds_of(passages, seed)]

    assert drawn(3) == drawn(3)
    assert drawn(3) != drawn(4)


def test_exercises_are_the_same_in_each_process(tmp_path, monkeypatch):
    """Bug: words that stand together came in the order of a set; a stopped run began again."""
    names = [f"аа{a}{b}кала яя{a}{b}тара" for a in "бвгджзклмнпрст" for b in "аеиоуыэюяі"]
    draw = random.Random(0)
    lines = [" ".join([f"{i} бүгінгі", *draw.sample(names, 4)]) + "." for i in range(700)]
    (tmp_path / "text.txt").write_text("\n".join(lines), encoding="utf-8")
    script = (
        "import sys; from pathlib import Path; from trimix_gguf.tuning.tune import make_exercises\n"
        "made = make_exercises([Path(sys.argv[1])], None, 'kk', 0)\n"
        "print(ascii([(kind.instruction, kind.exemplars) for kind in made.kinds]))"
    )
    said = set()
    for seed in (1, 2, 4, 5):
        monkeypatch.setenv("PYTHONHASHSEED", str(seed))
        command = [sys.executable, "-c", script, tmp_path / "text.txt"]
        said.add(subprocess.run(command, capture_output=True, check=True).stdout)
    assert len(said) == 1 and b"Which word is in each text: " in said.pop()


@pytest.mark.parametrize(
    "line",
    [
        "བོད་ཡིག་ནི་བོད་མིའི་སྐད་ཡིག་ཡིན། ང་ཚོས་བོད་ཡིག་སློབ་སྦྱོང་བྱེད་ཀྱི་ཡོད།",
        "ئۇيغۇر تىلى تۈركىي تىللارنىڭ بىرى. بۇ تىلدا كۆپ كىشى سۆزلىشىدۇ ئىكەن؟",
        "ଓଡ଼ିଆ ଏକ ଭାରତୀୟ ଭାଷା ଅଟେ ବୋଲି। ଏହା ଓଡ଼ିଶାରେ ବହୁତ କୁହାଯାଏ ସର୍ବଦା।",
    ],
)
def test_sentences_of_other_scripts_are_cut_as_they_are_written(line):
    [found] = passages_of([line])
    assert len(found) == 2
    assert all(one.text in line for one in found)


def test_a_language_of_short_words_has_the_kinds_that_it_allows():
    """The words of `letter` have five letters or more; without any, a traceback came."""
    words = [a + b for a in ("b", "k", "t", "ng", "th") for b in ("a", "e", "i", "o", "u", "ai")]
    lines = [" ".join(random.Random(i).sample(words, 9)) + "." for i in range(200)]
    assert [kind.name for kind in kinds_of(passages_of(lines), 0)] == ["find", "ending"]


def test_too_little_text_is_refused_with_what_is_needed(tmp_path):
    with pytest.raises(DataError, match="2 usable sentences, and exercises need 60"):
        kinds_of(passages_of(["Бұл бір қысқа сөйлем ғана.", "Бұл екінші қысқа сөйлем ғана."]), 0)


# -- what is kept -----------------------------------------------------------------------------

KEPT = Tuning(
    Weights(0.9, 0.3),
    'a "verdict"',
    {role: str(i) * 64 for i, role in enumerate(ROLES)},
    {"letter": Kind(40, dict.fromkeys((*ROLES, "mix"), 0.5))},
    "kk",
    7,
)


FREE = Free(Weights(0.9, 0.3), "better there too", 40, 0.25, 0.5)


@pytest.mark.parametrize(
    "tuning",
    [
        KEPT,
        Tuning(None, "none", KEPT.models),
        Tuning(**{**vars(KEPT), "free": FREE}),
        Tuning(**{**vars(KEPT), "free": Free(None, "not better", 40, 0.5, 0.25)}),
    ],
)
def test_a_tuning_comes_back_from_the_trio_file(tmp_path, tuning):
    trio = TrioFile.read(NANO / "trio.toml")
    written = to_toml(TrioFile(**{**vars(trio), "tuning": tuning}))
    assert parse_trio(written, tmp_path / "trio.toml").tuning == tuning


def test_a_tuning_of_another_version_is_not_used(tmp_path):
    trio = TrioFile.read(NANO / "trio.toml")
    other = Tuning(**{**vars(KEPT), "version": KEPT.version + 1})
    written = to_toml(TrioFile(**{**vars(trio), "tuning": other}))
    assert parse_trio(written, tmp_path / "trio.toml").tuning is None


def test_a_tuning_from_before_free_answers_counts_for_choices_only():
    shipped = TrioFile.read(NANO / "trio.toml").tuning
    old = {**KEPT.to_table()}
    assert "free" not in old and Tuning.from_table(old).free is None
    assert KEPT.words.startswith(f"with choices: {KEPT.verdict}.")
    assert KEPT.words.endswith("Free answers: not measured, so they stay close to large_ins")
    assert shipped.weights is None and shipped.words == shipped.verdict


@pytest.mark.parametrize(
    ("line", "instead"),
    [
        ("close = 0.25", "close = 0.1"),
        ('verdict = "better there too"', 'verdict = "x"'),
        ("n = 40\nclose", "close"),
        ("weights = [0.9, 0.3]", "weights = [0.1, 0.9]"),
        ("seed = 7", "seed = 8"),
        ("mix = 0.5", "mix = 0.9"),
        ("mix = 0.5", ""),
        ("version = 2\nweights", "weights"),
    ],
)
def test_an_edited_tuning_is_refused(tmp_path, line, instead):
    trio = TrioFile.read(NANO / "trio.toml")
    tuning = Tuning(**{**vars(KEPT), "free": FREE})
    written = to_toml(TrioFile(**{**vars(trio), "tuning": tuning}))
    head, tuned = written.split("[tuning]")
    assert line in tuned
    edited = f"{head}[tuning]{tuned.replace(line, instead)}"
    with pytest.raises(TrioFileError, match="tuning: it was edited"):
        parse_trio(edited, tmp_path / "trio.toml")


def test_what_is_no_table_is_refused():
    for table in (None, 3, {}, {"checksum": "x"}, []):
        with pytest.raises(WeightsError):
            Tuning.from_table(table)


# -- the command ------------------------------------------------------------------------------


def test_a_trio_is_tuned_shown_used_and_void_after_a_change(trimix, own):
    before = trimix("generate", "Қазақстанның астанасы қай қала?", "-n", "2", "--trio", own)
    again = trimix("generate", "Қазақстанның астанасы қай қала?", "-n", "2", "--trio", own)
    assert b"never tuned" in before.stderr
    assert b"never tuned" not in again.stderr  # said once
    result = trimix("tune", "--trio", own, "--minutes", "0.4", "--json")
    assert result.returncode == 0, result.stderr
    table = json.loads(result.stdout)
    assert TrioFile.read(own / "trio.toml").tuning.to_table() == table
    assert table["verdict"].encode() in trimix("show", own).stdout
    assert table["verdict"].encode() in trimix("doctor", "--trio", own).stdout
    shutil.copy(NANO / "small_base.gguf", own / "small_cpt.gguf")
    used = trimix("generate", "Қазақстанның астанасы қай қала?", "-n", "2", "--trio", own)
    assert b"small_cpt is not the file that was tuned" in used.stderr
    assert used.returncode == 0


def test_a_tuning_that_is_void_is_said_by_what_answers_many(trimix, own, task_file):
    """Bug: eval and run answered by auto as without a tuning, and did not say so."""
    shutil.copy(NANO / "trio.toml", own)
    shutil.copy(NANO / "small_base.gguf", own / "small_cpt.gguf")
    lines = own / "lines.jsonl"
    lines.write_text('{"prompt": "2 + 2 = ?", "max_tokens": 1}\n', encoding="utf-8")
    given = ("eval", "--tasks", task_file, "--limit", 1, "--methods")
    for command in (
        (*given, "large_ins,auto", "-o", own / "run"),
        ("run", lines, "-o", own / "out"),
    ):
        result = trimix(*command, "--trio", own)
        assert result.returncode == 0, result.stderr
        assert b"small_cpt is not the file that was tuned" in result.stderr
    fixed = trimix(*given, "large_ins,ppl", "-o", own / "other", "--trio", own)
    assert fixed.returncode == 0 and b"tuned" not in fixed.stderr


def test_another_seed_gives_the_same_verdict_on_nano(tmp_path):
    """12 of each kind, whatever the time."""
    texts = set()
    with Trio.nano(n_threads=1) as trio:
        for seed in range(3):
            kept, kinds = tmp_path / f"{seed}.jsonl", kinds_of(read_passages([TEXT]), seed)
            asked = ask_all(trio, kinds, kept, seconds=1e9, progress=quiet, per_kind=FEWEST)
            texts.add(judge(scores_of(asked)).text)
    assert texts == {"none of the models answers better than chance; auto goes by perplexity"}


def test_what_was_edited_meanwhile_stays(own, monkeypatch):
    """Bug: a tuning wrote trio.toml as it had been ten minutes before."""
    before = TrioFile.read(own / "trio.toml")

    @contextmanager
    def opened():
        replace(before, n_ctx=64, description="edited").write()
        yield None

    found = Tuning(None, "no verdict", dict.fromkeys(ROLES, "0" * 64))
    monkeypatch.setattr(tune, "tune", lambda *_, **__: found)
    measure_and_keep(before, opened, None)
    after = TrioFile.read(own / "trio.toml")
    assert (after.n_ctx, after.description, after.tuning) == (64, "edited", found)


def test_nothing_is_measured_for_a_trio_that_cannot_keep_it(own):
    """Bug: where a folder is for reading only, the minutes came first and the refusal then."""
    gone = replace(TrioFile.read(own / "trio.toml"), folder=own / "gone")
    with pytest.raises(TrioFileError, match="cannot be written"):
        measure_and_keep(gone, lambda: pytest.fail("opened"), None)


def test_a_run_that_was_killed_continues(own, tmp_path, monkeypatch):
    monkeypatch.setenv("TRIMIX_CACHE", str(tmp_path / "cache"))
    command = [sys.executable, "-m", "trimix_gguf", "tune", "--trio", own, "--minutes", "0.4"]
    run = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    kept = tmp_path / "cache" / "tune"
    while not any(f.stat().st_size > 20_000 for f in kept.glob("*.jsonl")) and run.poll() is None:
        time.sleep(0.05)
    run.send_signal(signal.SIGKILL)
    run.communicate()
    [file] = kept.glob("*.jsonl")
    whole = file.read_bytes().rsplit(b"\n", 1)[0]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    assert file.read_bytes().startswith(whole)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--text", "short.txt"), b"usable sentences"),
        (("--text", "absent.txt"), b"absent.txt"),
        (("--text", "latin1.txt"), b"not UTF-8"),
        (("--pairs", "short.txt"), b"names the columns"),
        (("--pairs", "three.txt"), b"no column 'kk' among ['ru', 'en', 'kaz']; name"),
        (("--pairs", "few.txt"), b"few.txt has 59 usable pairs"),
        (("--minutes", "0.0001", "--seed", "99"), b"raise --minutes"),
        (("--n-ctx", "64"), b"give --n-ctx"),
    ],
)
def test_bad_input_is_one_line_and_changes_nothing(trimix, own, tmp_path, arguments, said):
    """Bug: of three languages it took the first, and too few pairs were left out without a word."""
    (tmp_path / "short.txt").write_text("Бұл бір қысқа сөйлем ғана.\n", encoding="utf-8")
    row = "Бұл сөйлем өте ұзын емес.\tThis sentence is not very long.\n"
    (tmp_path / "few.txt").write_text("kk\ten\n" + 59 * row, encoding="utf-8")
    (tmp_path / "three.txt").write_text("ru\ten\tkaz\n", encoding="utf-8")
    (tmp_path / "latin1.txt").write_bytes("déjà vu\n".encode("latin-1") * 20)
    paths = [tmp_path / a if a.endswith(".txt") else a for a in arguments]
    before = (own / "trio.toml").read_bytes()
    result = trimix("tune", "--trio", own, *paths)
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith(b"trimix: ")
    assert said in last
    assert (own / "trio.toml").read_bytes() == before


def test_a_trio_without_a_file_cannot_keep_a_tuning(trimix, nano_files):
    files = [v for role in ROLES for v in (f"--{role.replace('_', '-')}", nano_files[role])]
    result = trimix("tune", *files)
    assert result.returncode == 1
    assert b"kept in a trio.toml" in result.stderr


def test_without_a_home_folder_it_is_said_in_one_line(monkeypatch):
    """Bug: a traceback, where TRIMIX_HOME was set and TRIMIX_CACHE was not."""

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(tune, "cache_folder", no_home)
    with pytest.raises(DataError, match="set TRIMIX_CACHE"):
        tune.kept_answers([], {}, 0)

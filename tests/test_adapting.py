"""`trimix adapt` with the nano trio: from text to a trio, and what is refused."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest

for needed in ("ftfy", "datasketch", "zstandard", "fontTools"):
    pytest.importorskip(needed, reason="needs the extra: pip install -e '.[adapt]'")

from trimix_gguf import Trio, generate  # noqa: E402
from trimix_gguf.adapting import extras  # noqa: E402
from trimix_gguf.adapting.bases import Base, load_base  # noqa: E402
from trimix_gguf.adapting.history import History, best_of  # noqa: E402
from trimix_gguf.adapting.judging import Judgement  # noqa: E402
from trimix_gguf.adapting.recipe import Recipe  # noqa: E402
from trimix_gguf.adapting.rows import Rows, blocks, write_rows  # noqa: E402
from trimix_gguf.adapting.workplace import Workplace  # noqa: E402
from trimix_gguf.errors import DataError, TrimixError  # noqa: E402
from trimix_gguf.trio.trio import NANO  # noqa: E402
from trimix_gguf.trios.store import installed, installed_folder, resolve  # noqa: E402

# -- the whole way ----------------------------------------------------------------------------


def test_nano_learns_a_text_and_becomes_a_trio(adapt, text_file, tmp_path, with_torch):
    picture = tmp_path / "a.png"
    options = ("--tokens", 50_000, "--lang", "kk", "--learning-rate", 5e-3, "--plot", picture)
    done = adapt("qazaq", text_file, *options)
    assert done.exit_code == 0, done.output
    trio = resolve("qazaq")
    assert trio.models["small_cpt"].adapter_of == "small_base" and trio.languages == ("kk",)
    made = json.loads((trio.folder / "adapted.json").read_text(encoding="utf-8"))
    assert list(made["text"]["files"]) == [text_file.name]  # no folder of whoever made it
    first, *_, last = [one["perplexity"] for one in made["history"]]
    assert last < 0.6 * first
    assert picture.read_bytes().startswith(b"\x89PNG")
    held = dict(
        line.split()[:2]
        for line in (trio.folder / "heldout.txt").read_text("utf-8").splitlines()[1:]
    )
    assert float(held["small_cpt"]) < 0.6 * float(held["small_base"])
    with Trio.load(**trio.load_arguments()) as opened:
        assert generate(opened, "бүгін", max_tokens=4).text
    assert not list((tmp_path / "home" / "adapt").iterdir())  # nothing is left of the run
    # The default method chooses, by what was measured at the end or by why it could not be.
    assert trio.method is None
    assert (trio.tuning is not None) == ("kept in " in done.stderr)
    assert trio.tuning is not None or "not measured: " in done.stderr
    again = adapt("qazaq", text_file)
    assert again.exit_code == 1 and "here already" in str(again.exception)


def test_a_limit_of_openmp_changes_no_number(text_file, tmp_path, with_torch):
    """Bug: PyTorch left the part of the threads that were held back, and the loss was no number."""
    found = {}
    for name, more in {"free": {}, "held": {"OMP_THREAD_LIMIT": "1"}}.items():
        environment = {k: v for k, v in os.environ.items() if k != "OMP_THREAD_LIMIT"} | more
        environment["TRIMIX_HOME"] = str(tmp_path / name)
        words = ["adapt", "qazaq", str(text_file), "--tokens", "4096", "--no-tune"]
        command = [sys.executable, "-m", "trimix_gguf.cli", *words]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        made = tmp_path / name / "trios" / "qazaq" / "adapted.json"
        history = json.loads(made.read_text(encoding="utf-8"))["history"]
        found[name] = [one["perplexity"] for one in history]
    assert found["held"] == pytest.approx(found["free"], rel=0.02)


def test_all_weights_are_taught_and_only_a_file_is_written(adapt, text_file, tmp_path, with_torch):
    out, words = tmp_path / "small_cpt.gguf", ("--full", "--tokens", 8192, "--exercises", 0)
    done = adapt("whole", text_file, *words, "-o", out, "--plot", tmp_path / "a.png")
    assert done.exit_code == 0 and done.stdout.strip() == str(out), done.output
    assert (tmp_path / "a.png").is_file()  # it was drawn only where there was a trio
    assert installed() == []
    files = {role: NANO / f"{role}.gguf" for role in ("large_ins", "small_base")}
    with Trio.load(**files, small_cpt=out, n_ctx=64) as opened:
        assert generate(opened, "бүгін", max_tokens=4).text
    assert adapt("whole", text_file, "-o", out).exit_code == 1


def test_a_dry_run_says_what_it_would_take_and_leaves_nothing(adapt, text_file, tmp_path):
    done = adapt("qazaq", text_file, "--dry-run", "--tokens", 1000)
    assert done.exit_code == 0, done.output
    for said in ("60 documents", "held out", "tokens per character", "enough?", "memory", "disk"):
        assert said in done.stderr
    assert not list((tmp_path / "home" / "adapt").iterdir())


# -- a run begun again --------------------------------------------------------------------------


def test_something_else_than_was_begun_with_is_refused(adapt, text_file, tmp_path):
    work = Workplace(tmp_path / "work")
    work.check_asked({"tokens": 4}, [text_file])
    work.write("report.json", {})
    work.check_asked({"tokens": 5, "base": None}, [text_file])  # nothing is lost: not begun
    assert work.read("report.json") is None
    work.write("decided.json", {"n_steps": 1})
    work.check_asked({"tokens": 5, "base": None}, [text_file])
    with pytest.raises(DataError, match="--tokens 5, not 6"):
        work.check_asked({"tokens": 6, "base": None}, [text_file])
    other = tmp_path / "other.txt"
    other.write_text("a", encoding="utf-8")
    with pytest.raises(DataError, match="other.txt was not there"):
        work.check_asked({"tokens": 5, "base": None}, [text_file, other])
    begun = Workplace(tmp_path / "begun")
    begun.check_asked({}, [other])
    begun.write("decided.json", {"n_steps": 1})
    other.write_text("b", encoding="utf-8")
    with pytest.raises(DataError, match="other.txt changed"):
        begun.check_asked({}, [other])


def test_a_folder_of_other_files_is_no_work_folder_and_keeps_them(adapt, text_file, tmp_path):
    """A run began by deleting all in --work DIR/NAME, which may be the folder of the text."""
    text = tmp_path / "texts" / "kk" / "old.txt"
    text.parent.mkdir(parents=True)
    shutil.copy(text_file, text)
    said = refused(adapt("kk", text, "--work", tmp_path / "texts", "--tokens", 2048))
    assert "holds old.txt" in said and "--work" in said
    assert [path.name for path in text.parent.iterdir()] == ["old.txt"]


def test_what_a_kill_leaves_is_still_a_work_folder(tmp_path, monkeypatch, text_file):
    work = Workplace(tmp_path / "work")
    work.check_asked({"tokens": 4}, [text_file])
    (work.folder / "replay").mkdir()
    with monkeypatch.context() as killed:
        everything = Path.iterdir
        killed.setattr(Path, "iterdir", lambda path: iter(sorted(everything(path))))
        killed.setattr(shutil, "rmtree", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            work.check_asked({"tokens": 5}, [text_file])
    Workplace(work.folder).check_asked({"tokens": 5}, [text_file])
    assert not (work.folder / "replay").exists()
    (tmp_path / "new").mkdir()
    for name in ("lock", ".asked.json.123-0.part"):
        (tmp_path / "new" / name).touch()
    Workplace(tmp_path / "new").check_asked({}, [text_file])


def test_a_name_that_a_stopped_pull_took_is_refused_before_the_training(adapt, text_file, tmp_path):
    """The trio could not be put in its place, after hours."""
    part = installed_folder("kk") / ".pull" / "small_cpt.gguf.part"
    part.parent.mkdir(parents=True)
    part.touch()
    assert "a part of one, is here already" in refused(adapt("kk", text_file, "--tokens", 2048))


def test_bad_pairs_are_refused_while_they_can_be_repaired(adapt, text_file, tmp_path):
    """They were read once training was decided on: then a repaired file was another file."""
    pairs, options = tmp_path / "pairs.tsv", ("--work", tmp_path / "work", "--tokens", 2048)
    pairs.write_text("only one column\n", encoding="utf-8")
    said = refused(adapt("kk", text_file, "--pairs", pairs, *options))
    assert "line 1: expected two columns" in said
    assert not (tmp_path / "work/kk/decided.json").exists()


def test_an_output_in_the_work_folder_is_refused(adapt, text_file, tmp_path):
    """The end of the run deleted it with the folder."""
    said = refused(adapt("kk", text_file, "--work", tmp_path, "-o", tmp_path / "kk/small.gguf"))
    assert "deleted at the end" in said


# -- bad input --------------------------------------------------------------------------------


def refused(done):
    assert done.exit_code == 1 and isinstance(done.exception, TrimixError), done.output
    assert "\n" not in str(done.exception)
    return str(done.exception)


def test_what_cannot_be_done_is_one_line(adapt, text_file, tmp_path, monkeypatch):
    assert "no such file" in refused(adapt("a", tmp_path / "absent.txt"))
    (tmp_path / "empty.txt").write_text("", encoding="utf-8")
    assert "no letters" in refused(adapt("a", tmp_path / "empty.txt"))
    said = refused(adapt("a", text_file, "--replay", tmp_path / "empty.txt"))
    assert "--replay: the text holds no letters" in said
    assert "Arabic" in refused(adapt("b", text_file, "--script", "Arab"))
    assert "config.json" in refused(adapt("c", text_file, "--base", tmp_path))
    assert "reserved" not in refused(adapt("nano", text_file))
    free = psutil.virtual_memory()._replace(available=1 << 20)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    assert "GiB of memory" in refused(adapt("d", text_file))


def test_a_base_with_another_vocabulary_is_refused(adapt, text_file, real_files):
    done = adapt("a", text_file, "--base", real_files["small_base"])
    assert "small_base" in refused(done)


@pytest.mark.parametrize("module", ["torch", "ftfy"])
def test_an_absent_library_is_one_line_with_what_to_install(adapt, text_file, monkeypatch, module):
    real = extras.importlib.import_module

    def absent(name):
        if name == module:
            raise ImportError(name)
        return real(name)

    monkeypatch.setattr(extras.importlib, "import_module", absent)
    said = refused(adapt("a", text_file, "--tokens", 2048))
    assert module in said and "pip install 'trimix-gguf[adapt]'" in said and "GB" in said


# -- rows, losses, choices --------------------------------------------------------------------


def test_rows_hold_every_token_once_and_what_it_counts(tmp_path):
    tokenizer = SimpleNamespace(ids=lambda text: list(map(ord, text)), end=0)
    documents = [[("abc", 1), ("de", 8)], [("fghij", 1)]]
    rows = write_rows(documents, tokenizer, tmp_path, n_rows=2, n_block=5)
    assert rows.ids.tolist() == [[97, 98, 99, 100, 101], [0, 102, 103, 104, 105]]
    assert rows.counts.tolist() == [[1, 1, 1, 8, 8], [1, 1, 1, 1, 1]]
    assert np.array_equal(Rows.load(tmp_path).ids, rows.ids)
    assert len(list(blocks(documents, tokenizer, 4))) == 3


def test_the_loss_is_over_the_tokens_that_occur(with_torch):
    import torch

    from trimix_gguf.adapting.taught import make_taught

    model = load_base(Base(NANO / "small_base.gguf"), "float32")
    ids = np.random.default_rng(1).integers(5, 300, (2, 12)).astype(np.int32)
    counts = np.random.default_rng(2).choice([1, 8], (2, 12)).astype(np.uint8)
    taught = make_taught(model, Rows(ids, counts))
    with torch.no_grad():
        found = taught(torch.from_numpy(ids).long(), torch.from_numpy(counts))
        logits = model(torch.from_numpy(ids).long()).logits[:, :-1].double()
    own = np.unique(ids)
    logprobs = logits[..., own].log_softmax(-1).numpy()
    at = np.searchsorted(own, ids[:, 1:])
    nll = -np.take_along_axis(logprobs, at[..., None], -1)[..., 0]
    assert float(found) == pytest.approx(
        (nll * counts[:, 1:]).sum() / counts[:, 1:].sum(), rel=1e-4
    )


def looked(step, perplexity, *sure):
    return Judgement(step, perplexity, None, 0.5 if sure else None, list(sure))


def test_the_lowest_perplexity_wins_among_those_that_still_answer():
    able = looked(1, 9.0, *[0.6] * 20)
    better = looked(2, 7.0, *[0.59] * 20)
    forgot = looked(3, 5.0, *[0.3] * 20)
    assert best_of([able, better, forgot]) is better
    assert best_of([looked(1, 9.0), looked(2, 7.0)]).step == 2


def test_training_ends_when_answers_get_worse_twice(tmp_path):
    history = History(tmp_path)
    for step, sure in enumerate((0.5, 0.6, 0.3)):
        history.add(looked(step, 9.0 - step, *[sure] * 20))
        assert not history.falls
    history.add(looked(3, 5.0, *[0.3] * 20))
    assert history.falls and History(tmp_path).all == history.all
    history.forget_after(2)
    assert not history.falls and len(History(tmp_path).all) == 3


def test_the_rate_warms_up_then_falls():
    recipe = Recipe(n_steps=100, learning_rate=1e-3, dtype="float32", n_warm_up=10)
    slopes = [recipe.slope(step) for step in range(101)]
    assert slopes[0] == pytest.approx(0.1, rel=0.01) and max(slopes) == max(slopes[9:12])
    assert slopes[100] == pytest.approx(0.05) and slopes == sorted(slopes[:10]) + slopes[10:]
    assert replace(recipe, n_halvings=2).slope(50) == slopes[50] / 4

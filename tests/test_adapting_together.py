"""`trimix adapt` in several processes, as `accelerate launch` and torchrun start them."""

import json
import os
import subprocess
import sys

import pytest

for needed in ("torch", "transformers", "peft", "accelerate", "ftfy", "datasketch"):
    pytest.importorskip(needed, reason="needs the extra: pip install -e '.[adapt]'")

from trimix_gguf.adapting import training  # noqa: E402
from trimix_gguf.adapting.outlook import (  # noqa: E402
    ENOUGH_STEPS,
    FEWEST_ROWS,
    MOST_ROWS,
    rows_per_step,
)
from trimix_gguf.adapting.together import Together  # noqa: E402
from trimix_gguf.adapting.workplace import DECIDED  # noqa: E402
from trimix_gguf.trios.store import resolve  # noqa: E402


def test_two_processes_make_the_trio_that_one_makes(adapt, text_file, tmp_path):
    """By torchrun, which is what `accelerate launch` runs for several cards; here over gloo."""
    environment = {**os.environ, "TRIMIX_HOME": str(tmp_path / "two"), "OMP_NUM_THREADS": "1"}
    words = ["adapt", "qazaq", str(text_file), "--tokens", "16384", "--learning-rate", "2e-3"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, "--standalone", "-m", "trimix_gguf.cli", *words, "--no-tune"],
        env=environment, capture_output=True, text=True, encoding="utf-8",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    made = tmp_path / "two" / "trios" / "qazaq"
    assert done.stdout.strip() == str(made)  # one process speaks
    assert done.stderr.count("qazaq is complete") == 1
    assert len(list(made.glob("*.gguf"))) == 1
    assert "read 16,384 tokens" in (made / "trio.toml").read_text("utf-8")
    history = json.loads((made / "adapted.json").read_text("utf-8"))["history"]
    # Sixteen steps of two rows, as one process makes them: each row is read by one of the two.
    assert [one["step"] for one in history] == [0, 3, 6, 9, 12, 15, 16]
    alone = adapt(*words[1:], "--no-tune")
    assert alone.exit_code == 0, alone.output
    made_alone = json.loads((resolve("qazaq").folder / "adapted.json").read_text("utf-8"))
    for one, other in zip(history, made_alone["history"], strict=True):
        assert one["perplexity"] == pytest.approx(other["perplexity"], rel=0.05)
    assert not list((tmp_path / "two" / "adapt").iterdir())


@pytest.mark.parametrize("n_processes", range(1, 10))
def test_any_number_of_processes_shares_the_rows_of_a_step(n_processes):
    """And little text still makes many steps."""
    before = 0
    for n_tokens in (0, 1, 65_536, 532_480, 5_000_000, 10**8, 10**12):
        n_rows = rows_per_step(n_tokens, 512, n_processes)
        each, rest = divmod(n_rows, n_processes)
        assert rest == 0
        assert each.bit_count() == 1  # passes of one row or of two, whichever memory allows
        assert n_rows >= max(before, FEWEST_ROWS)
        if n_rows >= 2 * max(FEWEST_ROWS, n_processes):
            assert n_tokens // (n_rows * 512) >= ENOUGH_STEPS
        before = n_rows
    assert before > MOST_ROWS // 2


def test_a_variable_of_a_cluster_makes_no_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.delenv("RANK", raising=False)
    assert Together.join() == Together()


@pytest.fixture
def begun(adapt, text_file, tmp_path, monkeypatch):
    """The words of a run that was stopped before its first step, and what it had decided."""

    def stopped(*_, **__):
        raise training.Stopped

    work = tmp_path / "work"
    words = ("qazaq", str(text_file), "--tokens", "8192", "--no-tune", "--work", str(work))
    with monkeypatch.context() as patched:
        patched.setattr(training, "train", stopped)
        first = adapt(*words)
        assert first.exit_code != 0, first.output
    (file,) = work.rglob(DECIDED)
    return words, file


def test_going_on_in_another_number_of_processes_is_refused(adapt, begun):
    """Bug: a step then had a quarter of a pass for each of four, which is none."""
    words, file = begun
    decided = json.loads(file.read_text("utf-8"))
    file.write_text(json.dumps(decided | {"n_processes": 4}), "utf-8")
    assert "begun in 4 processes, not 1" in str(adapt(*words).exception)


def test_a_run_that_an_earlier_version_began_goes_on_in_steps_of_four_rows(adapt, begun):
    words, file = begun
    decided = json.loads(file.read_text("utf-8"))
    assert decided.pop("rows_per_step") == 2
    file.write_text(json.dumps(decided | {"n_steps": decided["n_steps"] // 2}), "utf-8")
    done = adapt(*words)
    assert done.exit_code == 0, done.output
    made = resolve("qazaq").folder
    assert "read 8,192 tokens" in (made / "trio.toml").read_text("utf-8")
    assert json.loads((made / "adapted.json").read_text("utf-8"))["history"][-1]["step"] == 4

"""`trimix adapt` in several processes, as `accelerate launch` and torchrun start them."""

import json
import os
import subprocess
import sys

import pytest

for needed in ("torch", "transformers", "peft", "accelerate", "ftfy", "datasketch"):
    pytest.importorskip(needed, reason="needs the extra: pip install -e '.[adapt]'")

from trimix_gguf.adapting import training  # noqa: E402
from trimix_gguf.adapting.together import Together  # noqa: E402
from trimix_gguf.adapting.workplace import DECIDED  # noqa: E402
from trimix_gguf.errors import TrimixError  # noqa: E402
from trimix_gguf.trios.store import resolve  # noqa: E402


def test_two_processes_make_the_trio_that_one_makes(adapt, text_file, tmp_path):
    """By torchrun, which is what `accelerate launch` runs for several cards; here over gloo."""
    environment = {**os.environ, "TRIMIX_HOME": str(tmp_path / "two"), "OMP_NUM_THREADS": "1"}
    words = ["adapt", "qazaq", str(text_file), "--tokens", "16384", "--learning-rate", "5e-3"]
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
    # Eight steps of four rows, as one process makes them: each row is read by one of the two.
    assert [one["step"] for one in history] == [0, 2, 4, 6, 8]
    alone = adapt(*words[1:], "--no-tune")
    assert alone.exit_code == 0, alone.output
    made_alone = json.loads((resolve("qazaq").folder / "adapted.json").read_text("utf-8"))
    for one, other in zip(history, made_alone["history"], strict=True):
        assert one["perplexity"] == pytest.approx(other["perplexity"], rel=0.05)
    assert not list((tmp_path / "two" / "adapt").iterdir())


def test_a_number_of_processes_that_does_not_fit_is_one_line(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(TrimixError, match="3 processes were started.* start 1 or 2 or 4"):
        Together.join()
    monkeypatch.delenv("RANK")  # a cluster's own variable, no launcher's
    assert Together.join() == Together()


def test_going_on_in_another_number_of_processes_is_refused(
    adapt, text_file, tmp_path, monkeypatch
):
    """Bug: a step then had a quarter of a pass for each of four, which is none."""

    def stopped(*_, **__):
        raise training.Stopped

    work = tmp_path / "work"
    words = ("qazaq", str(text_file), "--tokens", "2048", "--no-tune", "--work", str(work))
    with monkeypatch.context() as patched:
        patched.setattr(training, "train", stopped)
        first = adapt(*words)
        assert first.exit_code != 0, first.output
    (file,) = work.rglob(DECIDED)
    decided = json.loads(file.read_text("utf-8"))
    file.write_text(json.dumps(decided | {"n_processes": 4}), "utf-8")
    assert "begun in 4 processes, not 1" in str(adapt(*words).exception)

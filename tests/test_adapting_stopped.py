"""Training that is stopped, killed, or meets a loss that is no number, goes on as it should."""

import itertools
import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

for needed in ("ftfy", "datasketch", "zstandard", "fontTools"):
    pytest.importorskip(needed, reason="needs the extra: pip install -e '.[adapt]'")

from trimix_gguf.adapting import training  # noqa: E402
from trimix_gguf.adapting.bases import Base, Tokenizer, load_base  # noqa: E402
from trimix_gguf.adapting.judging import Judge  # noqa: E402
from trimix_gguf.adapting.recipe import Recipe  # noqa: E402
from trimix_gguf.adapting.rows import measured_rows, write_rows  # noqa: E402
from trimix_gguf.errors import TrimixError  # noqa: E402
from trimix_gguf.trio.trio import NANO  # noqa: E402


@pytest.fixture
def learning(tmp_path, text_file, with_torch):
    """What training.train takes, for nano with an adapter, short rows and few steps."""
    from trimix_gguf.adapting.taught import add_adapter, make_taught

    base = Base(NANO / "small_base.gguf")
    texts = [json.loads(line)["text"] for line in text_file.read_text("utf-8").splitlines()]
    recipe = Recipe(
        n_steps=9, learning_rate=3e-3, dtype="float32", n_warm_up=2, steps_between_looks=3,
        save_every_s=0, rows_per_step=4,
    )  # fmt: skip
    tokenizer = Tokenizer(base)
    documents = ([(text, 1)] for text in itertools.cycle(texts[8:]))
    rows = write_rows(documents, tokenizer, tmp_path, n_rows=36, n_block=64)
    judge = Judge(measured_rows(texts[:8], tokenizer, n_rows=2, n_block=64), None, [])

    def run(folder, recipe=recipe, show=lambda standing: None, model=None):
        import torch

        torch.manual_seed(1)
        folder.mkdir(exist_ok=True)
        taught = make_taught(add_adapter(load_base(base, "float32"), 4), rows)
        read = []
        taught.register_forward_pre_hook(
            lambda module, arguments, named: read.append(named["ids"].numpy().copy()),
            with_kwargs=True,
        )
        said = []
        arguments = (taught, rows, recipe, judge, folder)
        history = training.train(*arguments, show=show, say=said.append)
        numbers = {name: p.detach().clone() for name, p in training.trained_numbers(taught).items()}
        return SimpleNamespace(numbers=numbers, history=history, said=said, read=read)

    run.recipe, run.rows = recipe, rows
    return run


def same(one, other):
    return all((one[name] == other[name]).all() for name in one | other)


def test_a_run_that_was_killed_at_any_step_ends_as_one_that_was_not(learning, tmp_path):
    whole = learning(tmp_path / "whole")
    assert np.array_equal(np.concatenate(whole.read), learning.rows.ids)  # each row once, in order
    steps = []

    def stop(standing):
        steps.append(standing.step)
        if standing.step in (2, 6, 7) and steps.count(standing.step) == 1:
            raise KeyboardInterrupt  # before this step is saved, as a kill

    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            learning(tmp_path / "broken", show=stop)
        # What a kill leaves of a state that was being written.
        source = tmp_path / "whole/states/checkpoint-9"
        target = tmp_path / "broken/states/checkpoint-8"
        shutil.copytree(source, target, ignore=shutil.ignore_patterns(training.WHOLE))
    broken = learning(tmp_path / "broken", show=stop)
    assert steps == [1, 2, 2, 3, 4, 5, 6, 6, 7, 7, 8, 9]
    assert same(whole.numbers, broken.numbers)
    assert whole.history.all == broken.history.all
    assert [one.step for one in whole.history.all] == [0, 3, 6, 9]


def test_ctrl_c_ends_the_step_and_saves_it(learning, tmp_path):
    import signal

    def stop(standing):
        if standing.step == 4:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(training.Stopped):
        learning(tmp_path / "run", replace(learning.recipe, save_every_s=999), show=stop)
    assert (tmp_path / "run/states/checkpoint-4" / training.WHOLE).is_file()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_full_disk_leaves_the_state_before(learning, tmp_path, monkeypatch):
    real, n_written = training.save_numbers, itertools.count()

    def full(taught, path):
        if "states" in path.parts and next(n_written) == 4:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        real(taught, path)

    monkeypatch.setattr(training, "save_numbers", full)
    with pytest.raises(OSError, match="No space"):
        learning(tmp_path / "run")
    monkeypatch.setattr(training, "save_numbers", real)
    assert same(learning(tmp_path / "run").numbers, learning(tmp_path / "whole").numbers)


@pytest.mark.parametrize("n_bad", [1, 99])
def test_a_loss_that_is_no_number_goes_back_with_half_the_rate(
    request, learning, tmp_path, monkeypatch, n_bad
):
    import torch
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    real, at = torch.nn.functional.cross_entropy, itertools.count()
    bad = itertools.count()

    def sometimes(logits, targets, **options):
        found = real(logits, targets, **options)
        is_training = options["reduction"] == "none" and found.requires_grad
        # Two losses for a step: the tenth is of the fifth.
        if is_training and next(at) >= 9 and next(bad) < n_bad:
            return found * float("nan")
        return found

    rates = []
    hook = register_optimizer_step_pre_hook(
        lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"])
    )
    request.addfinalizer(hook.remove)
    monkeypatch.setattr(torch.nn.functional, "cross_entropy", sometimes)
    if n_bad > training.MOST_HALVINGS:
        with pytest.raises(TrimixError, match="--learning-rate"):
            learning(tmp_path / "run")
        return
    run = learning(tmp_path / "run")
    assert len(run.said) == n_bad and "half the rate" in run.said[0]
    assert (tmp_path / "run/halvings").read_text(encoding="utf-8") == "1"
    assert all(np.isfinite(one.perplexity) for one in run.history.all)
    # Bug: the step that was done again had the whole rate, and could fail as before.
    recipe, halved = learning.recipe, replace(learning.recipe, n_halvings=1)
    slopes = [(recipe if step < 4 else halved).slope(step) for step in range(recipe.n_steps)]
    assert rates == [recipe.learning_rate * slope for slope in slopes]

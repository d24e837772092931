"""A fourth model with a weight of its own."""

import json
from contextlib import closing

import numpy as np
import pytest
from test_cli import one_line_error
from topics import EXEMPLARS, QUESTION, arguments, scored

from trimix_gguf import Trio, Weights
from trimix_gguf.errors import MemoryNeededError
from trimix_gguf.evaluation.names.axis import AXIS
from trimix_gguf.evaluation.running.continuing import continue_decoupled
from trimix_gguf.evaluation.running.decoupled import FourthModel, check_fourth
from trimix_gguf.evaluation.running.reading import Reader
from trimix_gguf.machine import memory
from trimix_gguf.machine.loading import Loading
from trimix_gguf.mixing.scoring import GRID
from trimix_gguf.trio.model import Model
from trimix_gguf.trio.prompt import Prompt, Segment


@pytest.fixture(scope="module")
def trio():
    with Trio.nano(n_threads=1) as loaded:
        yield loaded


@pytest.fixture
def fourth(nano_files, trio):
    """small_cpt's file as large_base: a model unlike its neighbours in the formula."""
    loading = Loading(n_ctx=512, n_threads=1)
    with closing(Model(nano_files["small_cpt"], loading, tokenizer=False)) as model:
        yield FourthModel(model, trio)


def test_a_decoupled_reading_is_the_formula_at_each_token(trio, fourth):
    """In float64, on each model's own logits of the whole prompt."""
    other = Reader(trio, trio.prompt(f"{QUESTION} {EXEMPLARS}"), [False] * 500, fourth=fourth)
    other.read(scored(trio, QUESTION))
    reader = Reader(trio, trio.prompt(EXEMPLARS), [False] * 500, fourth=fourth)
    reader.read(scored(trio, QUESTION + " x"))
    reading = reader.read(scored(trio, QUESTION))
    n_past = trio.n_past
    assert continue_decoupled(trio, fourth, Weights(0.5, 0.5), 0.3, max_tokens=6).ids
    assert trio.n_past == n_past
    segments = (*reader.prefix.segments, *scored(trio, QUESTION).segments)
    ids = [i for segment in segments for i in segment.ids["large_ins"]]
    n, rows = len(reading.nlls), {}
    for role in trio.models:
        parts = []
        for at in range(len(ids) - n - 1, len(ids) - 1, 16):
            end = min(at + 16, len(ids) - 1)
            trio.prefill(Prompt((Segment.of(ids[:end]),)))
            parts.append(trio.tail_rows((role,), end - at)[role].astype(np.float64))
        rows[role] = np.concatenate(parts)
    large, cpt, base = (rows[r] for r in ("large_ins", "small_cpt", "small_base"))
    fourth_rows = cpt  # large_base is small_cpt's file
    targets = np.array(ids[-n:])
    for at, gamma in ((0, GRID[0]), (3, GRID[3])):
        for alpha, beta in ((0.0, 0.0), (1.0, 0.3), (0.5, 0.9)):
            mixed = base + alpha * (large - fourth_rows) + beta * (cpt - base)
            mixed += gamma * (fourth_rows - base)
            if trio.unused is not None:
                mixed[:, trio.unused] = -np.inf
            top = mixed.max(axis=1, keepdims=True)
            logp = mixed - top - np.log(np.exp(mixed - top).sum(axis=1, keepdims=True))
            expected = -logp[np.arange(n), targets].sum()
            found = reading.decoupled[at, AXIS.index(alpha), AXIS.index(beta)]
            assert found == pytest.approx(expected, rel=1e-4)


def test_a_fourth_model_that_does_not_fit_beside_the_trio_is_refused(trio, nano_files, monkeypatch):
    check_fourth(nano_files["small_cpt"], trio)
    monkeypatch.setattr(memory, "available", lambda: 1 << 20)
    with pytest.raises(MemoryNeededError, match=r"small_cpt.gguf needs .* beside the trio"):
        check_fourth(nano_files["small_cpt"], trio)


def test_a_fourth_model_follows_the_trio_to_another_text(trio, fourth):
    for text in (EXEMPLARS + QUESTION, QUESTION, QUESTION + EXEMPLARS):
        trio.prefill(trio.prompt(text))
        three = {role: row[None].copy() for role, row in trio.rows().items()}
        row = fourth.beside(three, trio.n_past)["large_base"][0]
        np.testing.assert_allclose(row, three["small_cpt"][0], atol=0.05)  # the same file


@pytest.mark.parametrize("role", ["large_ins", "small_base"])
def test_a_fourth_model_that_says_what_one_of_three_does_changes_nothing(
    trimix, task_file, tmp_path, nano_files, role
):
    """large_base as large_ins leaves gamma as alpha; as small_base, alpha as it is."""
    out = tmp_path / "run"
    given = [*arguments(task_file, out, "ppl,decoupled"), "--large-base", nano_files[role]]
    assert trimix(*given).returncode == 0
    for line in (out / "topics.jsonl").read_text("utf-8").splitlines():
        ppl, decoupled = (json.loads(line)["outputs"][name] for name in ("ppl", "decoupled"))
        weight = "gamma" if role == "large_ins" else "alpha"
        assert (decoupled[weight], decoupled["beta"]) == (ppl["alpha"], ppl["beta"])
        assert decoupled["text"] == ppl["text"]
    report = trimix("eval", "report", out)
    assert report.returncode == 0, report.stderr.decode()
    assert b"| decoupled |" in report.stdout
    other = tmp_path / "other"
    given = arguments(task_file, other, "ppl,decoupled")
    assert "--large-base" in one_line_error(trimix(*given))
    assert "no.gguf" in one_line_error(trimix(*given, "--large-base", tmp_path / "no.gguf"))
    assert not other.exists()

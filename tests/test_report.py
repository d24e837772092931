"""Scores, means and p-values of a run's report, on folders that the tests write."""

import math
from dataclasses import asdict

import numpy as np
import pytest
from made_runs import (
    AXIS,
    FIXED,
    GRID,
    SELECTING,
    accuracy,
    letter,
    made_lines,
    report,
    right,
    said,
    share,
    summary_of,
    write_lines,
    write_run,
)

from trimix_gguf.evaluation.reporting.statistics import bootstrap_interval, paired_difference
from trimix_gguf.evaluation.reporting.tables import to_markdown
from trimix_gguf.evaluation.tasks.metrics import METRICS


def test_scores_and_intervals_are_those_of_a_naive_count(rng, tmp_path):
    pytest.importorskip("scipy")
    lines = made_lines(rng, "tumlu")
    task = summary_of(lines, tmp_path)
    assert task["n"] == 24
    for method in (*FIXED, *SELECTING):
        stats = right(lines, said(lines, method))
        score = task["methods"][method]["metrics"]["accuracy"]
        assert score["value"] == pytest.approx(share(stats.sum(axis=0)))
        expected = bootstrap_interval(stats, share, seed=5, n_resamples=60)
        assert (score["low"], score["high"]) == pytest.approx(expected)


def test_every_metric_of_a_task_is_reported(rng, tmp_path):
    lines = made_lines(rng, "kazqad", selecting=(), grid=False)
    task = report(write_run(tmp_path, {"kazqad": lines}))["tasks"]["kazqad"]
    assert task["metrics"] == ["exact_match", "f1"]
    for metric in task["metrics"]:
        scores = [
            METRICS[metric].score(text.strip(), line["references"][0])
            for text, line in zip(said(lines, "small_cpt"), lines, strict=True)
        ]
        found = task["methods"]["small_cpt"]["metrics"][metric]
        assert found["value"] == pytest.approx(100 * np.mean(scores))
        assert 0 < found["low"] < found["value"] < found["high"] < 100


def test_corpus_metrics_are_sacrebleus(rng, tmp_path):
    sacrebleu = pytest.importorskip("sacrebleu")
    lines = made_lines(rng, "kazqad", selecting=())
    folder = write_run(tmp_path, {"flores-to-en": lines})
    task = report(folder)["tasks"]["flores-to-en"]
    references = [[line["references"][0] for line in lines]]
    chrf = sacrebleu.CHRF(word_order=2, lowercase=True)

    def scored(texts):
        return chrf.corpus_score([text.strip() for text in texts], references).score

    for method in FIXED:
        value = task["methods"][method]["metrics"]["chrf++"]["value"]
        assert value == pytest.approx(scored(said(lines, method)))
    best = max(scored([line["grid"][a][b] for line in lines]) for a in range(6) for b in range(6))
    found = task["methods"]["upper-bound"]["metrics"]
    assert found["chrf++"]["value"] == pytest.approx(best)
    assert 0 <= found["bleu"]["value"] <= 100


def test_a_changed_text_changes_the_score(rng, tmp_path):
    lines = made_lines(rng, "tumlu", selecting=(), grid=False)
    before = summary_of(lines, tmp_path)["methods"]["small_cpt"]["metrics"]["accuracy"]["value"]
    wrong = next(x for x in lines if letter(said([x], "small_cpt")[0]) != x["references"][0])
    wrong["outputs"]["small_cpt"]["text"] = wrong["references"][0]
    after = summary_of(lines, tmp_path)["methods"]["small_cpt"]["metrics"]["accuracy"]["value"]
    assert after == pytest.approx(before + 100 / 24)


def test_weights_and_perplexity_at_them(rng, tmp_path):
    pytest.importorskip("scipy")
    lines = made_lines(rng, "tumlu")
    methods = summary_of(lines, tmp_path)["methods"]
    for name in ("large_ins", "small_cpt", "small_base", "proxy-tuning", "ppl", "ent"):
        points = [(x["outputs"][name]["alpha"], x["outputs"][name]["beta"]) for x in lines]
        nats = [
            x["nll"][AXIS.index(a)][AXIS.index(b)] for x, (a, b) in zip(lines, points, strict=True)
        ]
        n = [x["n_scored"] for x in lines]
        perplexity = methods[name]["perplexity"]
        assert perplexity["micro"] == pytest.approx(math.exp(sum(nats) / sum(n)))
        assert perplexity["macro"] == pytest.approx(math.exp(np.mean(np.divide(nats, n))))
        assert methods[name]["alpha"] == pytest.approx(np.mean([a for a, _ in points]))
        assert methods[name]["beta"] == pytest.approx(np.mean([b for _, b in points]))
    # Off the axis, or moving.
    assert methods["contrastive"]["alpha"] == 1.5
    for name in ("contrastive", "continuous", "token"):
        assert methods[name]["perplexity"] is None


def test_a_run_of_fixed_methods_has_scores_and_nothing_of_a_reading(rng, tmp_path):
    lines = made_lines(rng, "tumlu", selecting=(), grid=False)
    folder = write_run(tmp_path, {"tumlu": lines})
    summary = report(folder)
    task = summary["tasks"]["tumlu"]
    assert list(task["methods"]) == list(FIXED)
    assert all(method["perplexity"] is None for method in task["methods"].values())
    assert task["gains"] == {} and task["findings"]["chosen"] == {}
    assert task["findings"]["surface"] is task["findings"]["guidance"] is None
    assert "Is the gain chance?" not in to_markdown(summary)


def test_a_users_own_task_is_read_from_its_file(rng, tmp_path):
    own = tmp_path / "mine.jsonl"
    own.write_text('{"question": "2 + 2?", "choices": ["3", "4"], "answer": "B"}\n', "utf-8")
    lines = made_lines(rng, "copa", selecting=(), grid=False)
    folder = write_run(tmp_path / "run", {"mine": lines}, task_files={"mine": str(own)})
    found = report(folder)["tasks"]["mine"]["methods"]["small_cpt"]["metrics"]["accuracy"]
    assert found["value"] == pytest.approx(accuracy(lines, said(lines, "small_cpt")))


def test_single_ggufs_are_merged_by_id(rng, tmp_path):
    pytest.importorskip("scipy")
    lines = made_lines(rng, "tumlu")
    folder = write_run(
        tmp_path,
        {"tumlu": lines},
        singles={"big": {"file": "big.gguf", "sha256": "f" * 64, "bytes": 3}},
    )
    others = made_lines(rng, "tumlu", selecting=(), grid=False)
    for line in others:
        line["outputs"] = {"big": line["outputs"]["large_ins"]}
    write_lines(folder / "tumlu.big.jsonl", others[::-1])
    summary = report(folder)
    found = summary["tasks"]["tumlu"]["methods"]["big"]
    expected = accuracy(lines, said(others, "big"))
    assert found["metrics"]["accuracy"]["value"] == pytest.approx(expected)
    # (1, 0) of a single file is no point of the trio's.
    assert found["alpha"] is found["beta"] is found["perplexity"] is None
    assert "big" in summary["mean"]["methods"] and "big.gguf" in to_markdown(summary)
    assert "big" not in report(folder, choice_scoring=True)["methods"]


def test_the_upper_bound_is_the_best_grid_point_and_no_point_is_above_it(rng, tmp_path):
    pytest.importorskip("scipy")
    lines = made_lines(rng, "tumlu")
    summary = report(write_run(tmp_path, {"tumlu": lines}))
    assert summary["oracles"] == ["upper-bound"] == summary["methods"][-1:]
    task = summary["tasks"]["tumlu"]
    values = np.array(
        [[accuracy(lines, [x["grid"][a][b] for x in lines]) for b in range(6)] for a in range(6)]
    )
    assert len(np.unique(values)) > 3
    np.testing.assert_allclose(task["findings"]["surface"]["metric"], values)
    found = task["methods"]["upper-bound"]
    assert found["metrics"]["accuracy"]["value"] == pytest.approx(values.max())
    a, b = np.unravel_index(values.argmax(), values.shape)
    assert (found["alpha"], found["beta"]) == pytest.approx((GRID[a], GRID[b]))
    nats = sum(x["nll"][a + 1][b + 1] for x in lines)
    micro = math.exp(nats / sum(x["n_scored"] for x in lines))
    assert found["perplexity"]["micro"] == pytest.approx(micro)


def test_the_share_of_the_way_to_the_upper_bound(rng, tmp_path):
    pytest.importorskip("scipy")
    lines = made_lines(rng, "tumlu", 10)
    n_right = {"large_ins": 2, "small_cpt": 6, "ppl": 4, "ent": 9}
    for at, line in enumerate(lines):
        line["references"] = ["A"]
        line["grid"] = [["A" if at < 8 else "B"] * 6] * 6
        for name, output in line["outputs"].items():
            output["text"] = "A" if at < n_right.get(name, 0) else "B"
    task = summary_of(lines, tmp_path)
    gap = task["findings"]["gap_closed"]
    expected = {"large_ins": -0.5, "small_cpt": 0.5, "ent": 1.25, "proxy-tuning": -1}
    assert {name: gap[name] for name in expected} == pytest.approx(expected)
    assert not {"ppl", "upper-bound"} & gap.keys()
    for line in lines:
        line["grid"] = [["B"] * 6] * 6  # an oracle below ppl: there is no way to go
    assert summary_of(lines, tmp_path)["findings"]["gap_closed"] == {}


def test_the_mean_over_tasks_is_drawn_from_each_by_itself(rng, tmp_path):
    """Two tasks of the same examples: drawn alike, their mean would vary as each of them does."""
    lines = made_lines(rng, "copa", 60, selecting=(), grid=False)
    summary = report(write_run(tmp_path, {"copa": lines, "tumlu": lines}), n_resamples=1000)
    one, mean = summary["tasks"]["copa"]["methods"], summary["mean"]["methods"]
    for name in FIXED:
        score = one[name]["metrics"]["accuracy"]
        assert mean[name]["value"] == pytest.approx(score["value"])
        ratio = (mean[name]["high"] - mean[name]["low"]) / (score["high"] - score["low"])
        assert ratio == pytest.approx(math.sqrt(0.5), abs=0.12)


def test_the_mean_of_one_task_is_the_task(rng, tmp_path):
    pytest.importorskip("scipy")
    summary = report(write_run(tmp_path, {"tumlu": made_lines(rng, "tumlu")}))
    task, mean = summary["tasks"]["tumlu"], summary["mean"]
    for name, score in mean["methods"].items():
        assert score == pytest.approx(task["methods"][name]["metrics"]["accuracy"])
    for why, found in mean["gains"]["ppl"].items():
        assert found == pytest.approx(task["gains"]["ppl"][why])
    assert mean["findings"]["gap_closed"] == task["findings"]["gap_closed"]


def test_a_method_that_a_task_lacks_has_no_mean(rng, tmp_path):
    pytest.importorskip("scipy")
    tasks = {"tumlu": made_lines(rng, "tumlu"), "kazqad": made_lines(rng, "kazqad")}
    summary = report(write_run(tmp_path, tasks), choice_scoring=True)
    assert summary["tasks"]["tumlu"]["by_choice"] and not summary["tasks"]["kazqad"]["by_choice"]
    assert "token" in summary["tasks"]["kazqad"]["methods"]
    assert "token" not in summary["mean"]["methods"]
    choices, texts = (summary["tasks"][name]["methods"] for name in ("tumlu", "kazqad"))
    for name in ("ppl", "ppl+cal"):  # without choices, calibrated answers are the answers
        both = (
            choices[name]["metrics"]["accuracy"]["value"],
            texts["ppl"]["metrics"]["exact_match"]["value"],
        )
        assert summary["mean"]["methods"][name]["value"] == pytest.approx(np.mean(both))


def answered(rng, n_right, n=40):
    """Lines whose methods are right on their first `n_right[method]` examples."""
    lines = made_lines(rng, "tumlu", n, selecting=("ppl",), grid=False)
    for at, line in enumerate(lines):
        line["references"] = ["A"]
        for name, output in line["outputs"].items():
            output["text"] = "A" if at < n_right.get(name, 0) else "B"
    return lines


def test_p_values_are_of_ppl_against_the_best_single_model_and_proxy_tuning(rng, tmp_path):
    pytest.importorskip("scipy")
    lines = answered(rng, {"ppl": 38, "small_cpt": 6, "large_ins": 4, "proxy-tuning": 36})
    folder = write_run(tmp_path, {"tumlu": lines})
    summary = report(folder, n_resamples=400)
    for part in (summary["tasks"]["tumlu"], summary["mean"]):
        single, proxy = part["gains"]["ppl"]["best_single"], part["gains"]["ppl"]["proxy-tuning"]
        assert single["against"] == "small_cpt" and single["p"] == 1 / 401
        assert single["low"] < single["difference"] < single["high"]
        assert single["difference"] == pytest.approx(80)
        assert proxy["difference"] == pytest.approx(5) and proxy["p"] > 0.05
        stats = [right(lines, said(lines, name)) for name in ("ppl", "proxy-tuning")]
        expected = asdict(paired_difference(*stats, share, seed=5, n_resamples=400))
        assert proxy == pytest.approx(expected | {"against": "proxy-tuning"})


def test_a_loss_has_a_small_p_value_too_and_a_tie_has_1(rng, tmp_path):
    pytest.importorskip("scipy")
    lines = answered(rng, {"ppl": 5, "small_base": 39, "proxy-tuning": 5})
    found = summary_of(lines, tmp_path)["gains"]["ppl"]
    best, tie = found["best_single"], found["proxy-tuning"]
    assert best["against"] == "small_base" and best["p"] == 1 / 61
    assert best["difference"] == pytest.approx(-85) and best["high"] < 0
    assert tie["difference"] == 0 and tie["p"] == 1

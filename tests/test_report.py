"""Laws of a run's report, on run folders that the tests write: there is no model anywhere."""

import csv
import io
import json
import math
import re

import numpy as np
import pytest

from trimix_gguf.errors import DataError
from trimix_gguf.evaluation.findings import derivative_weights, divergences
from trimix_gguf.evaluation.metrics import METRICS
from trimix_gguf.evaluation.report import load_run, summarize, to_csv, to_markdown
from trimix_gguf.evaluation.statistics import bootstrap_interval, paired_p_value

AXIS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
GRID = AXIS[1:]
FIXED = {
    "large_ins": (1.0, 0.0),
    "small_cpt": (0.0, 1.0),
    "small_base": (0.0, 0.0),
    "proxy-tuning": (1.0, 1.0),
    "contrastive": (1.5, 0.0),
}
SELECTING = ("ppl", "ppl-answers", "ppl-task", "ent", "continuous", "token")
LETTERS = ("A", "B", "C", "D")
SAID = {"tumlu": LETTERS, "copa": LETTERS[:2], "kazqad": ("Алматы", "Алматы қаласы", "Астана")}
FORMS = {"A": "A", "B": "(b) иә", "C": "С.", "D": "D\nA"}  # as models say it; a Cyrillic С


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def made_lines(rng, task, n=24, *, selecting=SELECTING, grid=True):
    """Lines of random answers; the points of those that select are at random, too."""
    said = SAID[task]
    lines = []
    for at in range(n):
        weights = dict(FIXED)
        for name in selecting:
            weights[name] = tuple(rng.choice(GRID, 2).tolist())
        if "continuous" in selecting:
            weights["continuous"] = (0.42, 0.9)
        line = {"id": f"q{at}", "references": [str(rng.choice(said))]}
        if said[0] == "A":
            line["choices"] = list(said)
        if selecting:
            n_scored = int(rng.integers(20, 90))
            line |= {
                "n_scored": n_scored,
                "nll": (n_scored * rng.uniform(1, 3, (7, 7))).round(4).tolist(),
            }
            if said[0] == "A":
                line["choice_nll"] = rng.uniform(0, 4, (len(said), 7, 7)).round(4).tolist()

        def text():
            text = str(rng.choice(said))
            return FORMS.get(text, f" {text}. ")

        line["outputs"] = {
            name: {"text": text(), "n_tokens": 2, "alpha": alpha, "beta": beta}
            for name, (alpha, beta) in weights.items()
        }
        if grid:
            line["grid"] = [[text() for _ in GRID] for _ in GRID]
        lines.append(line)
    return lines


def write_run(folder, tasks, **settings):
    """A folder of `tasks`: name -> lines; the methods are those of the lines."""
    folder.mkdir(exist_ok=True)
    [first, *_] = next(iter(tasks.values()))
    methods = [*first["outputs"], *(["upper-bound"] if "grid" in first else [])]
    model = {"file": "large.gguf", "sha256": "0123456789abcdef" * 4, "bytes": 17}
    run = {
        "format": 1, "command": ["trimix", "eval", "--lang", "kk"], "lang": "kk",
        "tasks": list(tasks), "task_files": {}, "methods": methods, "seed": 5, "limit": None,
        "n_exemplars": None, "n_ctx": 2048, "axis": AXIS, "models": {"large_ins": model},
        "singles": {}, "versions": {"trimix-gguf": "0.1.0"}, "cpu": "a CPU",
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps(run | settings), encoding="utf-8")
    for name, lines in tasks.items():
        write_lines(folder / f"{name}.jsonl", lines)
    return folder


def write_lines(path, lines):
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    path.write_text(text, encoding="utf-8")


def report(folder, **options):
    options.setdefault("n_resamples", 60)
    return summarize(load_run(folder), **options)


def letter(text):
    """The answer in one of FORMS."""
    return {form: choice for choice, form in FORMS.items()}.get(text, text)


def right(lines, texts):
    """Accuracy's statistics [n, 2], by hand."""
    right = [
        float(letter(t) == line["references"][0]) for t, line in zip(texts, lines, strict=True)
    ]
    return np.stack([right, np.ones(len(right))], axis=1)


def said(lines, method):
    return [line["outputs"][method]["text"] for line in lines]


def accuracy(lines, texts):
    return 100 * right(lines, texts)[:, 0].mean()


def share(total):
    return 100 * total[0] / total[1]


def summary_of(lines, tmp_path, **options):
    """The summary of one task, tumlu."""
    return report(write_run(tmp_path / "run", {"tumlu": lines}), **options)["tasks"]["tumlu"]


# Scores


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
    assert task["p_values"] == {} and task["findings"]["chosen"] == {}
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


# The oracle


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


# The mean over tasks


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
    for why, found in mean["p_values"].items():
        assert found == pytest.approx(task["p_values"][why])
    assert mean["findings"]["gap_closed"] == task["findings"]["gap_closed"]


def test_a_method_that_a_task_lacks_has_no_mean(rng, tmp_path):
    pytest.importorskip("scipy")
    tasks = {"tumlu": made_lines(rng, "tumlu"), "kazqad": made_lines(rng, "kazqad")}
    summary = report(write_run(tmp_path, tasks), choice_scoring=True)
    assert summary["tasks"]["tumlu"]["by_choice"] and not summary["tasks"]["kazqad"]["by_choice"]
    assert "token" in summary["tasks"]["kazqad"]["methods"]
    assert not {"token", "ppl+cal"} & summary["mean"]["methods"].keys()
    expected = [
        summary["tasks"][name]["methods"]["ppl"]["metrics"][metric]["value"]
        for name, metric in (("tumlu", "accuracy"), ("kazqad", "exact_match"))
    ]
    assert summary["mean"]["methods"]["ppl"]["value"] == pytest.approx(np.mean(expected))


# p-values


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
        single, proxy = part["p_values"]["best_single"], part["p_values"]["proxy-tuning"]
        assert single == {"against": "small_cpt", "difference": pytest.approx(80), "p": 1 / 401}
        assert proxy["difference"] == pytest.approx(5) and proxy["p"] > 0.05
        stats = [right(lines, said(lines, name)) for name in ("ppl", "proxy-tuning")]
        assert proxy["p"] == paired_p_value(*stats, share, seed=5, n_resamples=400)


def test_a_loss_has_a_small_p_value_too_and_a_tie_has_1(rng, tmp_path):
    pytest.importorskip("scipy")
    lines = answered(rng, {"ppl": 5, "small_base": 39, "proxy-tuning": 5})
    found = summary_of(lines, tmp_path)["p_values"]
    assert found["best_single"] == {
        "against": "small_base", "difference": pytest.approx(-85), "p": 1 / 61
    }  # fmt: skip
    assert found["proxy-tuning"] == {"against": "proxy-tuning", "difference": 0, "p": 1}


# Choices by likelihood


def test_choice_scoring_takes_the_choice_of_the_fewest_nats(rng, tmp_path):
    pytest.importorskip("scipy")
    lines = made_lines(rng, "tumlu")
    for line in lines[::3]:  # fewer choices than others
        line["choices"], line["choice_nll"] = line["choices"][:2], line["choice_nll"][:2]
    summary = report(write_run(tmp_path, {"tumlu": lines}), choice_scoring=True)
    methods = summary["tasks"]["tumlu"]["methods"]
    assert not {"contrastive", "continuous", "token"} & set(summary["methods"])
    nats = [np.array(line["choice_nll"]) for line in lines]
    prior = [np.mean([n[k] for n in nats if len(n) > k], axis=0) for k in range(4)]
    calibrated = [n - prior[: len(n)] for n in nats]

    def value(nats, points):
        found = [
            line["choices"][int(n[:, a, b].argmin())] == line["references"][0]
            for n, (a, b), line in zip(nats, points, lines, strict=True)
        ]
        return 100 * np.mean(found)

    for name in ("large_ins", "proxy-tuning", "ppl", "ppl-answers", "ent"):
        chosen = [(x["outputs"][name]["alpha"], x["outputs"][name]["beta"]) for x in lines]
        points = [(AXIS.index(a), AXIS.index(b)) for a, b in chosen]
        for suffix, known in (("", nats), ("+cal", calibrated)):
            found = methods[name + suffix]["metrics"]["accuracy"]["value"]
            assert found == pytest.approx(value(known, points))
    findings = summary["tasks"]["tumlu"]["findings"]
    for name, known in (("upper-bound", nats), ("upper-bound+cal", calibrated)):
        every = [[value(known, [(a, b)] * 24) for b in range(1, 7)] for a in range(1, 7)]
        assert methods[name]["metrics"]["accuracy"]["value"] == pytest.approx(np.max(every))
        if name == "upper-bound":
            np.testing.assert_allclose(findings["surface"]["metric"], every)
    assert summary["oracles"] == ["upper-bound", "upper-bound+cal"]


def test_calibration_forgets_what_a_choice_gets_anyway(rng, tmp_path):
    pytest.importorskip("scipy")
    lines = made_lines(rng, "tumlu")
    before = summary_of(lines, tmp_path, choice_scoring=True)["methods"]
    bias = np.array([0.0, 5, -3, 1])[:, None, None]  # of a letter, for every example
    for line in lines:
        line["choice_nll"] = (np.array(line["choice_nll"]) + bias).tolist()
    after = summary_of(lines, tmp_path, choice_scoring=True)["methods"]
    assert after["ppl+cal"] == before["ppl+cal"]
    assert after["ppl"] != before["ppl"]


def informed(nll):
    """Mutual information of question and choice [n, n], from nats [n, n_choices, n, n]."""
    p = np.exp(-nll) / np.exp(-nll).sum(axis=1, keepdims=True)
    mean = p.mean(axis=0, keepdims=True)
    return (p * np.log(p / mean)).sum(axis=1).mean(axis=0)


def test_mi_takes_the_point_where_answers_tell_most_of_their_questions(rng, tmp_path):
    pytest.importorskip("scipy")
    lines = made_lines(rng, "tumlu", n=30)
    nats = np.array([line["choice_nll"] for line in lines])
    a, b = np.unravel_index(informed(nats)[1:, 1:].argmax(), (6, 6))
    expected = {True: [LETTERS[n[:, a + 1, b + 1].argmin()] for n in nats]}
    expected[False] = [line["grid"][a][b] for line in lines]
    for by_choice, texts in expected.items():
        found = summary_of(lines, tmp_path, choice_scoring=by_choice)["methods"]["mi"]
        assert (found["alpha"], found["beta"]) == pytest.approx((GRID[a], GRID[b]))
        assert found["metrics"]["accuracy"]["value"] == pytest.approx(accuracy(lines, texts))
    for line in lines:  # there one choice is by far the likeliest for every question
        line["choice_nll"][0][a + 1][b + 1] -= 50
    collapsed = summary_of(lines, tmp_path)["methods"]["mi"]
    assert (collapsed["alpha"], collapsed["beta"]) != pytest.approx((GRID[a], GRID[b]))
    assert "mi" not in summary_of(lines[:9], tmp_path)["methods"]  # too few to tell by


def test_mi_of_a_task_without_choices_is_ppl_answers(rng, tmp_path):
    pytest.importorskip("scipy")
    run = write_run(tmp_path / "run", {"kazqad": made_lines(rng, "kazqad")})
    methods = report(run)["tasks"]["kazqad"]["methods"]
    assert methods["mi"] == methods["ppl-answers"] != methods["ppl"]


def test_the_way_to_the_upper_bound_has_no_other_oracle_on_it(rng, tmp_path):
    pytest.importorskip("scipy")
    lines = made_lines(rng, "tumlu")
    for line in lines:
        line["outputs"]["ppl"] |= {"alpha": 0.1, "beta": 0.1}
        wrong = line["choices"].index(line["references"][0]) - 1
        line["choice_nll"][wrong][1][1] = -1.0
    task = summary_of(lines, tmp_path, choice_scoring=True)
    assert task["methods"]["ppl"]["metrics"]["accuracy"]["value"] == 0
    expected = set(task["methods"]) - {"ppl", "upper-bound", "upper-bound+cal"}
    assert task["findings"]["gap_closed"].keys() == expected


def test_choice_scoring_of_a_run_that_scored_none_is_refused(rng, tmp_path):
    folder = write_run(tmp_path, {"tumlu": made_lines(rng, "tumlu", selecting=(), grid=False)})
    with pytest.raises(DataError, match="has no scores of choices"):
        report(folder, choice_scoring=True)


# Findings


def test_chosen_points_by_hand(rng, tmp_path):
    pytest.importorskip("scipy")
    lines = made_lines(rng, "tumlu", 4)
    points = [(0.1, 0.9), (0.1, 0.9), (0.5, 0.5), (1.0, 0.1)]
    for line, (alpha, beta) in zip(lines, points, strict=True):
        line["outputs"]["ppl"] |= {"alpha": alpha, "beta": beta}
        line["outputs"]["continuous"] |= {"alpha": 0.0, "beta": 0.3}
    lines[0]["outputs"]["continuous"]["alpha"] = 0.6
    found = summary_of(lines, tmp_path)["findings"]["chosen"]
    assert list(found) == list(SELECTING)
    counts = np.array(found["ppl"].pop("counts"))
    assert counts[0, 4] == 2 and counts[2, 2] == counts[5, 0] == 1 and counts.sum() == 4
    assert found["ppl"] == {
        "beta_above_alpha": 0.5, "mean_ratio": pytest.approx((9 + 9 + 1 + 0.1) / 4), "off_grid": 0
    }  # fmt: skip
    # Where alpha is 0 the ratio has no value.
    assert found["continuous"]["mean_ratio"] == pytest.approx(0.5)
    assert found["continuous"]["off_grid"] == 4


def test_rank_correlation_over_the_grid(rng, tmp_path):
    pytest.importorskip("scipy")
    lines = made_lines(rng, "tumlu", 36)
    order = rng.permutation(36).reshape(6, 6)  # of the points, by perplexity
    for at, line in enumerate(lines):
        line["references"] = ["A"]
        line["grid"] = [["A" if at >= rank else "B" for rank in row] for row in order]
        nll = np.array(line["nll"])
        nll[1:, 1:] = line["n_scored"] * (1 + order)
        line["nll"] = nll.tolist()
    found = summary_of(lines, tmp_path)["findings"]["surface"]
    assert found["spearman"] == pytest.approx(-1)
    np.testing.assert_allclose(found["mean_nll"], 1 + order)
    for line in lines:
        line["grid"] = [["B"] * 6] * 6
    assert summary_of(lines, tmp_path)["findings"]["surface"]["spearman"] is None


def test_nats_of_the_surface_are_macro(rng, tmp_path):
    pytest.importorskip("scipy")
    lines = made_lines(rng, "tumlu")
    means = [np.array(line["nll"])[1:, 1:] / line["n_scored"] for line in lines]
    found = summary_of(lines, tmp_path)["findings"]["surface"]
    np.testing.assert_allclose(found["mean_nll"], np.mean(means, axis=0))


def log_softmax(logits):
    top = logits.max(axis=-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(axis=-1, keepdims=True))


def row_of_nlls(rng, n_tokens, spread):
    """Nats over AXIS² of a random text at alpha = 0 (nan elsewhere), and the true divergence."""
    base = rng.normal(0, 2, (n_tokens, 300))
    cpt = base + rng.normal(0, spread, base.shape)
    targets = rng.integers(0, 300, n_tokens)
    nll = np.full((7, 7), np.nan)
    for at, beta in enumerate(AXIS):
        fused = log_softmax(base + beta * (cpt - base))
        nll[0, at] = -fused[np.arange(n_tokens), targets].sum()
    log_cpt, log_base = log_softmax(cpt), log_softmax(base)
    return nll, (np.exp(log_cpt) * (log_cpt - log_base)).sum()


@pytest.mark.parametrize(("spread", "rel"), [(0.1, 1e-5), (0.5, 1e-5), (1.0, 1e-3), (2.0, 0.01)])
def test_divergence_without_logits_is_the_one_of_the_logits(rng, spread, rel):
    """The targets are no draws from either model: what depends on them cancels."""
    made = [row_of_nlls(rng, n, spread) for n in (5, 40, 200)]
    found = divergences(np.stack([nll for nll, _ in made]), AXIS)
    assert found == pytest.approx([true for _, true in made], rel=rel)
    assert found[0] < found[1] < found[2]


def test_derivative_weights_are_exact_for_polynomials(rng):
    polynomial = np.polynomial.Polynomial(rng.normal(size=7))
    for at in (0.0, 0.2, 1.0):
        found = derivative_weights(AXIS, at) @ polynomial(np.array(AXIS))
        assert found == pytest.approx(polynomial.deriv()(at))


def test_beta_follows_the_divergence_per_token(rng, tmp_path):
    """Not the sum's: the longest prompts are those of the least divergence a token."""
    pytest.importorskip("scipy")
    lines = made_lines(rng, "tumlu", 6)
    true = []
    for at, line in enumerate(lines):
        line["n_scored"] = 20 * (10 - at)
        nll, total = row_of_nlls(rng, line["n_scored"], 0.3 + 0.05 * at)
        line["nll"] = np.nan_to_num(nll, nan=line["n_scored"]).tolist()
        line["outputs"]["ppl"]["beta"] = GRID[at]
        true.append(total / line["n_scored"])
    found = summary_of(lines, tmp_path)["findings"]["guidance"]
    assert found["spearman"] == pytest.approx(1)
    assert found["mean_divergence"] == pytest.approx(np.mean(true), rel=1e-4)
    for line in lines:
        line["outputs"]["ppl"]["beta"] = 0.9
    assert summary_of(lines, tmp_path)["findings"]["guidance"]["spearman"] is None


def test_a_summary_is_json_and_comes_out_the_same_again(rng, tmp_path):
    pytest.importorskip("scipy")
    tasks = {"tumlu": made_lines(rng, "tumlu"), "kazqad": made_lines(rng, "kazqad", 3)}
    folder = write_run(tmp_path, tasks)
    text = json.dumps(report(folder), allow_nan=False)
    assert text == json.dumps(report(folder))
    assert json.loads(text) == report(folder) | {"run": json.loads(text)["run"]}


# Tables


@pytest.fixture
def two_tasks(rng, tmp_path):
    pytest.importorskip("scipy")
    tasks = {"tumlu": made_lines(rng, "tumlu"), "kazqad": made_lines(rng, "kazqad")}
    return write_run(tmp_path / "two", tasks)


def markdown_table(text, title):
    """Rows of the table under a heading: dicts by the header."""
    [section] = re.findall(rf"^## {re.escape(title)}\n\n((?:\|.*\n)+)", text, re.M)
    header, _, *rows = [
        [cell.strip() for cell in line.strip("|").split(" | ")] for line in section.splitlines()
    ]
    return [dict(zip(header, row, strict=True)) for row in rows]


def columns_of(summary):
    """Main scores by the title of their column."""
    tumlu, kazqad = (summary["tasks"][name]["methods"] for name in ("tumlu", "kazqad"))
    return {
        "tumlu (accuracy)": {m: found["metrics"]["accuracy"] for m, found in tumlu.items()},
        "kazqad (exact match)": {m: found["metrics"]["exact_match"] for m, found in kazqad.items()},
        "mean": summary["mean"]["methods"],
    }


def test_markdown_reads_back_as_the_summary(two_tasks):
    summary = report(two_tasks)
    text = to_markdown(summary)
    rows = markdown_table(text, "Methods compared, kk")
    names = [row["method"] for row in rows]
    assert names == [*summary["methods"][:-1], "upper-bound (oracle)"]
    for title, scores in columns_of(summary).items():
        best = max(score["value"] for name, score in scores.items() if name != "upper-bound")
        for row, name in zip(rows, summary["methods"], strict=True):
            score, cell = scores[name], row[title]
            is_best = score["value"] == best and name != "upper-bound"
            assert cell.startswith("**") == cell.endswith("**") == is_best
            numbers = [float(number) for number in re.findall(r"[\d.]+", cell)]
            assert numbers == pytest.approx([score[k] for k in ("value", "low", "high")], abs=0.051)
            assert re.fullmatch(r"\*{0,2}[\d.]+ \[[\d.]+, [\d.]+\]\*{0,2}", cell)
    others = markdown_table(text, "Other metrics")
    assert list(others[0]) == ["method", "kazqad (F1)"]


def test_markdown_says_what_it_rests_on(two_tasks):
    summary = report(two_tasks)
    text = to_markdown(summary)
    rows = markdown_table(text, "Is the gain chance?")
    assert [row["task"] for row in rows] == ["tumlu"] * 2 + ["kazqad"] * 2 + ["mean"] * 2
    assert "the best single model on these examples" in rows[0]["ppl against"]
    assert float(rows[1]["p"]) == pytest.approx(
        summary["tasks"]["tumlu"]["p_values"]["proxy-tuning"]["p"], abs=6e-4
    )
    chosen = markdown_table(text, "Chosen weights")
    assert [(row["task"], row["method"]) for row in chosen][:2] == [
        ("tumlu", "ppl"), ("tumlu", "ppl-answers")
    ]  # fmt: skip
    gaps = markdown_table(text, "Share of the way from ppl to the oracle")
    assert list(gaps[0]) == ["method", "tumlu", "kazqad", "mean"]
    guides = markdown_table(text, "Does perplexity guide?")
    rho = summary["tasks"]["tumlu"]["findings"]["surface"]["spearman"]
    assert float(guides[0]["rho over points"]) == pytest.approx(rho, abs=0.006)
    for part in (
        "tumlu 24, kazqad 24", "seed 5", "95%", "60 resamples", "sha256 0123456789ab", "a CPU",
        "trimix-gguf 0.1.0", "trimix eval --lang kk", "is an oracle",
    ):  # fmt: skip
        assert part in text
    assert "0123456789abc" not in text


def test_csv_reads_back_as_the_summary(two_tasks):
    summary = report(two_tasks)
    rows = list(csv.DictReader(io.StringIO(to_csv(summary))))
    assert [row["method"] for row in rows] == summary["methods"]
    for title, scores in columns_of(summary).items():
        for row in rows:
            score = scores[row["method"]]
            assert float(row[title]) == pytest.approx(score["value"], abs=1e-4)
            assert float(row[f"{title} low"]) == pytest.approx(score["low"], abs=1e-4)
            assert float(row[f"{title} high"]) == pytest.approx(score["high"], abs=1e-4)


def test_tables_leave_open_what_a_task_lacks(two_tasks):
    summary = report(two_tasks, choice_scoring=True)
    [token] = [
        row
        for row in markdown_table(to_markdown(summary), "Methods compared, kk")
        if row["method"] == "token"
    ]
    assert token["tumlu (accuracy, by choice)"] == token["mean"] == "–"
    assert "[" in token["kazqad (exact match)"]
    rows = {row["method"]: row for row in csv.DictReader(io.StringIO(to_csv(summary)))}
    assert rows["token"]["mean"] == rows["token"]["tumlu (accuracy, by choice) low"] == ""
    assert "batch" not in to_csv(summary) and "+cal: less" in to_markdown(summary)


# The picture


def png(figure):
    data = io.BytesIO()
    figure.savefig(data, dpi=40)
    assert data.getvalue().startswith(b"\x89PNG") and len(data.getvalue()) > 5000
    return figure


def test_the_picture_has_three_panels_a_task(two_tasks):
    pytest.importorskip("matplotlib")
    from trimix_gguf.evaluation.plots import draw

    run = load_run(two_tasks)
    summary = summarize(run, n_resamples=60)
    figure = png(draw(run, summary))
    panels = [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]
    assert len(panels) == 6
    bars, density, scatter = panels[:3]
    values = [bar.get_width() for bar in bars.patches]
    methods = summary["tasks"]["tumlu"]["methods"]
    assert values == [found["metrics"]["accuracy"]["value"] for found in methods.values()]
    assert [label.get_text() for label in bars.get_yticklabels()] == list(methods)
    counts = np.array(summary["tasks"]["tumlu"]["findings"]["chosen"]["ppl"]["counts"])
    np.testing.assert_allclose(density.images[0].get_array(), counts / 24)
    found = summary["tasks"]["tumlu"]["findings"]["surface"]
    dots = np.array(scatter.collections[0].get_offsets())
    np.testing.assert_allclose(dots[:, 0], np.exp(np.ravel(found["mean_nll"])))
    np.testing.assert_allclose(dots[:, 1], np.ravel(found["metric"]))
    assert f"{found['spearman']:.2f}" in scatter.get_title()


def test_the_picture_of_fixed_methods_is_bars_alone(rng, tmp_path):
    pytest.importorskip("matplotlib")
    from trimix_gguf.evaluation.plots import draw

    lines = made_lines(rng, "tumlu", selecting=(), grid=False)
    for line in lines:
        line["references"] = ["D"]
        line["outputs"] = {name: {**o, "text": "A"} for name, o in line["outputs"].items()}
    run = load_run(write_run(tmp_path, {"tumlu": lines}))
    assert len(png(draw(run, summarize(run, n_resamples=20))).axes) == 1


# What cannot be read


def spoil(key, value):
    """Set a field of line 3."""

    def spoiled(folder):
        lines = [
            json.loads(line) for line in (folder / "tumlu.jsonl").read_text("utf-8").splitlines()
        ]
        lines[2][key] = value
        write_lines(folder / "tumlu.jsonl", lines)

    return spoiled


def settings(**changed):
    def spoiled(folder):
        run = json.loads((folder / "run.json").read_text("utf-8"))
        (folder / "run.json").write_text(json.dumps(run | changed), "utf-8")

    return spoiled


def cut(folder):
    raw = (folder / "tumlu.jsonl").read_bytes()
    (folder / "tumlu.jsonl").write_bytes(raw[:-40])


FAULTS = {
    "no run.json": (lambda f: (f / "run.json").unlink(), "there is no run.json"),
    "run.json cut": (lambda f: (f / "run.json").write_text('{"format": 1,'), "is not JSON"),
    "another file": (lambda f: (f / "run.json").write_text("[1]"), "expected a JSON object"),
    "a later format": (settings(format=2), "format 2, expected 1"),
    "no seed": (settings(seed=None), "'seed' should be a number"),
    "no tasks": (settings(tasks=[]), "'tasks' should be names"),
    "an axis without 0": (settings(axis=[0.5, 1.0]), "'axis' should be"),
    "an axis of texts": (settings(axis=["0", "1"]), "'axis' should be"),
    "a task unknown": (settings(tasks=["tumblr"]), "no task 'tumblr'"),
    "a task not run": (settings(tasks=["tumlu", "copa"]), "copa.jsonl is missing or empty"),
    "nothing done": (lambda f: (f / "tumlu.jsonl").write_text(""), "is missing or empty"),
    "a line cut": (cut, "half a line; give the run's command again"),
    "a method not run": (settings(methods=["ppl", "ppl-other"]), ":1: there is no answer of"),
    "a single not run": (settings(singles={"big": {}}), "tumlu.big.jsonl is missing or empty"),
    "an id twice": (spoil("id", "q1"), r":3: example 'q1' comes a second time"),
    "an id as number": (spoil("id", 7), ":3: field 'id' should be a text"),
    "no reference": (spoil("references", []), ":3: there is no reference"),
    "references of numbers": (spoil("references", [4]), ":3: field 'references' should be texts"),
    "an output of no weights": (spoil("outputs", {"large_ins": {"text": ""}}), ":3: field 'alpha'"),
    "nats of another axis": (spoil("nll", [[1.0] * 6] * 6), ":3: 'nll' should be 7 × 7"),
    "nats not finite": (spoil("nll", [[math.nan] * 7] * 7), ":3: 'nll' should be 7 × 7, finite"),
    "nats of texts": (spoil("nll", "none"), ":3: 'nll' should be"),
    "a choice not scored": (spoil("choice_nll", [[[1.0] * 7] * 7]), "should be 4 × 7 × 7"),
    "a token count": (spoil("n_scored", [3]), ":3: 'n_scored' should be a number"),
    "a grid's row short": (spoil("grid", [["A"] * 6] * 5), ":3: 'grid' should be 6 × 6 texts"),
    "a grid of numbers": (spoil("grid", [[1] * 6] * 6), ":3: 'grid' should be 6 × 6 texts"),
    "a grid of letters": (spoil("grid", ["ABCDEF"] * 6), ":3: 'grid' should be 6 × 6 texts"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_be_read_is_said_in_one_line(fault, rng, tmp_path):
    folder = write_run(tmp_path, {"tumlu": made_lines(rng, "tumlu", 4)})
    load_run(folder)
    harm, message = FAULTS[fault]
    harm(folder)
    with pytest.raises(DataError, match=message) as caught:
        load_run(folder)
    assert "\n" not in str(caught.value)


def test_a_line_without_the_others_reading_is_damaged(rng, tmp_path):
    lines = made_lines(rng, "tumlu", 4)
    del lines[3]["nll"]
    with pytest.raises(DataError, match=":4: 'nll' should be 7 × 7"):
        load_run(write_run(tmp_path, {"tumlu": lines}))


@pytest.mark.parametrize(("n", "n_single", "file"), [(6, 4, "tumlu.big"), (4, 6, "tumlu")])
def test_missing_examples_are_counted_and_the_first_is_named(n, n_single, file, rng, tmp_path):
    folder = write_run(tmp_path, {"tumlu": made_lines(rng, "tumlu", n)}, singles={"big": {}})
    others = made_lines(rng, "tumlu", n_single, selecting=(), grid=False)
    for line in others:
        line["outputs"] = {"big": line["outputs"]["large_ins"]}
    write_lines(folder / "tumlu.big.jsonl", others)
    expected = rf"{re.escape(file)}\.jsonl lacks 2 of 6 examples, 'q4' first; give the run's"
    with pytest.raises(DataError, match=expected):
        load_run(folder)


def test_text_may_hold_unicodes_line_separators(rng, tmp_path):
    """JSON leaves U+2028 and U+0085 as they are, and str.splitlines ends a line at them."""
    lines = made_lines(rng, "tumlu", 4, selecting=(), grid=False)
    lines[1]["outputs"]["ppl"] = lines[1]["outputs"]["small_cpt"]
    lines[1]["outputs"]["small_cpt"]["text"] = "A\u2028B\x85C"
    run = load_run(write_run(tmp_path, {"tumlu": lines}))
    assert run.tasks["tumlu"].texts["small_cpt"][1] == "A\u2028B\x85C"

"""Choices by their likelihood, and the criterion made of them."""

import numpy as np
import pytest
from made_runs import AXIS, GRID, LETTERS, accuracy, made_lines, report, summary_of, write_run

from trimix_gguf.errors import DataError
from trimix_gguf.roles import ROLES


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


def test_calibrated_choices_are_compared_with_the_best_of_the_others_either_way(rng, tmp_path):
    pytest.importorskip("scipy")
    task = summary_of(made_lines(rng, "tumlu"), tmp_path, choice_scoring=True)
    values = {name: m["metrics"]["accuracy"]["value"] for name, m in task["methods"].items()}
    gains = task["gains"]
    criteria = ["ppl", "ppl-answers", "mi"]
    assert list(gains) == [*criteria, *(f"{name}+cal" for name in criteria)]
    for ours in gains:
        forms = ("", "+cal") if ours.endswith("+cal") else ("",)
        singles = [f"{role}{form}" for role in ROLES for form in forms]
        for why, rivals in (
            ("best_single", singles), ("proxy-tuning", [f"proxy-tuning{form}" for form in forms])
        ):  # fmt: skip
            found, best = gains[ours][why], max(values[name] for name in rivals)
            assert found["against"] in rivals and values[found["against"]] == best
            assert found["difference"] == pytest.approx(values[ours] - best)


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


def test_mi_of_a_task_without_choices_is_mi_answers(rng, tmp_path):
    pytest.importorskip("scipy")
    run = write_run(tmp_path / "run", {"kazqad": made_lines(rng, "kazqad")})
    methods = report(run)["tasks"]["kazqad"]["methods"]
    assert methods["mi"] == methods["mi-answers"] != methods["ppl-answers"]


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

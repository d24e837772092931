"""Run folders with random answers, as trimix eval writes them; there is no model anywhere."""

import json

import numpy as np

from trimix_gguf.evaluation.reporting.report import summarize
from trimix_gguf.evaluation.run_files.loading import load_run

AXIS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
GRID = AXIS[1:]
FIXED = {
    "large_ins": (1.0, 0.0),
    "small_cpt": (0.0, 1.0),
    "small_base": (0.0, 0.0),
    "proxy-tuning": (1.0, 1.0),
    "contrastive": (1.5, 0.0),
}
SELECTING = ("ppl", "ppl-answers", "ppl-task", "ent", "continuous", "token", "mi-answers")
LETTERS = ("A", "B", "C", "D")
SAID = {"tumlu": LETTERS, "copa": LETTERS[:2], "kazqad": ("Алматы", "Алматы қаласы", "Астана")}
FORMS = {"A": "A", "B": "(b) иә", "C": "С.", "D": "D\nA"}  # as models say it; a Cyrillic С


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

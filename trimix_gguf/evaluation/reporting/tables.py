"""A run's summary as tables: Markdown for people, CSV for programs."""

import csv
import io
import shlex
from collections.abc import Iterable, Mapping, Sequence

from trimix_gguf.choosing.methods import INFORMATIVE, MI_ANSWERS, ORACLE
from trimix_gguf.evaluation.names.compared import CALIBRATED
from trimix_gguf.evaluation.names.settings import RACE_P
from trimix_gguf.evaluation.reporting.summary import MeanSummary, Score, Summary, TaskSummary
from trimix_gguf.evaluation.run_files.record import ModelRecord, RunRecord
from trimix_gguf.evaluation.tasks.metrics import METRICS

Scores = Mapping[str, Score]  # by method

_NONE = "–"
_N_CHOSEN = 3  # points named of those that a method chose
_RIVALS = {"best_single": "the best single model on these examples", "proxy-tuning": ""}


def to_csv(summary: Summary) -> str:
    """The main table, a row per method: its value, low and high for each task and the mean."""
    columns = _main_columns(summary)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    parts = ("", " low", " high")
    writer.writerow(["method", *(title + part for title in columns for part in parts)])
    for method in summary["methods"]:
        cells: list[str] = []
        for scores in columns.values():
            score = scores.get(method)
            numbers = (score["value"], score["low"], score["high"]) if score else ()
            cells += [f"{number:.4f}" for number in numbers] or [""] * 3
        writer.writerow([method, *cells])
    return text.getvalue()


def to_markdown(summary: Summary) -> str:
    """The main table; p-values, findings, how all of it was computed, and what follows."""
    main = _main_columns(summary)
    others = _metric_columns(summary, slice(1, None))
    caption = (
        f"[low, high]: {summary['level']:.0%} bootstrap interval over examples. "
        "The best is bold, oracles left out."
    )
    sections = {
        f"Methods compared, {summary['runs'][0]['lang']}": f"{_scores(summary, main)}\n\n{caption}",
        "Other metrics": _scores(summary, others) if others else "",
        "Is the gain chance?": _gains(summary),
        "Weights and the prompts' perplexity": _weights(summary),
        "Does perplexity guide?": _guidance(summary),
        "Chosen weights": _chosen(summary),
        "Share of the way from ppl to the oracle": _gaps(summary),
        "Conventions": _conventions(summary),
        "Which method to use": summary["mean"]["conclusion"]["sentence"],
    }
    return "\n\n".join(f"## {title}\n\n{text}" for title, text in sections.items() if text) + "\n"


def _main_columns(summary: Summary) -> dict[str, Scores]:
    return {**_metric_columns(summary, slice(1)), "mean": summary["mean"]["methods"]}


def _metric_columns(summary: Summary, which: slice) -> dict[str, Scores]:
    """The scores of each task by metric; a column is named after both."""
    return {
        f"{name} ({METRICS[metric].name}{', by choice' * task['by_choice']})": {
            method: found["metrics"][metric] for method, found in task["methods"].items()
        }
        for name, task in summary["tasks"].items()
        for metric in task["metrics"][which]
    }


def _scores(summary: Summary, columns: Mapping[str, Scores]) -> str:
    best = {
        title: max(
            score["value"] for name, score in scores.items() if name not in summary["oracles"]
        )
        for title, scores in columns.items()
        if any(name not in summary["oracles"] for name in scores)
    }
    rows = []
    for method in summary["methods"]:
        if not any(method in scores for scores in columns.values()):
            continue
        row = [_label(summary, method)]
        for title, scores in columns.items():
            score = scores.get(method)
            text = "{value:.1f} [{low:.1f}, {high:.1f}]".format(**score) if score else _NONE
            is_best = score and method not in summary["oracles"] and score["value"] == best[title]
            row.append(f"**{text}**" if is_best else text)
        rows.append(row)
    return _table(["method", *columns], rows)


def _label(summary: Summary, method: str) -> str:
    return f"{method} (oracle)" if method in summary["oracles"] else method


def _parts(summary: Summary) -> dict[str, TaskSummary | MeanSummary]:
    """The tasks and their mean, by title."""
    return {**summary["tasks"], "mean": summary["mean"]}


def _gains(summary: Summary) -> str:
    rows = [
        [
            part,
            ours,
            f"{found['against']}, {_RIVALS[why]}" if _RIVALS[why] else found["against"],
            "{difference:+.1f} [{low:.1f}, {high:.1f}]".format(**found),
            f"{found['p']:.3f}",
        ]
        for part, task in _parts(summary).items()
        for ours, rivals in task["gains"].items()
        for why, found in rivals.items()
    ]
    return _table(["task", "method", "against", "difference", "p"], rows) if rows else ""


def _weights(summary: Summary) -> str:
    rows = []
    for method in summary["methods"]:
        if method.endswith(CALIBRATED) and method not in summary["oracles"]:
            continue  # its weights are those of the method without it
        row = [_label(summary, method)]
        for task in summary["tasks"].values():
            found = task["methods"].get(method)
            text = _NONE
            if found and found["alpha"] is not None:
                text = f"({found['alpha']:.2f}, {found['beta']:.2f})"
            if found and found["perplexity"] is not None:
                text += "; {micro:.2f}, {macro:.2f}".format(**found["perplexity"])
            row.append(text)
        rows.append(row)
    table = _table(["method", *summary["tasks"]], rows)
    return f"{table}\n\n(mean alpha, mean beta); micro and macro perplexity of the prompts there."


def _guidance(summary: Summary) -> str:
    rows = []
    for name, task in summary["tasks"].items():
        points, examples = task["findings"]["surface"], task["findings"]["guidance"]
        if points or examples:
            texts = [
                _number(points and points["spearman"]),
                _number(examples and examples["spearman"]),
                _number(examples and examples["mean_divergence"]),
            ]
            rows.append([name, *texts])
    if not rows:
        return ""
    table = _table(["task", "rho over points", "rho over examples", "divergence"], rows)
    return (
        f"{table}\n\nSpearman's rho, over the grid's points: mean nats of the prompts against the "
        "metric (below 0: low perplexity answers well); over examples: beta of ppl against the "
        "divergence of small_cpt from small_base, in nats a token of the prompt."
    )


def _chosen(summary: Summary) -> str:
    grid, rows = summary["grid"], []
    for name, task in summary["tasks"].items():
        for method, found in task["findings"]["chosen"].items():
            counts = {
                (alpha, beta): count
                for alpha, row in zip(grid, found["counts"], strict=True)
                for beta, count in zip(grid, row, strict=True)
                if count
            }
            most = sorted(counts.items(), key=lambda item: -item[1])[:_N_CHOSEN]
            points = [f"({a:g}, {b:g}) {count / task['n']:.0%}" for (a, b), count in most]
            if found["off_grid"]:
                points.append(f"between the points {found['off_grid'] / task['n']:.0%}")
            above = f"{found['beta_above_alpha']:.0%}"
            rows.append([name, method, above, _number(found["mean_ratio"]), ", ".join(points)])
    header = ["task", "method", "beta > alpha", "mean beta / alpha", "most chosen (alpha, beta)"]
    return _table(header, rows) if rows else ""


def _gaps(summary: Summary) -> str:
    parts = {title: part for title, part in _parts(summary).items() if _gap(part)}
    methods = [name for name in summary["methods"] if any(name in _gap(p) for p in parts.values())]
    rows = [[name, *(_share(_gap(part).get(name)) for part in parts.values())] for name in methods]
    return _table(["method", *parts], rows) if rows else ""


def _gap(part: TaskSummary | MeanSummary) -> dict[str, float]:
    return part["findings"]["gap_closed"]


def _examples(run: RunRecord, summary: Summary) -> str:
    sizes = []
    for name in run["tasks"]:
        n = summary["tasks"][name]["n"]
        wanted = run.get("n_questions", {}).get(name, n)
        sizes.append(f"{name} {n}" + (f" of {wanted} (unfinished)" if n != wanted else ""))
    limit, shown = run.get("limit"), run.get("n_exemplars")
    return (
        f"Examples: {', '.join(sizes)}" + ("" if limit is None else f" (--limit {limit})") + "; "
        f"exemplars: {'as many as each task has' if shown is None else shown}; "
        f"n_ctx {run.get('n_ctx')}, seed {run['seed']}."
    )


def _conventions(summary: Summary) -> str:
    runs = summary["runs"]
    lines = [
        *(_examples(run, summary) for run in runs),
        f"Intervals: percentile bootstrap over examples, {summary['level']:.0%}, "
        f"{summary['n_resamples']} resamples; the mean draws each task's by themselves.",
        "p: paired bootstrap of the main metric, two-sided; not corrected for how many are shown.",
        f"{ORACLE} is an oracle: for each task the grid point that these very labels favour; its "
        "interval takes the point as given.",
        "Perplexity: micro = exp(Σ nats / Σ tokens), macro = exp(mean over prompts of mean nats).",
        "token changes its weights as it goes; shown are those that it starts with.",
    ]
    if any({"chrf++", "bleu"} & {*task["metrics"]} for task in summary["tasks"].values()):
        lines.append(
            "chrF++ and BLEU: sacrebleu's; chrF++ without case (case:lc, nw:2), BLEU as it is by "
            "default (case:mixed, tok:13a)."
        )
    if INFORMATIVE in summary["methods"]:
        lines.append(
            f"{INFORMATIVE}: one pair a task, of the most mutual information between its questions "
            "and the probabilities of their choices, no label being looked at; where a task has no "
            f"choices, it is {MI_ANSWERS}."
        )
    if summary["choice_scoring"]:
        lines.append(
            "Choices: the one of the fewest nats after the prompt, not divided by its length; "
            f"{CALIBRATED}: less its mean over the task's examples. Methods off the grid have none."
            " In the mean a task without choices counts by its texts."
        )
    if any(run.get("fill_loops") for run in runs):
        lines.append(
            "--fill-loops: an answer that only repeated itself was filled up to its limit, not"
            " decoded."
        )
    if any(run.get("race") for run in runs):
        lines.append(
            f"--race: where answers are free text, {ORACLE} is the best of the grid points that"
            " were not left on the way, as worse than the leader (paired t test, one-sided,"
            f" p < {RACE_P})."
        )
    for run in runs:
        files: dict[str, ModelRecord] = {**run["models"], **(run.get("singles") or {})}
        lines += [f"{name}: {_file(file)}" for name, file in files.items()]
    for run in runs:
        versions = [f"{name} {version}" for name, version in (run.get("versions") or {}).items()]
        lines.append(", ".join([*versions, *([run["cpu"]] if run.get("cpu") else [])]))
    text = "\n".join(f"- {line}" for line in dict.fromkeys(lines) if line)
    commands = [shlex.join(str(part) for part in run.get("command") or ()) for run in runs]
    listed = "\n".join(command for command in commands if command)
    return f"{text}\n\n```\n{listed}\n```" if listed else text


def _file(file: ModelRecord) -> str:
    return f"{file['file']}, {file['bytes']} bytes, sha256 {file['sha256'][:12]}"


def _number(value: float | None) -> str:
    return _NONE if value is None else f"{value:.2f}"


def _share(value: float | None) -> str:
    return _NONE if value is None else f"{value:.0%}"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(_escaped(cell) for cell in row)} |" for row in lines)


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|")

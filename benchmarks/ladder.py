"""How each rule for choosing weights does on a ladder of trios: small_cpt weak, taught, strong.

    python benchmarks/ladder.py rungs --data DATA --work WORK       # nano trios, minutes
    python benchmarks/ladder.py measure TRIO… --data DATA [--limit N] [--json]

A rung is a trio by its trio.toml. `rungs` makes those of the nano trio: small_cpt stopped at 0, 5
and 20 % of its training, and the shipped one. `measure` asks, on text that no tuning has seen:

* text: perplexity of the second half of a held-out text, with weights chosen by its first half;
* ending, into, from: exercises of another seed (tuning/exercises.py), answered by likelihood.

Tasks with labels are run by `trimix eval --methods
large_ins,small_cpt,small_base,proxy-tuning,ppl,auto`.
"""

import argparse
import itertools
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from trimix_gguf.choosing.choices import choice_nll
from trimix_gguf.choosing.score import empty_score, score_prompts
from trimix_gguf.choosing.selection import select_weights
from trimix_gguf.mixing.fusion import METHODS, Weights
from trimix_gguf.mixing.scoring import GRID, WITH_CORNERS, Float64
from trimix_gguf.roles import ROLES
from trimix_gguf.trio.prompt import Prompt, Segment
from trimix_gguf.trio.trio import NANO, Trio
from trimix_gguf.trio.tuned import Tuning
from trimix_gguf.trios.triofile import TrioFile
from trimix_gguf.tuning.exercises import kinds_of
from trimix_gguf.tuning.pairs import read_pairs
from trimix_gguf.tuning.probe import head
from trimix_gguf.tuning.text import read_passages

N_TOKENS = 4_000_000  # that the shipped small_cpt learned from
SHARES = ("0.05", "0.2")  # of them
SEED = 1000  # of exercises that no tuning has seen
FIXED = ("large_ins", "small_cpt", "small_base", "proxy-tuning", "authors-pair")


def main() -> None:
    """Make the nano rungs, or measure rungs."""
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = options.add_subparsers(dest="command", required=True)
    make = commands.add_parser("rungs")
    make.add_argument("--work", type=Path, required=True)
    measured = commands.add_parser("measure")
    measured.add_argument("trios", nargs="+", type=Path)
    measured.add_argument("--limit", type=int, default=60, help="of each task")
    measured.add_argument("--threads", type=int)
    measured.add_argument("--json", action="store_true")
    for command in (make, measured):
        command.add_argument("--data", type=Path, required=True)
    given = options.parse_args()
    if given.command == "rungs":
        make_rungs(given.data, given.work)
        return
    found = {str(trio): measure(trio, given) for trio in given.trios}
    print(json.dumps(found) if given.json else "\n\n".join(map(table, found, found.values())))


# -- the nano rungs -----------------------------------------------------------------------------


def make_rungs(data: Path, work: Path) -> None:
    """Teach the shipped small_base to each share, and write a trio for each rung."""
    write_trio(work / "0", NANO / "small_base.gguf")
    write_trio(work / "1", NANO / "small_cpt.gguf")
    for share in SHARES:
        made = work / f"small_cpt-{share}.gguf"
        if not made.exists():
            teach(data, made, int(N_TOKENS * float(share)))
        write_trio(work / share, made)


def teach(data: Path, made: Path, n_tokens: int) -> None:
    """A small_cpt of the same recipe as the shipped one (see `nano` in the Makefile)."""
    command = [sys.executable, "-m", "trimix_gguf", "adapt", made.stem]
    command += [str(data / "corpus" / "kk" / "train.txt"), "--full", "--learning-rate", "3e-3"]
    command += ["--exercises", "0", "--tokens", str(n_tokens), "-o", str(made)]
    subprocess.run([*command, "--work", str(made.parent / "adapt")], check=True)


def write_trio(folder: Path, small_cpt: Path) -> None:
    """A copy of the nano trio with another small_cpt, which nobody has tuned."""
    folder.mkdir(parents=True, exist_ok=True)
    text = (NANO / "trio.toml").read_text(encoding="utf-8").split("\n[tuning]")[0]
    kept = [line for line in text.splitlines() if not line.startswith(("sha256", "n_bytes"))]
    (folder / "trio.toml").write_text("\n".join([*kept, ""]), encoding="utf-8")
    for role in ("large_ins", "small_base"):
        shutil.copy(NANO / f"{role}.gguf", folder)
    shutil.copy(small_cpt, folder / "small_cpt.gguf")
    shutil.copy(NANO / "text.txt", folder)


# -- measuring --------------------------------------------------------------------------------


def measure(path: Path, given: argparse.Namespace) -> dict[str, Any]:
    """By task, then by rule: percent right, or perplexity; the best grid point too."""
    trio_file = TrioFile.read(path / "trio.toml" if path.is_dir() else path)
    threads = {} if given.threads is None else {"n_threads": given.threads}
    with Trio.load(**trio_file.load_arguments(), **threads) as trio:
        tuning = trio.tuning
        tasks = {"text": texts(trio, given)}
        tasks |= {name: asked(trio, given, name) for name in ("ending", "into", "from")}
        return {
            "verdict": tuning.verdict if tuning else "not tuned",
            **{name: summary(list(rows), tuning) for name, rows in tasks.items()},
        }


Row = tuple[Float64, Callable[[str, Tuning | None], Weights]]


def texts(trio: Trio, given: argparse.Namespace) -> Iterator[Row]:
    """Nats per token of second halves [n, n], and the rules' choice by the first halves."""
    lines = (given.data / "corpus" / "kk" / "heldout.txt").read_text(encoding="utf-8").splitlines()
    long = [line for line in lines if 240 <= len(line) <= 700]
    for line in random.Random(SEED).sample(long, min(given.limit // 2, len(long))):
        ids = trio.models["large_ins"].tokenize(line)
        half, bos = len(ids) // 2, trio.models["large_ins"].bos
        begin = [Segment.of(bos, scored=False)] if bos else []
        first = Prompt((*begin, Segment.of(ids[:half])))
        whole = Prompt((*begin, Segment.of(ids[:half], scored=False), Segment.of(ids[half:])))
        scored = empty_score((WITH_CORNERS, WITH_CORNERS))
        score_prompts(trio, whole, scored)
        yield scored.mean_nll(), chooser(trio, first, with_choices=False)


def asked(trio: Trio, given: argparse.Namespace, name: str) -> Iterator[Row]:
    """1 where a mix answers right, and the rules' choice by the prompt."""
    passages = read_passages([given.data / "corpus" / "kk" / "heldout.txt"])
    pairs = read_pairs(given.data / "parallel" / "kk-en.tsv", "kk")
    kind = next(k for k in kinds_of(passages, SEED, pairs=pairs) if k.name == name)
    for one in itertools.islice(kind.exercises, given.limit):
        prompt = trio.prompt(head(kind) + one.question)
        if prompt.n_tokens() + 64 > trio.n_ctx:
            continue
        choose = chooser(trio, prompt, with_choices=True)
        trio.prefill(prompt)
        ids = [trio.models[ROLES[0]].tokenize(f" {choice}") for choice in one.choices]
        nll = choice_nll(trio, ids, WITH_CORNERS)
        yield (nll.argmin(axis=0) == one.right).astype(float), choose


def chooser(
    trio: Trio, prompt: Prompt, *, with_choices: bool
) -> Callable[[str, Tuning | None], Weights]:
    """The weights of a rule for a prompt; it is read for all of them now."""
    by_rule: dict[tuple[str, bool], Weights] = {}
    tuning = trio.tuning
    rules = [("ppl", None), ("auto", None), *([] if tuning is None else [("auto", tuning)])]
    for method, known in rules:
        trio.tuning = known
        chosen = select_weights(trio, prompt, method=method, with_choices=with_choices)  # type: ignore[arg-type]
        by_rule[method, known is not None] = chosen.weights
    trio.tuning = tuning
    return lambda method, known: by_rule[method, known is not None]


def summary(rows: list[Row], tuning: Tuning | None) -> dict[str, float]:
    """The mean of each rule over a task."""
    at = WITH_CORNERS.index
    grids = np.stack([grid for grid, _ in rows])
    mean = grids.mean(axis=0)
    found = {}
    for name in FIXED:
        w = METHODS[name].weights
        found[name] = mean[at(w.alpha), at(w.beta)]
    inner = [at(w) for w in GRID]
    best = mean[np.ix_(inner, inner)]
    is_text = mean.max() > 1.0
    found["best grid point"] = best.min() if is_text else best.max()
    rules: list[tuple[str, str, Tuning | None]] = [
        ("ppl", "ppl", None),
        ("auto, untuned", "auto", None),
    ]
    if tuning is not None:
        rules.append(("auto", "auto", tuning))
    for label, method, known in rules:
        chosen = [choose(method, known) for _, choose in rows]
        values = [g[at(w.alpha), at(w.beta)] for (g, _), w in zip(rows, chosen, strict=True)]
        found[label] = float(np.mean(values))
    shown = np.exp if is_text else lambda share: 100 * share
    return {name: round(float(shown(value)), 2) for name, value in found.items()} | {"n": len(rows)}


def table(name: str, found: dict[str, Any]) -> str:
    """Markdown: a rule per row, a task per column."""
    tasks = [task for task in found if task != "verdict"]
    rules = [rule for rule in found[tasks[0]] if rule != "n"]
    lines = [f"{name}: {found['verdict']}", ""]
    heads = [f"{task} (perplexity)" if task == "text" else f"{task} (%)" for task in tasks]
    lines += ["| | " + " | ".join(heads) + " |", "|---" * (len(tasks) + 1) + "|"]
    lines += [
        f"| {rule} | " + " | ".join(f"{found[task][rule]:g}" for task in tasks) + " |"
        for rule in rules
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()

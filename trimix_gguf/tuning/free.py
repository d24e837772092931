"""Whether the mix that answers best with choices answers better freely too.

Exercises with choices do not say whether a mix writes whole sentences. So some exercises are asked
as in a chat, without examples, and answered greedily: by that mix, and by what `auto` would take
without a tuning. What is compared is how like the right answer both are.
"""

import itertools
import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from trimix_gguf.answering.chat import PLAIN_STOPS, chat_prompt
from trimix_gguf.answering.generation import generate
from trimix_gguf.answering.request import Request
from trimix_gguf.choosing.auto import LEASH
from trimix_gguf.choosing.methods import AUTO
from trimix_gguf.choosing.selection import Selection
from trimix_gguf.machine.typed_json import parse
from trimix_gguf.mixing.fusion import Mix, Weights
from trimix_gguf.roles import ROLES
from trimix_gguf.trio.trio import Trio
from trimix_gguf.trio.tuned import Free
from trimix_gguf.tuning.exercises import Exercise, Kind
from trimix_gguf.tuning.probe import ShowProgress, whole_lines
from trimix_gguf.tuning.verdict import CLOSE

KINDS = ("find", "ending", "into", "from")  # whose answers are text
FEWEST, MOST = 12, 24  # of a kind; below FEWEST it says nothing
_N_GRAM = 6


@dataclass(frozen=True)
class Compared:
    """How like the right answer two are, 0 … 1: `close` to large_ins, and the mix's."""

    kind: str
    close: float
    mix: float


def compare_all(
    trio: Trio,
    kinds: Sequence[Kind],
    weights: Weights,
    kept: Path,
    *,
    seconds: float,
    progress: ShowProgress,
) -> list[Compared]:
    """Ask up to MOST exercises of each kind, in about `seconds`; `kept` holds lines of JSON.

    What `kept` holds already for these weights, and for the same choice without a tuning, is not
    asked again.
    """
    untuned_choice = f"{LEASH:g} {CLOSE.alpha:g} {CLOSE.beta:g}"
    known, asked = _read(kept), [kind for kind in kinds if kind.name in KINDS]
    found: list[Compared] = []
    with kept.open("a", encoding="utf-8") as lines, untuned(trio):
        for at, kind in enumerate(asked):
            started = time.monotonic()
            budget = seconds / (len(asked) - at)
            with progress(f"{kind.name}, free") as show:
                for i, exercise in enumerate(itertools.islice(kind.exercises, MOST)):
                    name = f"{kind.name}-{i} {weights.alpha:g} {weights.beta:g} {untuned_choice}"
                    if name not in known:
                        if time.monotonic() - started > budget:
                            break
                        known[name] = compare(trio, kind, exercise, weights)
                        lines.write(json.dumps({"id": name, **vars(known[name])}) + "\n")
                        lines.flush()
                    found.append(known[name])
                    show(i + 1, MOST)
            seconds -= time.monotonic() - started
    return found


def compare(trio: Trio, kind: Kind, exercise: Exercise, weights: Weights) -> Compared:
    """Have one exercise answered both ways."""
    message = f"{kind.instruction}\n\n{exercise.question}"
    prompt = chat_prompt(trio, [{"role": "user", "content": message}])
    most = 2 * len(trio.models[ROLES[0]].tokenize(exercise.answer)) + 8
    greedy = Request.of(prompt, max_tokens=most, temperature=0.0, stop=PLAIN_STOPS)
    close, mix = (
        generate(trio, replace(greedy, weights=given), speculative="off").text
        for given in (None, Selection(Mix(weights), AUTO))
    )
    return Compared(kind.name, likeness(close, exercise.answer), likeness(mix, exercise.answer))


def judge_free(compared: Sequence[Compared], weights: Weights) -> Free | None:
    """The mix answers free questions if it is clearly better there; None if too few were asked.

    It must be better by more than two standard errors in the mean of the kinds, by more than one in
    most of them, and in none worse by more than one.
    """
    asked = [[one for one in compared if one.kind == kind] for kind in KINDS]
    kinds = [np.array([(one.close, one.mix) for one in a]) for a in asked if len(a) >= FEWEST]
    if not kinds:
        return None
    differences = [kind[:, 1] - kind[:, 0] for kind in kinds]
    gains = np.array([d.mean() for d in differences])
    errors = np.array([d.std(ddof=1) / np.sqrt(len(d)) for d in differences])
    error = np.sqrt((errors**2).sum()) / len(kinds)
    is_better = (
        gains.mean() > 2 * error
        and (gains > errors).mean() > 0.5
        and bool((gains >= -errors).all())
    )
    n = sum(map(len, kinds))
    close, mix = np.mean([kind.mean(axis=0) for kind in kinds], axis=0).tolist()
    if not is_better:
        text = f"the mix is not clearly better in {n} of them, so they stay close to large_ins"
        return Free(None, text, n, close, mix)
    text = f"the mix is better in {n} of them too; auto answers with "
    return Free(weights, f"{text}({weights.alpha:g}, {weights.beta:g})", n, close, mix)


def likeness(written: str, right: str) -> float:
    """chrF of one text, 0 … 1: F2 of character n-grams without spaces (Popović 2015)."""
    found, wanted = ("".join(text.lower().split()) for text in (written, right))
    precision = recall = 0.0
    for n in range(1, (orders := min(_N_GRAM, len(wanted))) + 1):
        a, b = _grams(found, n), _grams(wanted, n)
        hits = (a & b).total()
        precision += hits / max(a.total(), 1)
        recall += hits / b.total()
    return 5 * precision * recall / (4 * precision + recall) / orders if recall else 0.0


def _grams(text: str, n: int) -> Counter[str]:
    return Counter(text[i : i + n] for i in range(len(text) - n + 1))


@contextmanager
def untuned(trio: Trio) -> Iterator[None]:
    """The trio as if nobody had tuned it."""
    tuning, trio.tuning = trio.tuning, None
    try:
        yield
    finally:
        trio.tuning = tuning


def _read(kept: Path) -> dict[str, Compared]:
    found = {}
    for line in whole_lines(kept):
        try:
            entry = parse(line, object)
            one = Compared(str(entry["kind"]), float(entry["close"]), float(entry["mix"]))
            found[str(entry["id"])] = one
        except (ValueError, LookupError, TypeError, OverflowError):
            continue  # damaged: measured again
    return found

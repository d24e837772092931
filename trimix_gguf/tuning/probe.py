"""Asks a trio its exercises: how likely each choice is under every mix, from one reading."""

import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trimix_gguf.choosing.choices import choice_nll
from trimix_gguf.machine.typed_json import parse
from trimix_gguf.mixing.scoring import WITH_CORNERS, Float64
from trimix_gguf.roles import ROLES
from trimix_gguf.trio.trio import Trio
from trimix_gguf.tuning.exercises import Exercise, Kind

MOST_PER_KIND = 40
_SHAPE = (len(WITH_CORNERS), len(WITH_CORNERS))

# What is under way -> how many of how many are done.
ShowProgress = Callable[[str], AbstractContextManager[Callable[[int, int], None]]]


@dataclass(frozen=True)
class Answered:
    """An exercise's choices under each mix: `nll` [n_choices, n, n] in nats over WITH_CORNERS²."""

    kind: str
    right: int
    nll: Float64

    def to_line(self, name: str) -> str:
        """One line of JSON."""
        values = np.round(self.nll, 4).tolist()
        return json.dumps({"id": name, "kind": self.kind, "right": self.right, "nll": values})


def ask_all(
    trio: Trio,
    kinds: Sequence[Kind],
    kept: Path,
    *,
    seconds: float,
    progress: ShowProgress,
    per_kind: int = MOST_PER_KIND,
) -> list[Answered]:
    """Ask up to `per_kind` exercises of each kind, in about `seconds`; lines are added to `kept`.

    What `kept` holds already is not asked again, so that a run that was stopped goes on. Each kind
    gets an equal part of the time that is left.
    """
    answers = read_answers(kept)
    with kept.open("a", encoding="utf-8") as lines:
        for at, kind in enumerate(kinds):
            started = time.monotonic()
            budget = seconds / (len(kinds) - at)
            with progress(kind.name) as show:
                for i, exercise in enumerate(itertools.islice(kind.exercises, per_kind)):
                    name = f"{kind.name}-{i}"
                    if name not in answers:
                        if time.monotonic() - started > budget:
                            break
                        answers[name] = ask(trio, kind, exercise)
                        lines.write(answers[name].to_line(name) + "\n")
                        lines.flush()
                    show(i + 1, per_kind)
            seconds -= time.monotonic() - started
    return list(answers.values())


def ask(trio: Trio, kind: Kind, exercise: Exercise) -> Answered:
    """One exercise after its kind's exemplars, which the caches keep from one to the next."""
    trio.prefill(trio.prompt(head(kind) + exercise.question))
    ids = [trio.models[ROLES[0]].tokenize(f" {choice}") for choice in exercise.choices]
    return Answered(kind.name, exercise.right, choice_nll(trio, ids, WITH_CORNERS))


def head(kind: Kind) -> str:
    """The instruction and the worked examples."""
    examples = (f"{one.question} {one.answer}\n\n" for one in kind.exemplars)
    return f"{kind.instruction}\n\n{''.join(examples)}"


def n_to_read(trio: Trio, kinds: Sequence[Kind]) -> int:
    """Tokens of the longest prompt that ask() makes of these, roughly: it must fit the context."""
    return max(
        trio.prompt(head(kind) + max((e.question for e in kind.exemplars), key=len)).n_tokens()
        for kind in kinds
    )


def read_answers(kept: Path) -> dict[str, Answered]:
    """The answers that a file holds."""
    return dict(_read(whole_lines(kept)))


def whole_lines(kept: Path) -> list[bytes]:
    """The whole lines of a file; what a kill cut off is left out, and cut off the file."""
    if not kept.exists():
        return []
    raw = kept.read_bytes()
    whole = raw[: raw.rfind(b"\n") + 1]
    if len(whole) < len(raw):
        kept.write_bytes(whole)
    return whole.splitlines()


def _read(lines: Sequence[bytes]) -> Iterator[tuple[str, Answered]]:
    for line in lines:
        try:
            entry = parse(line, object)
            nll = np.asarray(entry["nll"], np.float64)
            answered = Answered(str(entry["kind"]), int(entry["right"]), nll)
            name = str(entry["id"])
        except (ValueError, LookupError, TypeError):
            continue  # damaged: measured again
        if nll.shape[1:] == _SHAPE:
            yield name, answered

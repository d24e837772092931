"""The probe of a trio, from its text to the [tuning] of its trio.toml."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from trimix_gguf.errors import DataError, PromptError
from trimix_gguf.machine.folders import cache_folder
from trimix_gguf.mixing.fusion import METHODS
from trimix_gguf.roles import ROLES, Role
from trimix_gguf.trio.trio import Trio
from trimix_gguf.trio.tuned import VERSION, Tuning
from trimix_gguf.tuning.exercises import FEWEST_SENTENCES, Kind, kinds_of
from trimix_gguf.tuning.free import compare_all, judge_free
from trimix_gguf.tuning.pairs import read_pairs
from trimix_gguf.tuning.probe import ShowProgress, ask_all, n_to_read
from trimix_gguf.tuning.text import read_passages
from trimix_gguf.tuning.verdict import CLOSE, judge, scores_of

_OF_FREE = 1_000_000  # added to the seed: free answers are to other exercises


@dataclass(frozen=True)
class Exercises:
    """What is asked with choices, and what is asked to be answered freely."""

    kinds: Sequence[Kind]
    free: Sequence[Kind]


def make_exercises(
    texts: Sequence[Path], pairs: Path | None, language: str, seed: int
) -> Exercises:
    """Exercises of a person's own text and sentence pairs; raises DataError where it is short."""
    passages = read_passages(texts)
    given = [] if pairs is None else read_pairs(pairs, language)
    if pairs is not None and len(given) < FEWEST_SENTENCES:
        raise DataError(
            f"{pairs} has {len(given)} usable pairs (20 to 110 characters a side), and exercises "
            f"need {FEWEST_SENTENCES} or more; give more, or leave out --pairs"
        )
    kinds, free = (kinds_of(passages, s, pairs=given) for s in (seed, _OF_FREE + seed))
    return Exercises(kinds, free)


def tune(
    trio: Trio,
    exercises: Exercises,
    models: Mapping[Role, str],
    *,
    language: str,
    seed: int,
    minutes: float,
    progress: ShowProgress,
) -> Tuning:
    """Ask the exercises, for about `minutes`, and judge; `models` are SHA-256 by role.

    Where a mix is best, it then answers freely, for up to half as long: see free.py.
    What was asked before a kill is kept in the cache and not asked again. Raises PromptError
    where the exercises do not fit the context, DataError where too few were asked.
    """
    kinds = exercises.kinds
    needed = n_to_read(trio, kinds)
    if needed > trio.n_ctx:
        raise PromptError(
            f"the exercises need a context of {needed} tokens, and this one has {trio.n_ctx}; "
            f"give --n-ctx {needed}"
        )
    kept = kept_answers(kinds, models, seed)
    kept.parent.mkdir(parents=True, exist_ok=True)
    answers = ask_all(trio, kinds, kept, seconds=60 * minutes, progress=progress)
    verdict = judge(scores_of(answers))
    free = None
    known = (METHODS[ROLES[0]].weights, CLOSE)  # a free answer stays close to large_ins anyway
    if verdict.weights is not None and verdict.weights not in known:
        compared = compare_all(
            trio,
            exercises.free,
            verdict.weights,
            kept.with_suffix(".free.jsonl"),
            seconds=30 * minutes,
            progress=progress,
        )
        free = judge_free(compared, verdict.weights)
    return Tuning(verdict.weights, verdict.text, models, verdict.kinds, language, seed, free=free)


def kept_answers(kinds: Sequence[Kind], models: Mapping[Role, str], seed: int) -> Path:
    """Where the answers of such a run are kept: other exercises or models have another file.

    Raises DataError where there is no cache folder.
    """
    try:
        folder = cache_folder() / "tune"
    except RuntimeError:
        raise DataError(
            "there is no home folder to keep answers in; set TRIMIX_CACHE to a folder"
        ) from None
    asked = [[kind.name, kind.instruction, *(e.question for e in kind.exemplars)] for kind in kinds]
    facts = json.dumps([VERSION, seed, asked, dict(sorted(models.items()))])
    return folder / f"{hashlib.sha256(facts.encode()).hexdigest()[:16]}.jsonl"

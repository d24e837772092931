"""A task's examples as prompts: the instruction and the exemplars, then each question."""

from collections.abc import Sequence
from typing import NamedTuple

from trimix_gguf.answering.chat import around_message
from trimix_gguf.choosing.methods import AUTO, CONTINUOUS
from trimix_gguf.errors import PromptError
from trimix_gguf.evaluation.names.settings import RunSettings
from trimix_gguf.evaluation.running.decoupled import FourthModel
from trimix_gguf.evaluation.running.reading import Reader
from trimix_gguf.evaluation.tasks.task import Dataset, Example, Task
from trimix_gguf.roles import ROLES
from trimix_gguf.trio.prompt import Prompt, Segment
from trimix_gguf.trio.trio import Trio

# Around an exemplar's answer: half of a surrogate pair each, which no text contains.
_OPEN, _CLOSE = "\ud800", "\udfff"


class Opening(NamedTuple):
    """The beginning of every prompt of a task: Reader's `prefix`, `answers` and `turn`."""

    prefix: Prompt
    answers: list[bool]
    turn: list[int]


def open_reader(
    trio: Trio,
    task: Task,
    dataset: Dataset,
    questions: Sequence[Example],
    settings: RunSettings,
    fourth: FourthModel | None = None,
) -> Reader:
    """A Reader of the instruction and the exemplars.

    Raises PromptError if the exemplars and the longest of `questions` do not fit into the context;
    it says how many would.
    """
    exemplars = exemplars_of(task, dataset, settings.n_exemplars)
    n = len(exemplars)
    prefixes = [marked_prefix(trio, task, exemplars[:k]) for k in range(n + 1)]
    around = _around(trio, settings.chat)
    longest = max(trio.prompt(q.question).n_tokens() for q in questions)
    spare = trio.n_ctx - longest - task.max_tokens - sum(len(ids) for ids in around)
    if prefixes[n].n_tokens() > spare:
        fit = sum(p.n_tokens() <= spare for p in prefixes) - 1
        if fit < 0:
            needed = trio.n_ctx - spare + prefixes[0].n_tokens()
            raise PromptError(
                f"{task.name}: even without exemplars the longest question and its answer of up to "
                f"{task.max_tokens} tokens need a context of {needed}; raise --n-ctx to that"
            )
        raise PromptError(
            f"{task.name}: {n} exemplars and the longest question do not fit in a context of "
            f"{trio.n_ctx}; {fit} would, or raise --n-ctx"
        )
    opening = open_task(trio, task, exemplars, chat=settings.chat)
    return Reader(
        trio,
        *opening,
        fourth=fourth,
        continuous=CONTINUOUS in settings.methods,
        sloped=AUTO in settings.methods and not _is_measured(trio, questions),
    )


def _is_measured(trio: Trio, questions: Sequence[Example]) -> bool:
    """Whether a tuning says how to answer these; else it depends on the prompt's slopes."""
    tuning = trio.tuning
    return tuning is not None and all(
        tuning.of(with_choices=bool(question.choices)) is not None for question in questions
    )


def exemplars_of(task: Task, dataset: Dataset, n: int | None = None) -> Sequence[Example]:
    """The first `n` exemplars, or the task's number; raises PromptError if there are fewer."""
    n = task.n_exemplars if n is None else n
    if n > len(dataset.exemplars):
        raise PromptError(f"{task.name} has {len(dataset.exemplars)} exemplars; {n} are wanted")
    return dataset.exemplars[:n]


def marked_prefix(trio: Trio, task: Task, exemplars: Sequence[Example]) -> Prompt:
    """The instruction and the exemplars; only the exemplars' answers are scored."""
    text = f"{task.instruction}\n\n"
    for example in exemplars:
        text += f"{example.question} {_OPEN}{example.answer}{_CLOSE}\n\n"
    return trio.prompt(text, spans=(_OPEN, _CLOSE)) if exemplars else trio.prompt(text)


def open_task(
    trio: Trio, task: Task, exemplars: Sequence[Example], *, chat: bool = False
) -> Opening:
    """The instruction and `exemplars`; all their tokens are scored but BOS.

    In a `chat`, large_ins reads its template around each prompt.
    """
    marked = marked_prefix(trio, task, exemplars)  # the answers are what is scored in it
    opening, turn = _around(trio, chat)
    ids = [i for segment in marked.segments for i in segment.ids[ROLES[0]]]
    bos = trio.models[ROLES[0]].bos
    begin = [Segment.of(bos, scored=False)] if bos else []
    if opening:
        begin.append(Segment.per_role({ROLES[0]: opening}))
    prefix = Prompt((*begin, Segment.of(ids[len(bos) :])))
    answers = [scored and bool(exemplars) for _, scored in marked.units]
    answers = [False] * (len(prefix.units) - len(answers)) + answers
    return Opening(prefix, answers, turn)


def _around(trio: Trio, chat: bool) -> tuple[list[int], list[int]]:
    """The ids of large_ins' chat template before a message and after it."""
    return around_message(trio.models[ROLES[0]]) if chat else ([], [])


def question_after(reader: Reader, example: Example) -> Prompt:
    """The question without BOS, which the exemplars' prefix has.

    In a chat, large_ins' turn begins before the last line ("Topic:"), which all models share. So
    the answers of all models begin with a space.
    """
    trio, text = reader.trio, example.question
    body, newline, cue = text.rpartition("\n") if reader.turn else (text, "", "")
    parts = [s for s in trio.prompt(body + newline).segments if s.scored] if body else []
    if reader.turn:
        parts.append(Segment.per_role({ROLES[0]: reader.turn}))
        parts += [s for s in trio.prompt(cue).segments if s.scored]
    return Prompt(tuple(parts))

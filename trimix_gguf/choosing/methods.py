"""The methods that choose weights, in one table; mixing/fusion.METHODS has those with a fixed mix.

Commands, server, trio files and evaluation take the names of methods from these two tables only.
"""

from dataclasses import dataclass
from typing import Final, Literal

from trimix_gguf.mixing.fusion import METHODS

AUTO: Final = "auto"
PPL = "ppl"
ENT = "ent"
ANSWERS: Final = "ppl-answers"
TASK = "ppl-task"
CONTINUOUS = "continuous"
DECOUPLED = "decoupled"
TOKEN = "token"
MI_ANSWERS = "mi-answers"
INFORMATIVE = "mi"
ORACLE = "upper-bound"

# Those of the table that need no more than a prompt, for type hints.
ChosenBy = Literal["auto", "ppl", "ent", "ppl-answers", "token"]


@dataclass(frozen=True)
class Choosing:
    """A way to choose weights.

    `by` says in one line what decides. `where` it applies: 'runtime' for any prompt, also in
    evaluation; 'file' for a file of exemplars and questions (--task), also in evaluation; 'task'
    only in evaluation; 'report' where the answers of a finished run decide. `reads`: in
    evaluation each prompt is first scored over the grid.
    """

    by: str
    where: Literal["runtime", "file", "task", "report"]
    reads: bool = True


CHOOSING = {
    AUTO: Choosing(
        "for questions what `trimix tune` measured of such questions, for text the lowest "
        "perplexity",
        "runtime",
    ),
    PPL: Choosing("lowest perplexity of the prompt (TriMix-PPL)", "runtime"),
    ENT: Choosing("lowest entropy of the first token (TriMix-ENT)", "runtime"),
    ANSWERS: Choosing("lowest perplexity of the exemplars' answers", "runtime"),
    TOKEN: Choosing(
        "chosen at each token, by the perplexity of what lies just before it", "runtime"
    ),
    TASK: Choosing("one pair per task, lowest macro perplexity of 50 prompts", "task"),
    CONTINUOUS: Choosing("lowest perplexity of the prompt, as with --grid continuous", "task"),
    DECOUPLED: Choosing(
        "lowest perplexity of the prompt over (alpha, beta, gamma), by four models", "task"
    ),
    MI_ANSWERS: Choosing(
        "one pair per task, most mutual information of the exemplars' answers and questions",
        "file",
        reads=False,
    ),
    # MI_ANSWERS stands for it where a task has no choices.
    INFORMATIVE: Choosing(
        "one pair per task, most mutual information of questions and choices",
        "report",
        reads=False,
    ),
    # Needs the answers at all 36 grid points, so a run has to be asked for it.
    ORACLE: Choosing(
        "one pair per task, the best score on the labelled set", "report", reads=False
    ),
}


def runtime_methods() -> tuple[str, ...]:
    """Names that a prompt and a trio file can ask for: choosing ones, then fixed."""
    choosing = (name for name, row in CHOOSING.items() if row.where == "runtime")
    return (*choosing, *METHODS)


def file_methods() -> tuple[str, ...]:
    """Names that `generate`, `chat` and `serve` take beside those, with a file of examples."""
    return (*(name for name, row in CHOOSING.items() if row.where == "file"), INFORMATIVE)


def selecting_methods() -> tuple[str, ...]:
    """Names of the methods that choose weights before they answer, at runtime or for a task."""
    return tuple(name for name, row in CHOOSING.items() if row.where != "report")


def reading_methods() -> tuple[str, ...]:
    """Those for which each prompt is first scored over the grid."""
    return tuple(name for name, row in CHOOSING.items() if row.reads)


def evaluated_methods() -> tuple[str, ...]:
    """Names that `trimix eval` takes."""
    return (*METHODS, *selecting_methods(), ORACLE)


def compared_by_default() -> tuple[str, ...]:
    """What `trimix eval` compares where it is not told."""
    return ("large_ins", "small_cpt", "small_base", "proxy-tuning", AUTO, PPL, ANSWERS, ENT)

"""Mutual information of questions and answers: how much an answer depends on its question.

Perplexity is low if a text is likely; mutual information is high if it is likely after its own
question and not after others. Neither uses labels of the questions.
"""

from collections.abc import Callable, Sequence

import numpy as np

from trimix_gguf.choosing.methods import MI_ANSWERS
from trimix_gguf.errors import WeightsError
from trimix_gguf.evaluation.running.prompts import open_task, question_after
from trimix_gguf.evaluation.running.reading import Reader
from trimix_gguf.evaluation.tasks.task import Example, Task
from trimix_gguf.mixing.scoring import Float64
from trimix_gguf.trio.trio import Trio

_N_OTHERS = 2  # other questions after which each exemplar's answer is read


def exemplars_information(
    trio: Trio,
    task: Task,
    exemplars: Sequence[Example],
    *,
    chat: bool = False,
    shown: Callable[[int, int], None] = lambda done, total: None,
) -> Float64:
    """Mutual information in nats per answer, over AXIS²: float64 [n, n].

    Each exemplar's answer is read after the other exemplars and its own question, then after the
    same exemplars and questions of others: the result is the mean difference. Source: Cheng et al.
    2020, "CLUB: A Contrastive Log-ratio Upper Bound of Mutual Information" (arXiv 2006.12013).
    Raises WeightsError for fewer than two exemplars. Afterwards the trio holds nothing.
    """
    if len(exemplars) < 2:
        raise WeightsError(f"{MI_ANSWERS} needs two exemplars; give --exemplars 2 or more")
    differences = []
    trio.forget()
    shown(0, len(exemplars))
    for at, one in enumerate(exemplars):
        after, before = exemplars[at + 1 :], exemplars[:at]
        reader = Reader(trio, *open_task(trio, task, [*before, *after], chat=chat))
        answer = trio.models["large_ins"].tokenize(f" {one.answer}")
        after_own_question, *after_others = [
            reader.answer_nll(question_after(reader, asked), answer)
            for asked in (one, *[*after, *before][:_N_OTHERS])
        ]
        differences.append(np.mean(after_others, axis=0) - after_own_question)
        shown(at + 1, len(exemplars))
    trio.forget()
    information: Float64 = np.mean(differences, axis=0)
    return information

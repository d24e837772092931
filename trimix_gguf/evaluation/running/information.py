"""Mutual information of questions and answers: how much an answer hangs on its question.

Perplexity is low where a text is likely; this is high where it is likely after its own question
and not after others. Neither looks at a question's label.
"""

from collections.abc import Callable, Sequence

import numpy as np

from trimix_gguf.choosing.methods import MI_ANSWERS
from trimix_gguf.errors import WeightsError
from trimix_gguf.evaluation.running.mixes import lowest_on_grid
from trimix_gguf.evaluation.running.prompts import exemplars_reader, question_after
from trimix_gguf.evaluation.tasks.task import Example, Task
from trimix_gguf.mixing.fusion import Weights
from trimix_gguf.mixing.scoring import Float64
from trimix_gguf.trio.trio import Trio

_N_OTHERS = 2  # questions that each exemplar's answer is put to beside its own


def most_informative(choice_nll: Float64) -> Weights:
    """The point of GRID² where the choice hangs most on the question, whatever is right.

    `choice_nll` [n, n_choices, n, n] are the nats of each example's choices over AXIS², nan where
    it has fewer. Mutual information is the entropy of the choices' mean probabilities less the
    mean of their entropies: low where one answer is given to everything, and where none is
    preferred. Source: Sorensen et al. 2022, "An Information-theoretic Approach to Prompt
    Engineering Without Ground Truth Labels" (arXiv 2203.11364), for templates.
    """
    nats = np.where(np.isnan(choice_nll), np.inf, choice_nll)
    p = np.exp(np.nanmin(choice_nll, axis=1, keepdims=True) - nats)
    p /= p.sum(axis=1, keepdims=True)
    information = _entropy(p.mean(axis=0), axis=0) - _entropy(p, axis=1).mean(axis=0)
    return lowest_on_grid(-information)


def _entropy(p: Float64, axis: int) -> Float64:
    entropy: Float64 = -(p * np.log(np.where(p > 0, p, 1.0))).sum(axis=axis)
    return entropy


def exemplars_information(
    trio: Trio,
    task: Task,
    exemplars: Sequence[Example],
    *,
    chat: bool = False,
    shown: Callable[[int, int], None] = lambda done, total: None,
) -> Float64:
    """Mutual information in nats an answer, over AXIS²: float64 [n, n].

    Each exemplar's answer is read behind the other exemplars and its own question, then behind
    those and other exemplars' questions: what it costs more there, in the mean. Source: Cheng et
    al. 2020, "CLUB: A Contrastive Log-ratio Upper Bound of Mutual Information" (arXiv 2006.12013).
    Raises WeightsError for fewer than two exemplars. The trio holds nothing afterwards.
    """
    if len(exemplars) < 2:
        raise WeightsError(f"{MI_ANSWERS} needs two exemplars; give --exemplars 2 or more")
    spared = []
    trio.forget()
    shown(0, len(exemplars))
    for at, one in enumerate(exemplars):
        after, before = exemplars[at + 1 :], exemplars[:at]
        reader = exemplars_reader(trio, task, [*before, *after], chat=chat)
        answer = trio.models["large_ins"].tokenize(f" {one.answer}")
        own, *others = [
            reader.answer_nll(question_after(reader, asked), answer)
            for asked in (one, *[*after, *before][:_N_OTHERS])
        ]
        spared.append(np.mean(others, axis=0) - own)
        shown(at + 1, len(exemplars))
    trio.forget()
    information: Float64 = np.mean(spared, axis=0)
    return information

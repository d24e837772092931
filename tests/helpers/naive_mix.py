"""The mix token by token, in float64: what the harness's requests are compared with."""

import numpy as np
import pytest
from lm_eval.api.instance import Instance

from trimix_gguf import Weights
from trimix_gguf.mixing.fusion import fuse
from trimix_gguf.trio.prompt import Prompt, Segment

LARGE, MIX = Weights(1, 0), Weights(0.3, 0.9)
CHOICES = [
    ("Қазақстанның астанасы қай қала?", ["Алматы", "Астана", "Шымкент", "Ақтөбе"], 1),
    ("Жылдың ең суық мезгілі қайсы?", ["жаз", "күз", "қыс", "көктем"], 2),
    ("Сүтті қай жануар береді?", ["сиыр", "қасқыр", "бүркіт", "балық"], 0),
    ("Аптада неше күн бар?", ["бес", "алты", "жеті", "он екі"], 2),
    ("Абай Құнанбайұлы кім болған?", ["ақын", "дәрігер", "ұшқыш", "аспаз"], 0),
    ("Күн қай жақтан шығады?", ["батыстан", "солтүстіктен", "оңтүстіктен", "шығыстан"], 3),
    ("Судың қатқан түрі қалай аталады?", ["мұз", "бу", "шаң", "от"], 0),
]


def ask(kind, *arguments):
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def answers(lm, *pairs):
    return lm.loglikelihood([ask("loglikelihood", *pair) for pair in pairs], disable_tqdm=True)


def encode(trio, text):
    model = trio.models["large_ins"]
    return model.bos + model.tokenize(text)


def log_softmax(row):
    wide = row.astype(np.float64)
    return wide - np.logaddexp.reduce(wide)


def naive(trio, context, continuation, weights):
    """Token by token: logprob of the ids, and whether each is the argmax."""
    trio.prefill(Prompt((Segment.of(context),)))
    total, greedy = 0.0, True
    for token in continuation:
        row = log_softmax(fuse(trio.rows(), weights, unused=trio.unused))
        total, greedy = total + row[token], greedy and int(row.argmax()) == token
        trio.advance(token)
    return total, greedy


def naive_pair(trio, context, continuation, weights):
    whole, before = encode(trio, context + continuation), encode(trio, context)
    return naive(trio, before, whole[len(before) :], weights)


def near(logprob):
    return pytest.approx(logprob, abs=0.1)  # batched and single decodes differ by rounding

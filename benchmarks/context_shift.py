"""Long chats: what a context shift changes, against reading what is left again.

Two conversations run into a full context, with shifts. After each shift, up to the next one, the
same prompt and the answer that came are read by a second trio from the start: KL(fresh || shifted)
of each next token, whether both would pick the same one, and the seconds to the first token. Then
both texts, for a person to read.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from common import cpu_name, spread, versions
from numpy.typing import NDArray

from trimix_gguf.answering.conversation import Conversation
from trimix_gguf.answering.generation import generate
from trimix_gguf.mixing.fusion import Rows, Weights, fuse
from trimix_gguf.roles import ROLES
from trimix_gguf.trio.prompt import Prompt, Segment
from trimix_gguf.trio.trio import Trio
from trimix_gguf.trios.store import resolve

SYSTEM = "You are a helpful assistant. Answer in one or two short sentences."
CHATS = {
    "en": (
        "What is the capital of Kazakhstan?",
        "Which river flows through it?",
        "Name three other cities of the country.",
        "Which of them is the largest?",
        "What is Nauryz?",
        "In which month is it?",
        "Write a Python function that adds two numbers.",
        "Now make it multiply them.",
        "What does the function do that you just wrote?",
        "How many days are in a leap year?",
        "Write one sentence about a river.",
        "Write another one, about a mountain.",
        "Translate the last sentence into French.",
        "What was my first question about mountains?",
    ),
    "kk": (
        "Қазақстанның астанасы қай қала?",
        "Ол қай өзеннің бойында орналасқан?",
        "Тағы үш қаланы ата.",
        "Олардың ең үлкені қайсы?",
        "Наурыз мейрамы деген не?",
        "Ол қай айда тойланады?",
        "Абай Құнанбайұлы кім болған?",
        "Оның бір өлеңін ата.",
        "Алма туралы бір сөйлем жаз.",
        "Енді сол сөйлемді ағылшынша жаз.",
    ),
}


def main() -> None:
    """Talk, compare, and print; the last line is JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trio", required=True, metavar="NAME|FILE|DIR")
    parser.add_argument("--weights", default="0.7,0.4", help="fixed: all three models read")
    parser.add_argument("--n-ctx", type=int, default=512)
    parser.add_argument("--n-tokens", type=int, default=48, help="of each answer at most")
    options = parser.parse_args()
    arguments = {**resolve(options.trio).load_arguments(), "n_ctx": options.n_ctx}
    weights = Weights(*map(float, options.weights.split(",")))
    seen: list[dict[str, Any]] = []
    with Trio.load(**arguments) as trio, Trio.load(**arguments, beside=trio) as fresh:
        for name, questions in CHATS.items():
            print(f"\n{name}")
            seen += talk(trio, fresh, questions, weights, options.n_tokens)
    result = {"cpu": cpu_name(), **versions(), "weights": options.weights, **summary(seen)}
    for key, value in result.items():
        print(f"{key}: {value}")
    print(json.dumps(result))


def talk(
    trio: Trio, fresh: Trio, questions: Sequence[str], weights: Weights, n_tokens: int
) -> list[dict[str, Any]]:
    """One conversation; a comparison for each answer that stands on a shift."""
    options: dict[str, Any] = {"max_tokens": n_tokens, "temperature": 0.0, "weights": weights}
    chat = Conversation(trio, system=SYSTEM, context_shift=True, **options)
    chat.reset()
    trio.forget()
    compared = []
    for question in questions:
        n_dropped = chat.n_dropped
        text = "".join(event.text for event in chat.say(question)).strip()
        if trio.sequences.is_exact(0):
            continue
        assert chat.last is not None
        one = compare(trio, fresh, prompt_of(chat, question), chat.exchanges[-1].ids or (), weights)
        one |= {"shifted": chat.n_dropped > n_dropped, "ttft_s": chat.last.speed["ttft_s"]}
        again = generate(fresh, prompt_of(chat, question), **options, speculative="off")
        compared.append(one)
        print(f"{question}\n  shifted: {line(text)}\n  fresh:   {line(again.text)}", flush=True)
        print(f"  KL {one['kl']['mix']:.4f}, same pick {one['same']:.2f}", flush=True)
    return compared


def prompt_of(chat: Conversation, question: str) -> Prompt:
    """The prompt that the newest answer was given to."""
    newest = chat.exchanges.pop()
    try:
        return chat.prompt(question)
    finally:
        chat.exchanges.append(newest)


def compare(
    trio: Trio, fresh: Trio, prompt: Prompt, ids: Sequence[int], weights: Weights
) -> dict[str, Any]:
    """Next-token distributions of an answer's places: those of the chat, and those read fresh."""
    ids = list(ids)[: trio.n_window - 1]
    whole = Prompt((*prompt.segments, Segment.of(ids, scored=False)))
    ours = rows_of(trio, whole, len(ids) + 1)
    fresh.forget()
    fresh.prefill(prompt)
    started = time.perf_counter()
    fresh.rows()
    read_s = time.perf_counter() - started
    theirs = rows_of(fresh, whole, len(ids) + 1)
    divergences = {role: kl(theirs[role], ours[role]) for role in ROLES}
    mixed = [fuse(rows, weights) for rows in (theirs, ours)]
    divergences["mix"] = kl(*mixed)
    picks = [rows.argmax(axis=1) for rows in mixed]
    return {
        "kl": {name: float(values.mean()) for name, values in divergences.items()},
        "first_kl": float(divergences["mix"][0]),
        "same": float((picks[0] == picks[1]).mean()),
        "read_s": read_s,
    }


def rows_of(trio: Trio, prompt: Prompt, n: int) -> Rows:
    """Logits [n, n_vocab] after each of the last `n` tokens of a prompt."""
    trio.prefill(prompt)
    return {role: rows.copy() for role, rows in trio.tail_rows(ROLES, n).items()}


def kl(p: NDArray[np.float32], q: NDArray[np.float32]) -> NDArray[np.float64]:
    """KL(p || q) [n] in nats, of rows of logits [n, n_vocab]."""
    logs = []
    for rows in (p, q):
        row = rows.astype(np.float64)
        row -= row.max(axis=1, keepdims=True)
        logs.append(row - np.log(np.exp(row).sum(axis=1, keepdims=True)))
    divergence: NDArray[np.float64] = (np.exp(logs[0]) * (logs[0] - logs[1])).sum(axis=1)
    return divergence


def line(text: str) -> str:
    """A text in one line."""
    return " / ".join(text.strip().splitlines())


def summary(seen: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over the answers, and seconds to the first token where a shift was just made."""
    cut = [one for one in seen if one["shifted"]]
    return {
        "n_answers": len(seen),
        "n_shifts": len(cut),
        "kl": {name: statistics.mean(one["kl"][name] for one in seen) for name in (*ROLES, "mix")},
        "first_kl": spread([one["first_kl"] for one in seen]),
        "same_pick": statistics.mean(one["same"] for one in seen),
        "shift_ttft_s": spread([one["ttft_s"] for one in cut]),
        "fresh_read_s": spread([one["read_s"] for one in cut]),
    }


if __name__ == "__main__":
    main()

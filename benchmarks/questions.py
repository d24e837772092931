"""Ten plain questions, Kazakh and English, each answered greedily by large_ins only and by the mix.

For a person to read side by side: whether the mix is ever broken where large_ins is whole. What can
be counted is said too: answers that end in the repetition of one span.
"""

import argparse
import json
from typing import Any

from common import cpu_name

from trimix_gguf.answering.conversation import Conversation
from trimix_gguf.mixing.fusion import METHODS
from trimix_gguf.trio.trio import Trio
from trimix_gguf.trios.store import resolve

QUESTIONS = (
    "Қазақстанның астанасы қай қала?",
    "Наурыз мейрамы қай айда тойланады?",
    "Абай Құнанбайұлы кім болған?",
    "Жылда неше ай бар? Соларды ата.",
    "Суды қайнату үшін не істеу керек?",
    "Алма туралы екі сөйлем жаз.",
    "What is the capital of Kazakhstan?",
    "How many days are in a week?",
    "Write one sentence about a river.",
    "Translate into English: Мен кітап оқып отырмын.",
)


def main() -> None:
    """Ask, and print; the last line is JSON."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--trio", required=True, metavar="NAME|FILE|DIR")
    options.add_argument("--methods", default="auto,ppl", help="beside large_ins")
    options.add_argument("--n-tokens", type=int, default=64, help="of each answer at most")
    options = options.parse_args()
    names = ["large_ins", *options.methods.split(",")]
    result: dict[str, Any] = {"cpu": cpu_name(), "trio": resolve(options.trio).name, "answers": []}
    with Trio.load(**resolve(options.trio).load_arguments()) as trio:
        for question in QUESTIONS:
            answers = {name: ask(trio, question, name, options.n_tokens) for name in names}
            result["answers"].append({"question": question, **answers})
            print(f"\n{question}")
            for name, (text, weights) in answers.items():
                print(f"  {name:<10} {weights}  {' / '.join(text.split(chr(10)))}", flush=True)
    for name in names:
        n = sum(repeats(answer[name][0]) for answer in result["answers"])
        print(f"{name}: {n} of {len(QUESTIONS)} answers end by repeating themselves")
    print(json.dumps(result, ensure_ascii=False))


def ask(trio: Trio, question: str, method: str, n_tokens: int) -> tuple[str, str]:
    """An answer, and the pair that gave it."""
    fixed = METHODS.get(method)
    how: dict[str, Any] = {"method": method} if fixed is None else {"weights": fixed}
    talk = Conversation(trio, max_tokens=n_tokens, temperature=0.0, **how)
    events = list(talk.say(question))
    pair = events[-1].selection.weights
    return "".join(event.text for event in events).strip(), f"({pair.alpha:g}, {pair.beta:g})"


def repeats(text: str) -> bool:
    """Whether a text's last half is one span of at most a quarter of it, again and again."""
    n = len(text)
    return any(text[-(n // 2) :] in text[-k:] * n for k in range(1, n // 4)) if n > 16 else False


if __name__ == "__main__":
    main()

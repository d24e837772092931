"""Raw text -> training documents for the nano trio: English, Kazakh, and instruction pairs.

A document is a plain string; the trainer puts <|endoftext|> before each. Every function is
deterministic for a seed. Nothing from an evaluation set's test part enters a document.
"""

import csv
import random
from pathlib import Path

ENGLISH_HELDOUT = "test.txt"
PARALLEL_HELDOUT = 200  # last well-aligned sentence pairs, kept for measuring
MIN_ALIGNMENT = 0.4

USER, ASSISTANT, END = "<|user|>", "<|assistant|>", "<|end|>"

TO_ENGLISH = "Translate the following Kazakh text into English."
TO_KAZAKH = "Translate the following English text into Kazakh."
CLASSIFY = (
    "Classify the topic of the text. Choose one of: science/technology, travel, politics, "
    "sports, health, entertainment, geography."
)
CONTINUE = "Write the next sentence."
REPEAT = "Repeat the text."


def _group(lines: list[str], rng: random.Random, low: int, high: int) -> list[str]:
    """Join runs of neighbouring lines into documents, with a space or a newline."""
    documents, at = [], 0
    while at < len(lines):
        size = rng.randint(low, high)
        documents.append(rng.choice([" ", "\n"]).join(lines[at : at + size]))
        at += size
    rng.shuffle(documents)
    return documents


def _lines(path: Path) -> list[str]:
    return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _table(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8") as f:
        return list(csv.DictReader(f, delimiter="\t", quoting=csv.QUOTE_NONE))


def english(data: Path, seed: int) -> list[str]:
    """Documents of a few English lines each, without the held-out text."""
    rng = random.Random(seed)
    lines = []
    for path in sorted((data / "corpus" / "en").glob("*.txt")):
        if path.name != ENGLISH_HELDOUT:
            lines += _lines(path)
    return _group(lines, rng, 2, 8)


def kazakh(data: Path, seed: int) -> list[str]:
    """Documents of a few Kazakh lines each."""
    return _group(_lines(data / "corpus" / "kk" / "train.txt"), random.Random(seed), 2, 8)


def parallel(data: Path, *, heldout: bool = False) -> list[tuple[str, str]]:
    """Aligned (Kazakh, English) sentence pairs; the held-out tail is only for measuring."""
    rows = _table(data / "parallel" / "kk-en.tsv")
    pairs = [(r["kk"], r["en"]) for r in rows if float(r["score"]) >= MIN_ALIGNMENT]
    pairs = [p for p in pairs if 20 <= len(p[0]) <= 400]
    return pairs[-PARALLEL_HELDOUT:] if heldout else pairs[:-PARALLEL_HELDOUT]


def topics(data: Path, lang: str, split: str) -> list[tuple[str, str]]:
    """SIB-200 (text, label) pairs."""
    rows = _table(data / "eval" / lang / "sib200" / f"{split}.tsv")
    return [(r["text"], r["category"]) for r in rows]


def render(instruction: str, text: str, answer: str, chat: bool) -> str:
    """One instruction example, as a chat turn with control tokens or as plain text."""
    if chat:
        return f"{USER}{instruction}\n{text}{END}{ASSISTANT}{answer}{END}"
    return f"{instruction}\n\nText: {text}\nAnswer: {answer}"


def instructions(data: Path, seed: int) -> list[str]:
    """Requests and their answers, some as chats: translations, topics, next lines and copies."""
    rng = random.Random(seed)
    examples: list[tuple[str, str, str]] = []
    for kk, en in parallel(data):
        examples += [(TO_ENGLISH, kk, en), (TO_KAZAKH, en, kk)]
    for lang in ("en", "kk"):
        examples += [(CLASSIFY, text, label) for text, label in topics(data, lang, "train")] * 3
    lines = [s for d in english(data, seed) for s in d.split("\n") if 40 < len(s) < 300]
    for a, b in zip(lines[:4000:2], lines[1:4000:2], strict=True):
        examples.append((CONTINUE, a, b))
    examples += [(REPEAT, s, s) for s in lines[4000:5000]]
    rng.shuffle(examples)
    rendered = [render(*e, chat=rng.random() < 0.4) for e in examples]
    return rendered + replies(data, seed)


def replies(data: Path, seed: int) -> list[str]:
    """Chats where each turn is a next line of a text: whatever is said, a sentence follows."""
    chats = []
    for documents in (english(data, seed), kazakh(data, seed)):
        for document in documents[:4000]:
            lines = [s for s in document.split("\n") if 20 < len(s) < 300][:4]
            turns = zip(lines[::2], lines[1::2], strict=False)
            chats.append("".join(f"{USER}{a}{END}{ASSISTANT}{b}{END}" for a, b in turns))
    return [chat for chat in chats if chat]


def mix(seed: int, *parts: tuple[list[str], float]) -> list[str]:
    """Shuffle several document lists together, each taken `share` times over (0.1 = a tenth)."""
    rng = random.Random(seed)
    documents: list[str] = []
    for part, share in parts:
        whole, fraction = int(share), share - int(share)
        documents += part * whole + rng.sample(part, int(len(part) * fraction))
    rng.shuffle(documents)
    return documents

"""What a new trio is worth on held-out text, and what is kept of its making."""

from __future__ import annotations

import gc
import json
from pathlib import Path

from trimix_gguf.adapting.adaptation import Adapted, summary
from trimix_gguf.adapting.preparing import HELD_OUT, documents_of
from trimix_gguf.adapting.publishing import keep
from trimix_gguf.choosing.score import score
from trimix_gguf.choosing.selection import SINGLE
from trimix_gguf.trio.prompt import Prompt
from trimix_gguf.trio.trio import Trio
from trimix_gguf.trios.triofile import TrioFile

MOST_TEXTS = 4
MOST_CHARACTERS = 1200  # of each


def table(trio: TrioFile, work: Path) -> str:
    """Perplexity of held-out text under each model and the best mix, by llama.cpp."""
    gc.collect()  # the trained model lies in cycles of the Trainer; the trio needs its memory
    texts = [document.text[:MOST_CHARACTERS] for document in documents_of(work / HELD_OUT)]
    with Trio.load(**trio.load_arguments()) as opened:
        result = score(opened, [_fitting(opened, text) for text in texts[:MOST_TEXTS]])
    best = result.best()
    lines = [f"perplexity of {sum(result.n_tokens)} held-out tokens:"]
    lines += [f"  {role:<12}{result.perplexity(w):>9.1f}" for role, w in SINGLE.items()]
    mix = f"alpha {best.alpha:.2g}, beta {best.beta:.2g}"
    lines.append(f"  {'best mix':<12}{result.perplexity(best):>9.1f}  ({mix})")
    text = "\n".join(lines)
    keep(trio, "heldout.txt", text + "\n")
    return text


def _fitting(trio: Trio, text: str) -> Prompt:
    """As much of a text as the context holds: some scripts have several tokens a character."""
    while (n := (prompt := trio.prompt(text)).n_tokens()) > trio.n_ctx - 8:
        text = text[: len(text) * (trio.n_ctx - 8) // n]
    return prompt


def write_results(adapted: Adapted, work: Path) -> None:
    """Keep in the trio's folder what was read, dropped and measured, and the held-out text."""
    assert adapted.trio is not None
    held = (" ".join(d.text.split()) for d in documents_of(work / HELD_OUT))
    keep(adapted.trio, "text.txt", "".join(f"{text}\n" for text in held))
    found = summary(adapted)
    files = found["text"]["files"]  # by name: the trio may go to others, and folders tell of people
    found["text"]["files"] = {Path(path).name: facts for path, facts in files.items()}
    text = json.dumps(found, ensure_ascii=False, indent=1)
    keep(adapted.trio, "adapted.json", text + "\n")

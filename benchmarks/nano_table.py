"""Perplexity of the nano trio, and of its mix, on held-out text: the table in the README.

    python benchmarks/nano_table.py --data DATA      (DATA holds corpus/, parallel/, eval/)

Three sets that no model was trained on: Kazakh lines, an English instruction over a Kazakh text
to classify (SIB-200 test), and one over a Kazakh sentence to translate (held-out pairs). Micro
perplexity; the weights are the lowest point of the published grid on the whole set. Bits per
character compare trios with other tokenizers: those of the mix, of all that is scored.
"""

import argparse
import json
import math
import sys
from pathlib import Path

from trimix_gguf import Trio, score
from trimix_gguf.choosing.selection import PROXY_TUNING, SINGLE

sys.path.insert(0, str(Path(__file__).parent.parent / "convert" / "nano"))
import corpus  # noqa: E402


def held_out(data: Path, n: int) -> dict[str, list[str]]:
    """Each set's name -> its first n texts."""
    lines = (data / "corpus" / "kk" / "heldout.txt").read_text(encoding="utf-8").splitlines()
    topics = corpus.topics(data, "kk", "test")
    pairs = corpus.parallel(data, heldout=True)
    return {
        "held-out Kazakh": [" ".join(lines[i : i + 4]) for i in range(0, len(lines), 4)][:n],
        "English instruction, Kazakh text: topic": [
            corpus.render(corpus.CLASSIFY, text, label, chat=False) for text, label in topics[:n]
        ],
        "English instruction, Kazakh text: translation": [
            corpus.render(corpus.TO_ENGLISH, kk, en, chat=False) for kk, en in pairs[:n]
        ],
    }


def main() -> None:
    """Measure, and print; the last line is JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("-n", type=int, default=100, help="texts a set")
    options = parser.parse_args()
    report = {}
    columns = (*SINGLE, "proxy_tuning", "fused")
    print("| text | tokens | " + " | ".join(columns) + " | weights | bits per character |")
    print("|---" * (len(columns) + 4) + "|")
    with Trio.nano() as trio:
        for name, texts in held_out(options.data, options.n).items():
            result = score(trio, [trio.prompt(text) for text in texts])
            best = result.best()
            named = {**SINGLE, "proxy_tuning": PROXY_TUNING, "fused": best}
            row = {c: result.perplexity(named[c]) for c in columns}
            weights = f"({best.alpha:g}, {best.beta:g})"
            cells = " | ".join(f"{v:.2f}" for v in row.values())
            n_tokens, n_characters = sum(result.n_tokens), sum(map(len, texts))
            bits = n_tokens * math.log2(row["fused"]) / n_characters
            print(f"| {name} | {n_tokens:,} | {cells} | {weights} | {bits:.3f} |", flush=True)
            report[name] = {**row, "alpha": best.alpha, "beta": best.beta, "bits": bits}
    print(json.dumps(report))


if __name__ == "__main__":
    main()

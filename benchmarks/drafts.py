"""Drafts against lockstep over several prompts: continuations, and instructions in English.

Weights by the method auto, greedy, the two forms in turn in one run. Passages are cut
evenly from TEXT. The two may part where the mix's two best tokens all but tie: a batch is summed
in another order than single tokens are; the gap of their logits is printed.
"""

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
from common import load, machine, parser, report, spread

from trimix_gguf.answering.drafting import Drafting
from trimix_gguf.bench.measuring import Run, decode
from trimix_gguf.choosing.selection import select_weights
from trimix_gguf.mixing.fusion import Mix
from trimix_gguf.trio.prompt import Prompt
from trimix_gguf.trio.trio import Trio

CONTINUE = "{}"
INSTRUCTIONS = (
    "Summarize the text in one sentence, in the language of the text.\n\nText: {}\n\nSummary:",
    "Say in the language of the text what it is about.\n\nText: {}\n\nAnswer:",
    "Write a short news report in the language of this text.\n\nText: {}\n\nReport:",
    "Translate the text into English.\n\nText: {}\n\nEnglish:",
)


def prompts(text: str, n_chars: int) -> list[tuple[str, str]]:
    """(kind, prompt): as many continuations as instructions, each of a passage of its own."""
    lines = [line for line in text.splitlines() if len(line) > 40]
    forms = [("continue", CONTINUE)] * len(INSTRUCTIONS) + [("instruct", i) for i in INSTRUCTIONS]
    found = []
    for at, (kind, form) in enumerate(forms):
        passage = " ".join(lines[at * len(lines) // len(forms) :][:20])
        found.append((kind, form.format(passage[:n_chars].rsplit(" ", 1)[0])))
    return found


def compare(trio: Trio, prompt: Prompt, n_tokens: int, repeats: int) -> dict[str, Any]:
    """Lockstep and drafting in turn, on one prompt."""
    trio.forget()
    mix = select_weights(trio, prompt).mix
    lockstep, drafts, accepted = [], [], []
    for _ in range(repeats):
        drafting = Drafting()
        never = Drafting(never=True)
        lockstep.append(decode(trio, prompt, mix, drafting=never, n_tokens=n_tokens))
        drafts.append(decode(trio, prompt, mix, drafting=drafting, n_tokens=n_tokens))
        accepted.append(drafting.acceptance or 0.0)
    return {
        "weights": [mix.weights.alpha, mix.weights.beta],
        "lockstep_tps": statistics.median(run.tps for run in lockstep),
        "tps": statistics.median(run.tps for run in drafts),
        "ratio": spread([b.tps / a.tps for a, b in zip(lockstep, drafts, strict=True)]),
        "acceptance": statistics.median(accepted),
        "tokens_per_round": statistics.median(n_tokens / len(run.n_drafted) for run in drafts),
        "parted": parting(trio, prompt, mix, lockstep[0], drafts),
    }


def parting(
    trio: Trio, prompt: Prompt, mix: Mix, lockstep: Run, drafts: Sequence[Run]
) -> dict[str, float] | None:
    """The first token that differs in some run, and the gap of its two best logits; or None."""
    others = [run.tokens for run in drafts if run.tokens != lockstep.tokens]
    if not others:
        return None
    at = min(next(i for i, t in enumerate(lockstep.tokens) if t != o[i]) for o in others)
    trio.prefill(prompt)
    for token in lockstep.tokens[:at]:
        trio.advance(token)
    second, first = np.sort(mix.fuse(trio.rows(), trio.unused))[-2:]
    return {"token": at, "gap": float(first - second)}


def main() -> None:
    """Measure, and print; the last line is JSON."""
    options = parser(__doc__)
    options.add_argument("--chars", type=int, default=350, help="of each passage")
    options.add_argument("--tokens", type=int, default=96, help="decoded after each prompt")
    options.add_argument("--repeats", type=int, default=3)
    options = options.parse_args()
    found = []
    with load(options) as trio:
        for kind, text in prompts(options.text.read_text(encoding="utf-8"), options.chars):
            prompt = trio.prompt(text)
            one = compare(trio, prompt, options.tokens, options.repeats)
            found.append({"kind": kind, "n_prompt": prompt.n_tokens(), **one})
    ratios = [one["ratio"]["median"] for one in found]
    result = {
        "machine": machine(options),
        "n": {"prompts": len(found), "tokens": options.tokens, "repeats": options.repeats},
        "prompts": found,
        "ratio": spread(ratios),
    }
    lines = [
        f"{'':10} {'prompt':>6}  weights   {'lockstep':>10}  {'drafts':>6}  {'ratio':16}  "
        f"{'accepted':>8}  {'a round':>7}  parted"
    ]
    for one in found:
        ratio, parted = one["ratio"], one["parted"]
        lines.append(
            f"{one['kind']:10} {one['n_prompt']:6}  {one['weights'][0]}, {one['weights'][1]}  "
            f"{one['lockstep_tps']:10.1f}  {one['tps']:6.1f}  "
            f"{ratio['median']:.2f} ({ratio['min']:.2f}-{ratio['max']:.2f})  "
            f"{one['acceptance']:8.0%}  {one['tokens_per_round']:7.2f}  "
            + (f"at {parted['token']}, gap {parted['gap']:.3f}" if parted else "no")
        )
    lines.append(
        f"drafts over lockstep, tokens/s: {statistics.median(ratios):.2f} "
        f"(median of {len(ratios)} prompts, {min(ratios):.2f} to {max(ratios):.2f})"
    )
    report(options, result, lines)


if __name__ == "__main__":
    main()

"""Which numbers to keep: one of those that were measured on the way, or the average of the last."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from trimix_gguf.adapting.extras import need
from trimix_gguf.adapting.history import ENDS, History, best_of
from trimix_gguf.adapting.judging import Judge, Judgement
from trimix_gguf.adapting.training import candidate, put_numbers

N_AVERAGED = 3  # of the last candidates


def choose(
    taught: Any,
    judge: Judge,
    history: History,
    folder: Path,
    dtype: str,
    say: Callable[[str], None],
) -> Judgement:
    """Put the best numbers into `taught`, and say which they are."""
    load_file = need("safetensors.torch").load_file
    base, *learned = history.all
    last = [one.step for one in learned[-N_AVERAGED:]]
    average = _average([load_file(str(candidate(folder, step))) for step in last])
    put_numbers(taught, average)
    averaged = judge.look(taught.model, last[-1], dtype)
    best = best_of([*learned, averaged])
    if best is not averaged:
        put_numbers(taught, load_file(str(candidate(folder, best.step))))
    name = f"the average of the last {len(last)}" if best is averaged else f"step {best.step}"
    mix = ""
    if base.partner is not None and best.partner is not None:
        mix = f"; the mix answers {base.partner[0]:.0%} -> {best.partner[0]:.0%}"
    say(f"kept: {name}; held-out perplexity {base.perplexity:.1f} -> {best.perplexity:.1f}{mix}")
    if best.perplexity >= base.perplexity:
        say("it did not learn the text: give more --tokens, or a lower --learning-rate")
    if best.falls_below(base, ENDS):
        say(
            "its answers to exercises are worse than before: more --replay and --exercises help, "
            "and a lower --learning-rate"
        )
    return best


def _average(several: list[dict[str, Any]]) -> dict[str, Any]:
    """The mean of each number, in float32."""
    return {name: sum(one[name].float() for one in several) / len(several) for name in several[0]}

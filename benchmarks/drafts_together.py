"""Drafts of several answers in one batch: tokens/s with and without, for each number of answers.

The engine of `trimix serve`, without HTTP. In a round each number of `--together` is answered in
both forms, one after the other, with the same greedy requests, whose weights are chosen by their
prompts. Times include reading. Processor seconds are given too: on a busy machine they say more.
"""

import argparse
import statistics
import threading
import time
from pathlib import Path
from typing import Any

from common import load, machine, nano_parser, or_nano, report, spread

from trimix_gguf.answering.batching import Batcher
from trimix_gguf.answering.request import Event, Request
from trimix_gguf.bench.measuring import TEXT
from trimix_gguf.mixing.sampling import Sampling
from trimix_gguf.trio.prompt import Prompt, Segment
from trimix_gguf.trio.trio import Trio


def main() -> None:
    """Measure, and print; the last line is JSON."""
    parser = nano_parser(__doc__)
    parser.add_argument("--together", type=int, nargs="+", default=(1, 2, 4, 8), metavar="N")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="default: every core")
    options = or_nano(parser.parse_args())
    most = max(options.together)
    n_ctx = 2 * most * (options.n_prompt + options.n_tokens)
    found: dict[int, list[dict[str, Any]]] = {n: [] for n in options.together}
    with load(options, n_ctx=n_ctx, n_threads=options.threads) as trio:
        requests = greedy(trio, options, most)
        answer(trio, requests[:1], drafts=False)  # warms up
        for _ in range(options.rounds):
            for n in options.together:
                pair = {
                    drafts: answer(trio, requests[:n], drafts=drafts) for drafts in (True, False)
                }
                found[n].append(compare(pair[True], pair[False]))
    named = argparse.Namespace(**{**vars(options), "text": options.text or Path("bench.TEXT")})
    result = {
        "machine": machine(named) | {"threads": options.threads},
        "n": {k: getattr(options, k) for k in ("rounds", "n_prompt", "n_tokens")},
        "together": {
            str(n): {key: spread([pair[key] for pair in pairs]) for key in pairs[0]}
            for n, pairs in found.items()
        },
    }
    report(options, result, [line(n, one) for n, one in result["together"].items()])


def greedy(trio: Trio, options: argparse.Namespace, n: int) -> list[Request]:
    """Requests that begin at different places of the text, and that nothing ends early."""
    text = TEXT if options.text is None else options.text.read_text(encoding="utf-8")
    ids = trio.models["large_ins"].tokenize(text)
    while len(ids) < 2 * options.n_prompt:
        ids += ids
    sampling = Sampling(temperature=0, logit_bias=dict.fromkeys(trio.end_of_generation, -100.0))
    starts = [i * (len(ids) - options.n_prompt) // n for i in range(n)]
    return [
        Request(
            Prompt((Segment.of(ids[start : start + options.n_prompt]),)),
            sampling=sampling,
            max_tokens=options.n_tokens,
        )
        for start in starts
    ]


def answer(trio: Trio, requests: list[Request], *, drafts: bool) -> dict[str, float]:
    """All at once: tokens per second and per processor second, and the drafted share of them."""
    trio.forget()
    events: list[Event] = []
    ended = threading.Semaphore(0)

    def take(_: int, event: Event) -> None:
        events.append(event)
        if event.error is not None or event.finish_reason is not None:
            ended.release()

    batcher = Batcher(trio, n_parallel=len(requests), n_queue=len(requests), drafts=drafts)
    wall, processor = time.perf_counter(), time.process_time()
    batcher.submit_all(requests, take)
    for _ in requests:
        ended.acquire()
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    batcher.close()
    tokens = [token for event in events for token in event.tokens]
    return {
        "tps": len(tokens) / wall,
        "tokens_per_cpu_s": len(tokens) / processor,
        "from_draft": statistics.mean(token.from_draft for token in tokens),
    }


def compare(drafted: dict[str, float], plain: dict[str, float]) -> dict[str, float]:
    """One pair: both speeds, and their ratios."""
    return {
        "tps": drafted["tps"],
        "tps_without": plain["tps"],
        "ratio": drafted["tps"] / plain["tps"],
        "cpu_ratio": drafted["tokens_per_cpu_s"] / plain["tokens_per_cpu_s"],
        "cpu_tps": drafted["tokens_per_cpu_s"],
        "from_draft": drafted["from_draft"],
    }


def line(n: str, one: dict[str, dict[str, float]]) -> str:
    """The figures of one number of answers."""
    ratio, processor = one["ratio"], one["cpu_ratio"]
    return (
        f"{n} together: {one['tps']['median']:.1f} tokens/s, without drafts "
        f"{one['tps_without']['median']:.1f}: {ratio['median']:.2f} times ({ratio['min']:.2f} to "
        f"{ratio['max']:.2f}); by processor time {processor['median']:.2f} "
        f"({processor['min']:.2f} to {processor['max']:.2f}); "
        f"{one['from_draft']['median']:.0%} of the tokens were drafted"
    )


if __name__ == "__main__":
    main()

"""Prompts that share a beginning: time to choose weights for each, with it kept and without.

The first prompt pays for the shared part either way; a ratio for `--prompts` of them follows
from the medians, for reading each anew would take as long every time.
"""

import statistics
import time

from common import load, machine, parser, report, text_ids

from trimix_gguf.choosing.selection import select_weights
from trimix_gguf.trio.prompt import Prompt, Segment


def main() -> None:
    """Measure, and print; the last line is JSON."""
    options = parser(__doc__)
    options.add_argument("--shared", type=int, default=600, help="tokens of the shared beginning")
    options.add_argument("--own", type=int, default=30, help="tokens of each prompt's own")
    options.add_argument("--prompts", type=int, default=50, help="that the ratio is given for")
    options.add_argument("--measured", type=int, default=4, help="prompts timed each way")
    options = options.parse_args()
    n_ids = options.shared + options.own * (options.measured + 1)
    with load(options, n_ctx=options.shared + options.own + 8) as trio:
        ids = text_ids(trio, options, n_ids)
        shared, rest = ids[: options.shared], ids[options.shared :]
        ends = [rest[i * options.own : (i + 1) * options.own] for i in range(options.measured + 1)]
        prompts = [Prompt((Segment.of(shared + end),)) for end in ends]
        kept: list[float] = []
        anew: list[float] = []
        chosen = []
        for prompt in prompts[1:]:
            trio.forget()
            anew.append(timed(lambda p=prompt: chosen.append(select_weights(trio, p).weights)))
            select_weights(trio, prompts[0])
            kept.append(timed(lambda p=prompt: chosen.append(select_weights(trio, p).weights)))
    first, later = statistics.median(anew), statistics.median(kept)
    n = options.prompts
    result = {
        "machine": machine(options),
        "n": {"shared": options.shared, "own": options.own, "measured": options.measured},
        "seconds": {"anew": first, "kept": later},
        "same_weights": chosen[::2] == chosen[1::2],
        "ratio": {"one": first / later, f"{n} prompts": n * first / (first + (n - 1) * later)},
    }
    lines = [
        f"a prompt read anew {first:.2f} s, with its beginning kept {later:.2f} s",
        f"{n} prompts: {result['ratio'][f'{n} prompts']:.1f} × (from the medians)",
        f"the same weights either way: {result['same_weights']}",
    ]
    report(options, result, lines)


def timed(call) -> float:
    """Seconds that `call` takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()

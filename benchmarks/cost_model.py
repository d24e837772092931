"""What a round of speculative decoding costs: the model, this machine's times, other machines.

A round drafts k tokens with small_cpt and verifies them in one batch. With p the chance that a
drafted token is accepted once those before it were, it gives 1 + p + … + p^k tokens and takes

    k·t_cpt(1) + p^k·t_cpt(1) + t_large(k + 1) [+ t_base(k + 1)]

where small_cpt reads its last drafted token only if all were accepted. Here t(n) is measured;
elsewhere it is predicted from the roofline: decoding reads every weight once, however many tokens
are in the batch, until arithmetic takes longer. That takes peak figures, no KV cache and one flat
overhead, so its ratios mean more than its speeds. Nothing predicted was measured.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

from common import load, machine, parser, report, spread, text_ids

from trimix_gguf.answering import drafting as drafts
from trimix_gguf.answering.decoding import decode_steps
from trimix_gguf.answering.drafting import DRAFTER, MOST_DRAFTED, Drafting
from trimix_gguf.answering.steering import Steering
from trimix_gguf.bench.measuring import Run, decode, read_bytes
from trimix_gguf.machine.gguf_file import read_gguf
from trimix_gguf.mixing.fusion import Mix, Weights
from trimix_gguf.mixing.sampler import Sampler
from trimix_gguf.mixing.sampling import Sampling
from trimix_gguf.roles import ROLES
from trimix_gguf.trio.model import Model
from trimix_gguf.trio.prompt import Prompt, Segment
from trimix_gguf.trio.trio import Trio

SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 32)  # tokens in one batch
LENGTHS = range(9)  # of drafts, 0 being lockstep
TRIES = 5  # of each batch, for each prompt

Size = tuple[float, float]  # bytes that one decode reads, parameters
Times = dict[str, dict[int, list[float]]]  # role -> tokens in a batch -> seconds


# -- the model ------------------------------------------------------------------------------


def expected_tokens(k: int, p: float) -> float:
    """Tokens of the answer that a round of k drafted ones gives."""
    return sum(p**i for i in range(k + 1))


@dataclass(frozen=True)
class Costs:
    """Seconds: one token by the drafter, n tokens by the verifiers; Python's own beside them.

    `row` is spent on each token of the answer (mixing, sampling), `pick` on each drafted one.
    `mixed` says whether the drafter's rows are part of the mix.
    """

    draft: float
    verify: Callable[[int], float]
    mixed: bool = True
    row: float = 0.0
    pick: float = 0.0

    def round(self, k: int, p: float) -> float:
        """Seconds of a round of k drafted tokens."""
        lead = p**k * self.draft if self.mixed else 0.0
        python = k * self.pick + expected_tokens(k, p) * self.row
        return k * self.draft + lead + self.verify(k + 1) + python

    def tps(self, k: int, p: float) -> float:
        """Expected tokens per second with drafts of `k`, each accepted with probability `p`."""
        return expected_tokens(k, p) / self.round(k, p)

    def best(self, p: float, lengths: Sequence[int]) -> int:
        """The length of draft with the most tokens per second."""
        return max(lengths, key=lambda k: self.tps(k, p))


@dataclass(frozen=True)
class Machine:
    """Peak bytes and operations a second; `launch` is what any decode costs, assumed."""

    name: str
    bandwidth: float
    flops: float
    launch: float = 1e-3

    def seconds(self, n: int, n_bytes: float, n_params: float) -> float:
        """Decoding n tokens in one batch."""
        return max(n_bytes / self.bandwidth, n * 2 * n_params / self.flops) + self.launch


MACHINES = (
    Machine("Apple M, 100 GB/s, 4 TFLOP/s", 100e9, 4e12),
    Machine("Apple M Max, 400 GB/s, 14 TFLOP/s", 400e9, 14e12),
    Machine("laptop GPU, 256 GB/s, 20 TFLOP/s", 256e9, 20e12),
    Machine("H100, 3.35 TB/s, 990 TFLOP/s", 3.35e12, 990e12),
)


def quantized(n_bytes: float, bits: float = 4.85) -> Size:
    """A file's bytes, and the parameters that they hold at Q4_K_M's bits each."""
    return n_bytes, n_bytes * 8 / bits


LARGER = {
    "large_ins": quantized(9.0e9),
    "small_cpt": quantized(1.0e9),
    "small_base": quantized(1.0e9),
}


def elsewhere(on: Machine, sizes: dict[str, Size], weights: Weights, p: float) -> dict[str, Any]:
    """Tokens a second in lockstep, drafting what pays most, and by large_ins alone."""
    verifiers = [role for role in weights.active if role != DRAFTER]
    costs = Costs(
        on.seconds(1, *sizes[DRAFTER]),
        lambda n: sum(on.seconds(n, *sizes[role]) for role in verifiers),
        mixed=DRAFTER in weights.active,
    )
    k = costs.best(p, range(MOST_DRAFTED + 1))
    lockstep, speed = costs.tps(0, p), costs.tps(k, p)
    alone = 1 / on.seconds(1, *sizes["large_ins"])
    return {
        "lockstep_tps": lockstep,
        "large_ins_tps": alone,
        "n_draft": k,
        "tps": speed,
        "over_lockstep": speed / lockstep,
        "over_large_ins": speed / alone,
    }


# -- this machine ---------------------------------------------------------------------------


def batch_seconds(trio: Trio, ids: list[int], n_past: int) -> Times:
    """Decoding the first ids after `n_past` in one batch, every row wanted."""
    times: Times = {role: {n: [] for n in SIZES} for role in ROLES}
    trio.forget()
    for model in trio.models.values():
        for start in range(0, n_past, model.n_batch):
            model.decode(ids[start : min(start + model.n_batch, n_past)])
    for i in range(TRIES + 1):
        for n in SIZES:
            for role, model in trio.models.items():
                started = time.perf_counter()
                model.decode(ids[n_past : n_past + n], every_row=True)
                if i > 0:  # the first warms up
                    times[role][n].append(time.perf_counter() - started)
                model.rewind(n_past)
    trio.forget()
    return times


class Watched(Drafting):
    """Drafts of one length, with the fate of each token whose predecessors were accepted."""

    def __init__(self, k: int) -> None:
        super().__init__(n_draft=k)
        self.n_tried = 0

    def learn(self, confidences: Sequence[float], n_accepted: int) -> None:
        """As Drafting.learn; counts the tokens that were tried."""
        super().learn(confidences, n_accepted)
        self.n_tried += min(n_accepted + 1, len(confidences))


Runs = dict[int, list[list[tuple[Run, Watched]]]]  # length -> prompt -> repeats


def measured(
    trio: Trio, texts: list[list[int]], weights: Weights, options: argparse.Namespace
) -> tuple[Times, Runs]:
    """For each text in turn its batches, then runs in which the lengths of drafts take turns."""
    times: Times = {role: {n: [] for n in SIZES} for role in ROLES}
    runs: Runs = {k: [[] for _ in texts] for k in LENGTHS}
    for i, ids in enumerate(texts):
        middle = options.context + options.tokens // 2  # of the stretch that is decoded
        for role, of in batch_seconds(trio, ids, middle).items():
            for n, seconds in of.items():
                times[role][n] += seconds
        prompt = Prompt((Segment.of(ids[: options.context]),))
        for _ in range(options.repeats):
            for k in LENGTHS:
                drafting = Watched(k)
                run = decode(trio, prompt, Mix(weights), drafting=drafting, n_tokens=options.tokens)
                runs[k][i].append((run, drafting))
    return times, runs


def checked(times: Times, runs: Runs, weights: Weights, n_tokens: int) -> dict[str, Any]:
    """The model's tokens a second for each length beside those measured."""
    typical = medians(times)
    flat = {k: [one for of in by_prompt for one in of] for k, by_prompt in runs.items()}
    drafted = [one for k in LENGTHS if k for one in flat[k]]
    p = sum(d.n_accepted for _, d in drafted) / sum(d.n_tried for _, d in drafted)
    row = statistics.median(outside(run) / n_tokens for run, _ in flat[0])
    pick = statistics.median((outside(r) - n_tokens * row) / d.n_drafted for r, d in drafted)

    def verify(n: int) -> float:
        return sum(typical[role][n] for role in weights.active if role != DRAFTER)

    mixed = DRAFTER in weights.active
    decodes = Costs(typical[DRAFTER][1], verify, mixed=mixed)
    whole = Costs(typical[DRAFTER][1], verify, mixed=mixed, row=row, pick=max(0.0, pick))
    lengths = []
    for k in LENGTHS:
        seconds = sum(statistics.median(run.seconds for run, _ in of) for of in runs[k])
        tps = n_tokens * len(runs[k]) / seconds
        n_rounds = sum(len(run.n_drafted) for run, _ in flat[k])
        one = {
            "n_draft": k,
            "tokens_per_round": n_tokens * len(flat[k]) / n_rounds,
            "expected_tokens": expected_tokens(k, p),
            "tps": tps,
            "predicted_tps": whole.tps(k, p),
            "error": whole.tps(k, p) / tps - 1,
            "decodes_alone_error": decodes.tps(k, p) / tps - 1,
        }
        lengths.append(one)
    return {
        "acceptance": p,
        "ms_outside": {"a token": row * 1e3, "a drafted token": whole.pick * 1e3},
        "lengths": lengths,
        "abs_error": spread([abs(one["error"]) for one in lengths]),
        "decodes_alone_abs_error": spread([abs(one["decodes_alone_error"]) for one in lengths]),
        "best": {
            "predicted": whole.best(p, LENGTHS),
            "measured": max(lengths, key=lambda one: one["tps"])["n_draft"],
        },
    }


def medians(times: Times) -> dict[str, dict[int, float]]:
    """The median time by role and size."""
    return {r: {n: statistics.median(t) for n, t in of.items()} for r, of in times.items()}


def outside(run: Run) -> float:
    """Seconds of a run outside llama.cpp."""
    return run.seconds - run.inside


# -- where the time goes --------------------------------------------------------------------

PARTS = {
    (Mix, "fuse"): "fuse",
    (drafts, "probability"): "drafter's confidence",
    (Sampler, "sample"): "sampling",
    (Sampler, "accept"): "sampling",
    (Sampler, "clone"): "sampling",
}


def profile(trio: Trio, ids: list[int], mix: Mix, k: int, n_tokens: int) -> dict[str, float]:
    """Milliseconds a token with drafts of k, by part; `other` is the Python around them."""
    spent = {**dict.fromkeys(ROLES, 0.0), **dict.fromkeys(PARTS.values(), 0.0)}
    role_of = {id(model): role for role, model in trio.models.items()}
    sampler = Sampler(trio.models["large_ins"].vocab, trio.n_vocab, Sampling(temperature=0))
    trio.prefill(Prompt((Segment.of(ids[:-1]),)))
    trio.rows()
    trio.advance(ids[-1])  # owed, as each later token is
    steps = decode_steps(trio, Steering(mix), sampler, drafting=Watched(k), max_tokens=n_tokens)
    with ExitStack() as stack:
        stack.enter_context(timed(Model, "decode_entries", spent, lambda model: role_of[id(model)]))
        for (owner, name), part in PARTS.items():
            stack.enter_context(timed(owner, name, spent, lambda _, part=part: part))
        started = time.perf_counter()
        for step in islice(steps, n_tokens):
            sampler.accept(step.token)
        took = time.perf_counter() - started
    steps.close()
    whole = {**spent, "other": took - sum(spent.values()), "step": took}
    return {part: seconds / n_tokens * 1e3 for part, seconds in whole.items()}


@contextmanager
def timed(owner: Any, name: str, spent: dict[str, float], part: Callable) -> Iterator[None]:
    """Adds the seconds of a function's calls to the part that its first argument belongs to."""
    original = getattr(owner, name)

    def run(first: Any, *arguments: Any, **options: Any) -> Any:
        started = time.perf_counter()
        result = original(first, *arguments, **options)
        spent[part(first)] += time.perf_counter() - started
        return result

    setattr(owner, name, run)
    try:
        yield
    finally:
        setattr(owner, name, original)


# -- the command ----------------------------------------------------------------------------


def main() -> None:
    """Measure, and print; the last line is JSON."""
    options = parser(__doc__)
    options.add_argument("--context", type=int, default=256, help="tokens of each prompt")
    options.add_argument("--tokens", type=int, default=96, help="decoded after it")
    options.add_argument("--prompts", type=int, default=2, help="cut from the text in turn")
    options.add_argument("--repeats", type=int, default=3, help="of each prompt and length")
    options.add_argument("--threads", type=int, default=0, help="default: all cores")
    options.add_argument("--weights", default="0.1,0.9", metavar="ALPHA,BETA")
    options = options.parse_args()
    weights = Weights(*map(float, options.weights.split(",")))
    n_each = options.context + options.tokens + SIZES[-1]
    settings = {"n_ctx": n_each, "n_window": SIZES[-1], "n_threads": options.threads}
    with load(options, **settings) as trio:
        ids = text_ids(trio, options, n_each * options.prompts)
        texts = [ids[i * n_each : (i + 1) * n_each] for i in range(options.prompts)]
        times, runs = measured(trio, texts, weights, options)
        found = checked(times, runs, weights, options.tokens)
        k = found["best"]["measured"] or 3
        spent = {
            name: profile(trio, texts[0][: options.context], Mix(weights), n, options.tokens)
            for name, n in (("lockstep", 0), (f"drafts of {k}", k))
        }
        trios = {"this trio": sizes_of(trio), "14B + 1.5B, Q4_K_M": LARGER}
    p = found["acceptance"]
    result = {
        "machine": machine(options),
        "n": {
            name: getattr(options, name)
            for name in ("context", "tokens", "prompts", "repeats", "threads", "weights")
        },
        "ms": {r: {n: t * 1e3 for n, t in of.items()} for r, of in medians(times).items()},
        **found,
        "profile_ms": spent,
        "prediction": {
            name: {m.name: elsewhere(m, sizes, weights, p) for m in MACHINES}
            for name, sizes in trios.items()
        },
    }
    report(options, result, described(result))


def sizes_of(trio: Trio) -> dict[str, Size]:
    """Role -> what its tensors, an adapter's included, come to."""
    sizes = {}
    for role, model in trio.models.items():
        files = [model.file, *([read_gguf(model.lora)] if model.lora is not None else [])]
        n_bytes = read_bytes(model.file) + sum(file.weight_bytes for file in files[1:])
        n_params = sum(math.prod(t.shape) for file in files for t in file.tensors)
        sizes[role] = (n_bytes, n_params)
    return sizes


def described(result: dict[str, Any]) -> list[str]:
    """The figures, as lines."""
    p, ms = result["acceptance"], result["ms"]
    lines = [f"{'ms of a batch of':<20}" + "".join(f"{n:>8}" for n in SIZES)]
    lines += [f"{role:<20}" + "".join(f"{ms[role][n]:8.2f}" for n in SIZES) for role in ROLES]
    took = ", ".join(f"{what} {t:.2f} ms" for what, t in result["ms_outside"].items())
    lines += [
        f"\nacceptance of a drafted token {p:.3f}; outside llama.cpp: {took}",
        f"{'n_draft':>7} {'tokens a round':>15} {'expected':>9} {'tokens/s':>9} {'predicted':>10}"
        f" {'error':>7} {'of decodes alone':>17}",
    ]
    lines += [
        f"{one['n_draft']:>7} {one['tokens_per_round']:>15.2f} {one['expected_tokens']:>9.2f} "
        f"{one['tps']:>9.2f} {one['predicted_tps']:>10.2f} {one['error']:>+7.1%} "
        f"{one['decodes_alone_error']:>+17.1%}"
        for one in result["lengths"]
    ]
    error, alone = result["abs_error"], result["decodes_alone_abs_error"]
    best = result["best"]
    lines += [
        f"median |error| {error['median']:.1%} (at most {error['max']:.1%}); of decodes alone "
        f"{alone['median']:.1%} (at most {alone['max']:.1%})",
        f"fastest length: predicted {best['predicted']}, measured {best['measured']}",
        "\nms a token of the answer:",
    ]
    for name, spent in result["profile_ms"].items():
        parts = ", ".join(f"{part} {t:.2f}" for part, t in spent.items() if part != "step")
        lines.append(f"  {name}: {spent['step']:.2f} = {parts}")
    for name, machines in result["prediction"].items():
        lines.append(f"\nPREDICTION, not measured: {name}, acceptance {p:.3f}, by the roofline")
        lines += [
            f"  {on}: lockstep {t['lockstep_tps']:.0f} tokens/s, drafts of {t['n_draft']} "
            f"{t['tps']:.0f}: {t['over_lockstep']:.2f} × lockstep, "
            f"{t['over_large_ins']:.2f} × large_ins alone ({t['large_ins_tps']:.0f})"
            for on, t in machines.items()
        ]
    return [*lines, ""]


if __name__ == "__main__":
    main()

"""How fast a trio is on this machine, and why: every form within one run, figures medians.

Reading a prompt is bound by compute, decoding by memory bandwidth: a token costs at least the
time to read the weights of each model that the mix asks. Within a repeat the forms run in
turn, and a ratio is of one repeat's times: a machine that slows down slows both of its sides.
"""

import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trimix_gguf.answering.decoding import decode_steps
from trimix_gguf.answering.drafting import Drafting
from trimix_gguf.answering.generation import generate
from trimix_gguf.answering.steering import Steering
from trimix_gguf.bench.timing import time_answers
from trimix_gguf.choosing.selection import Selection
from trimix_gguf.errors import PromptError
from trimix_gguf.machine.gguf_file import GGUFFile, read_gguf
from trimix_gguf.machine.memory import peak_rss
from trimix_gguf.machine.threads import available_cores
from trimix_gguf.mixing.fusion import METHODS, Mix, Rows, fuse
from trimix_gguf.mixing.sampler import Sampler
from trimix_gguf.mixing.sampling import Sampling
from trimix_gguf.mixing.scoring import GRID, Float64, grid_token_nlls
from trimix_gguf.roles import LOADING_ORDER, ROLES, Role
from trimix_gguf.trio.model import Logits
from trimix_gguf.trio.prefill import Window
from trimix_gguf.trio.prompt import Prompt, Segment
from trimix_gguf.trio.trio import Trio

TEXT = """Read the text and write one more paragraph of it, in Kazakh and in the same style.

Қазақстан — Орталық Азияда орналасқан мемлекет. Елдің астанасы — Астана қаласы, ал ең ірі қаласы —
Алматы. Қазақ тілі түркі тілдерінің қыпшақ тобына жатады. Көктемде Наурыз мерекесі тойланады:
адамдар бір-біріне қонаққа барып, наурыз көже ішеді. Абай Құнанбайұлы — қазақтың ұлы ақыны, ойшылы
және аудармашысы. Оның қара сөздері бүгін де мектептерде оқытылады. Бурабай көлі мен Алтай таулары
туристердің сүйікті орындары болып саналады. Соңғы жылдары елде жаңа теміржолдар, мектептер мен
ауруханалар салынып жатыр. Ауыл тұрғындары мал шаруашылығымен және егін егумен айналысады.

"""
N_PROMPT = 256  # tokens of TEXT
_BANDWIDTH_BYTES = 256 << 20  # read at once: more than any last-level cache in common use
_GRID_ROWS = 16  # rows of logits that both forms score, from all over the prompt
_TRIES = 5  # of what takes milliseconds, so that one interruption changes little


@dataclass(frozen=True)
class Run:
    """One greedy decoding; `n_drafted` holds each round's length, 0 for a step of lockstep."""

    tokens: list[int]
    seconds: float
    inside: float  # seconds of them in Model.decode_entries
    n_drafted: list[int]

    @property
    def tps(self) -> float:
        """Tokens per second."""
        return len(self.tokens) / self.seconds


@dataclass(frozen=True)
class Repeat:
    """Every form once; times in seconds."""

    prefill: dict[Role, float]
    alone: dict[Role, Run]
    lockstep: Run
    speculative: Run
    speed: Mapping[str, float]  # of an answer with weight selection
    grid: dict[str, float]


def measure(
    trio: Trio,
    prompt: Prompt,
    *,
    n_tokens: int = 64,
    repeats: int = 3,
    mix: Mix | None = None,
    progress: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:
    """Measure a trio on `prompt` and `n_tokens` after it; without `mix`, as it chooses.

    Times in seconds or milliseconds, speeds in tokens per second, sizes in bytes. Raises
    PromptError where the two do not fit in the context together.
    """
    n_prompt = prompt.n_tokens()
    if n_prompt + n_tokens > trio.n_ctx:
        raise PromptError(
            f"{n_prompt} tokens of prompt and {n_tokens} after it do not fit in a context of "
            f"{trio.n_ctx}; raise --n-ctx or take fewer"
        )
    progress("warming up")
    trio.forget()
    answer = generate(trio, prompt, max_tokens=n_tokens, temperature=0)
    memory = memory_of(trio)  # before this module's own arrays
    chosen = answer.selection if mix is None else Selection(mix, "fixed")
    assert chosen is not None  # every answer has one
    runs = []
    for i in range(repeats):
        progress(f"repeat {i + 1} of {repeats}")
        runs.append(measure_once(trio, prompt, chosen.mix, n_tokens))
    progress("comparing texts, reading memory")
    return {
        "weights": chosen.to_json(),
        "n_prompt_tokens": n_prompt,
        "n_tokens": n_tokens,
        "repeats": repeats,
        **speeds(runs, n_prompt),
        "same_text": same_text(trio, prompt, chosen.mix, runs),
        "grid": {key: _median(r.grid[key] for r in runs) for key in runs[0].grid},
        "ttft_s": _median(r.speed["ttft_s"] for r in runs),
        "select_s": _median(r.speed["select_s"] for r in runs),
        "answer_s": time_answers(trio, prompt, mix=mix, n_tokens=n_tokens, repeats=repeats),
        "memory": memory,
        "bandwidth": floor(trio, chosen.mix, _median(r.lockstep.seconds for r in runs) / n_tokens),
    }


def bench_prompt(trio: Trio, text: str = TEXT, n_tokens: int | None = None) -> Prompt:
    """`text` as a prompt, cut to `n_tokens` or repeated up to them."""
    prompt = trio.prompt(text)
    if n_tokens is None:
        return prompt
    *bos, body = prompt.segments
    ids, n = body.ids["large_ins"], n_tokens - sum(len(s.ids["large_ins"]) for s in bos)
    return Prompt((*bos, Segment.of((ids * math.ceil(n / len(ids)))[:n])))


# -- one repeat -----------------------------------------------------------------------------


def measure_once(trio: Trio, prompt: Prompt, mix: Mix, n_tokens: int) -> Repeat:
    """Run every form once, in turn."""
    trio.forget()
    speed = generate(trio, prompt, max_tokens=1, temperature=0).speed
    trio.forget()
    trio.prefill(prompt)
    prefill = {role: _timed(partial(trio.rows, (role,))) for role in ROLES}

    def lockstep(one: Mix) -> Run:
        return decode(trio, prompt, one, drafting=Drafting(never=True), n_tokens=n_tokens)

    return Repeat(
        prefill=prefill,
        alone={role: lockstep(METHODS[role]) for role in ROLES},
        lockstep=lockstep(mix),
        speculative=decode(trio, prompt, mix, drafting=Drafting(), n_tokens=n_tokens),
        speed=speed,
        grid=grid_scoring(trio, prompt, sum(prefill.values())),
    )


def decode(trio: Trio, prompt: Prompt, mix: Mix, *, drafting: Drafting, n_tokens: int) -> Run:
    """Greedy tokens after a prompt that the caches hold; none of them ends the text."""
    bias = dict.fromkeys(trio.end_of_generation, -math.inf)
    sampling = Sampling(temperature=0, logit_bias=bias)
    sampler = Sampler(trio.models["large_ins"].vocab, trio.n_vocab, sampling)
    trio.prefill(prompt)
    trio.rows()
    # Owe the newest token, as every later step does: n tokens cost n decodes.
    trio.rewind(1)
    trio.advance(prompt.segments[-1].ids["large_ins"][-1])
    tokens: list[int] = []
    lengths: list[int] = []
    steps = decode_steps(trio, Steering(mix), sampler, drafting=drafting, max_tokens=n_tokens)
    with decode_times(trio) as spans, closing(steps):
        started = time.perf_counter()
        for step in islice(steps, n_tokens):
            sampler.accept(step.token)
            tokens.append(step.token)
            if not step.from_draft:  # the last of its round
                lengths.append(drafting.n_drafted - sum(lengths))
        seconds = time.perf_counter() - started
    return Run(tokens, seconds, covered(spans), lengths)


@contextmanager
def decode_times(trio: Trio) -> Iterator[list[tuple[float, float]]]:
    """Collects when each Model.decode_entries began and ended."""
    spans: list[tuple[float, float]] = []

    def timed(decode: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            started = time.perf_counter()
            rows = decode(*arguments, **options)
            spans.append((started, time.perf_counter()))
            return rows

        return run

    for model in trio.models.values():
        model.decode_entries = timed(model.decode_entries)  # type: ignore[method-assign]
    try:
        yield spans
    finally:
        for model in trio.models.values():
            del model.decode_entries  # the class's own again


def covered(spans: Sequence[tuple[float, float]]) -> float:
    """Seconds in at least one span: models on different devices decode at the same time."""
    total, until = 0.0, -math.inf
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def grid_scoring(trio: Trio, prompt: Prompt, prefill_s: float) -> dict[str, float]:
    """Scoring the prompt at GRID²: against reading it, and against the naive form on some rows.

    `share_of_prefill` is over the three models' reading with only the last row of logits;
    `over_naive` compares one thread with one.
    """
    spent, seen, kept = 0.0, 0, []
    every = math.ceil(prompt.n_scored / _GRID_ROWS)
    settings = {"unused": trio.unused, "n_threads": available_cores()}

    def consume(window: Window) -> None:
        nonlocal spent, seen
        spent += nll_seconds(grid_token_nlls, window.rows, window.targets, **settings)
        picked = slice(-seen % every, None, every)
        rows = (window.rows[role][picked].copy() for role in ROLES)
        kept.append((*rows, window.targets[picked]))
        seen += len(window.targets)

    trio.forget()
    trio.prefill(prompt, consume=consume)
    *logits, targets = (np.concatenate(parts) for parts in zip(*kept, strict=True))
    rows = dict(zip(ROLES, logits, strict=True))
    pairs = [
        [nll_seconds(form, rows, targets) / len(targets) for form in (grid_token_nlls, naive_nll)]
        for _ in range(_TRIES)
    ]
    return {
        "over_naive": _median(naive / ours for ours, naive in pairs),
        "share_of_prefill": spent / prefill_s,
        "ms_per_token": _median(ours for ours, _ in pairs) * 1e3,
        "naive_ms_per_token": _median(naive for _, naive in pairs) * 1e3,
    }


def nll_seconds(
    form: Callable[..., Float64], rows: Rows, targets: NDArray[np.int64], **settings: Any
) -> float:
    """Seconds that `form` takes to score rows at every point of GRID²."""
    return _timed(lambda: form(**rows, targets=targets, alphas=GRID, betas=GRID, **settings))


def naive_nll(
    *,
    large_ins: Logits,
    small_cpt: Logits,
    small_base: Logits,
    targets: NDArray[np.int64],
    alphas: Sequence[float],
    betas: Sequence[float],
) -> Float64:
    """Summed nats in plain form: per point a mix and a float32 log-softmax, on whole arrays."""
    nll, at = np.empty((len(alphas), len(betas))), np.arange(len(targets))
    for i, a in enumerate(np.asarray(alphas, np.float32)):
        for j, b in enumerate(np.asarray(betas, np.float32)):
            fused = a * large_ins + b * small_cpt + (np.float32(1) - a - b) * small_base
            fused -= fused.max(-1, keepdims=True)
            logprobs = fused - np.log(np.exp(fused).sum(-1, keepdims=True))
            nll[i, j] = -logprobs[at, targets].sum()
    return nll


# -- all repeats ----------------------------------------------------------------------------


def speeds(runs: Sequence[Repeat], n_prompt: int) -> dict[str, Any]:
    """Tokens per second of each form, and what speculation drafted."""
    drafted = [n for r in runs for n in r.speculative.n_drafted]
    n_tokens = sum(len(r.speculative.tokens) for r in runs)
    n_accepted = n_tokens - len(drafted)  # each round ends with one token of the target's own
    ratios = [r.speculative.tps / r.lockstep.tps for r in runs]
    return {
        **{
            role: {
                "prefill_tps": _median(n_prompt / r.prefill[role] for r in runs),
                "decode_tps": _median(r.alone[role].tps for r in runs),
            }
            for role in LOADING_ORDER
        },
        "lockstep": {
            "decode_tps": _median(r.lockstep.tps for r in runs),
            "overhead": _median(r.lockstep.seconds / r.lockstep.inside for r in runs),
            "outside_share": _median(1 - r.lockstep.inside / r.lockstep.seconds for r in runs),
        },
        "speculative": {
            "decode_tps": _median(r.speculative.tps for r in runs),
            "n_draft": statistics.median_low(drafted),
            "lengths": {str(n): times for n, times in sorted(Counter(drafted).items())},
            "acceptance": n_accepted / sum(drafted) if any(drafted) else None,
            "tokens_per_round": n_tokens / len(drafted),
        },
        "speculative_over_lockstep": _median(ratios),
        "speculative_over_lockstep_range": [min(ratios), max(ratios)],
    }


def same_text(
    trio: Trio, prompt: Prompt, mix: Mix, runs: Sequence[Repeat]
) -> bool | dict[str, float]:
    """True, or where lockstep and speculation first differ, and the gap between the two logits."""
    for run in runs:
        ours, theirs = run.lockstep.tokens, run.speculative.tokens
        i = first_difference(ours, theirs)
        if i is not None:
            trio.prefill(Prompt((*prompt.segments, Segment.of(ours[:i]))))
            fused = fuse(trio.rows(mix.weights.active), mix.weights)
            return {"index": i, "gap": abs(float(fused[ours[i]] - fused[theirs[i]]))}
    return True


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """Index of the first token where two texts of one length differ; None where they do not."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), None)


# -- the machine ----------------------------------------------------------------------------


def floor(trio: Trio, mix: Mix, seconds: float) -> dict[str, float | None]:
    """The time to read the active weights once per token, beside the `seconds` measured.

    None where some of them are not in the CPU's memory. Weights that fit in its cache beat it.
    """
    speed, models = bandwidth(), [trio.models[role] for role in mix.roles]
    n_bytes = sum(read_bytes(m.file) for m in models)
    n_bytes += sum(read_gguf(m.lora).weight_bytes for m in models if m.lora is not None)
    on_cpu = all(m.device == "CPU" for m in models)
    return {
        "gb_per_s": speed / 1e9,
        "bytes_per_token": n_bytes,
        "floor_ms": n_bytes / speed * 1e3 if on_cpu else None,
        "measured_ms": seconds * 1e3,
    }


def bandwidth() -> float:
    """Bytes per second that all cores together read from memory: the best of a few large sums."""
    n = available_cores()
    parts = [np.ones(_BANDWIDTH_BYTES // 8 // n, np.uint64) for _ in range(n)]
    with ThreadPoolExecutor(n) as pool:  # NumPy releases the GIL
        took = min(_timed(lambda: list(pool.map(np.sum, parts))) for _ in range(_TRIES))
    return sum(part.nbytes for part in parts) / took


def read_bytes(file: GGUFFile) -> int:
    """Bytes that every token reads: an embedding is only looked up, and few experts are asked."""
    tied = all(tensor.name != "output.weight" for tensor in file.tensors)
    counts = (f"{file.architecture}.{name}" for name in ("expert_used_count", "expert_count"))
    n_used, n_experts = (file.metadata.get(name) or 1 for name in counts)
    read = [t for t in file.tensors if tied or t.name != "token_embd.weight"]
    of_experts = sum(t.n_bytes for t in read if "_exps." in t.name)
    return sum(t.n_bytes for t in read) - of_experts + of_experts * n_used // n_experts


def memory_of(trio: Trio) -> dict[str, int]:
    """Bytes: the peak of this process so far, the files, and the KV caches."""
    models = trio.models.values()
    sizes = {m.path: m.file.file_size for m in models}
    sizes |= {m.lora: m.lora.stat().st_size for m in models if m.lora is not None}
    return {
        "peak_rss": peak_rss(),
        "files": sum(sizes.values()),
        "kv": sum(m.file.kv_bytes(m.n_ctx, *m.kv_types) for m in models),
    }


def _timed(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _median(values: Iterator[float] | Sequence[float]) -> float:
    return float(statistics.median(values))

"""What scoring a prompt costs in memory and time, lockstep's overhead, and trimix --help's time.

Also how fast the models read a prompt with all its rows, by the number of rows held at once.

Memory comes from /proc (Linux), each figure from a fresh process.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from common import load, machine, parser, report, spread, text_ids

from trimix_gguf.choosing import score, selection
from trimix_gguf.machine.loading import N_WINDOW
from trimix_gguf.machine.threads import available_cores
from trimix_gguf.mixing.fusion import Weights, fuse
from trimix_gguf.roles import ROLES
from trimix_gguf.trio.prompt import Prompt, Segment
from trimix_gguf.trio.trio import Trio

N_CTX = 2048
WINDOWS = (N_WINDOW // 2, N_WINDOW, N_WINDOW * 2)
SHORT = 64  # tokens of the prompt that --tokens is compared with
WEIGHTS = Weights(0.3, 0.9)  # all three models are active
_MIB = 1 << 20


def main() -> None:
    """Measure, and print; the last line is JSON."""
    options = parser(__doc__)
    options.add_argument("--tokens", type=int, default=512, help="of the prompt")
    options.add_argument("--steps", type=int, default=64, help="tokens decoded in lockstep")
    options.add_argument("--repeats", type=int, default=3, help="of the choice of weights")
    options.add_argument("--child", nargs=2, metavar=("TOKENS", "MMAP"), help=argparse.SUPPRESS)
    options = options.parse_args()
    if options.child:
        n_tokens, mmap = map(int, options.child)
        print(json.dumps(memory_of(options, n_tokens, bool(mmap))))
        return
    result: dict[str, Any] = {
        "machine": machine(options),
        "n": {"tokens": options.tokens, "steps": options.steps, "repeats": options.repeats},
        "memory": memory(options),
    }
    print(json.dumps(result), file=sys.stderr)
    with load(options, n_ctx=N_CTX) as trio:
        ids = text_ids(trio, options, options.tokens)
        result["selection"] = selection_cost(trio, Prompt((Segment.of(ids),)), options.repeats)
        print(json.dumps(result), file=sys.stderr)  # so that a long run cut short leaves figures
        result["lockstep"] = lockstep_cost(trio, options.steps)
    result["windows"] = window_cost(options, ids, options.repeats)
    result["help_s"] = help_time()
    report(options, result, described(result, options.tokens))


# -- memory ---------------------------------------------------------------------------------


def memory(options: argparse.Namespace) -> dict[str, Any]:
    """Peak over a short and a long prompt; resident memory with and without mmap."""
    short = in_fresh_process(options, SHORT, mmap=False)
    read = in_fresh_process(options, options.tokens, mmap=False)
    mapped = in_fresh_process(options, options.tokens, mmap=True)
    return {"short": short, "long": read, "long_mmap": mapped}


def in_fresh_process(options: argparse.Namespace, n_tokens: int, *, mmap: bool) -> dict[str, int]:
    """Memory of scoring so many tokens, from a process of its own."""
    arguments = ["--text", str(options.text), "--child", str(n_tokens), str(int(mmap))]
    for name in ("large_ins", "small_base", "small_cpt", "small_cpt_lora"):
        if path := getattr(options, name):
            arguments += [f"--{name.replace('_', '-')}", str(path)]
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def memory_of(options: argparse.Namespace, n_tokens: int, mmap: bool) -> dict[str, int]:
    """Bytes resident: bare, loaded, after one window of every row, peak of scoring, at the end."""
    bare = status("VmRSS")
    with load(options, n_ctx=N_CTX, mmap=mmap) as trio:
        loaded = status("VmRSS")
        ids = text_ids(trio, options, n_tokens)
        for model in trio.models.values():
            model.decode(ids[: model.n_window], every_row=True)
            model.rewind(0)
        warm = status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from VmRSS
        selection.score(trio, Prompt((Segment.of(ids),)))
        peak = status("VmHWM")
        distinct = {m.path: m.file for m in trio.models.values()}.values()
        lora = options.small_cpt_lora
        return {
            "tokens": n_tokens,
            "bare": bare,
            "loaded": loaded,
            "warm": warm,
            "peak": peak,
            "extra": peak - warm,
            "extra_over_loaded": peak - loaded,
            "resident": status("VmRSS"),
            "anonymous": status("RssAnon"),
            "mapped": status("RssFile"),
            "files": sum(f.file_size for f in distinct) + (lora.stat().st_size if lora else 0),
            "kv": sum(m.file.kv_bytes(N_CTX) for m in trio.models.values()),
        }


def status(field: str) -> int:
    """Bytes of one field of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status has no {field}")


# -- choosing weights -----------------------------------------------------------------------


def selection_cost(trio: Trio, prompt: Prompt, repeats: int) -> dict[str, Any]:
    """Seconds to read the prompt, to read it with every row, and to choose weights by it."""

    def read() -> None:
        trio.prefill(prompt)
        trio.rows()

    def every_row() -> None:
        trio.prefill(prompt, consume=lambda window: None)

    forms = {
        "prefill": read,
        "every_row": every_row,
        "select_weights": lambda: selection.select_weights(trio, prompt),
    }
    trio.prefill(Prompt((Segment.of(prompt.segments[0].ids["large_ins"][:32]),)))
    trio.rows()  # warm up
    times: dict[str, list[float]] = {name: [] for name in (*forms, "grid_nll")}
    for _ in range(repeats):
        for name, form in forms.items():
            trio.forget()  # it would keep what it has read
            with timed_grid_nll() as inside:
                start = time.perf_counter()
                form()
                times[name].append(time.perf_counter() - start)
            if name == "select_weights":
                times["grid_nll"].append(sum(inside))
    whole = zip(times["select_weights"], times["prefill"], strict=True)
    return {
        "seconds": {name: spread(t) for name, t in times.items()},
        "ratio": spread([s / p for s, p in whole]),
    }


@contextmanager
def timed_grid_nll() -> Iterator[list[float]]:
    """Collects the seconds of every grid_token_nlls that a choice calls."""
    original, inside = score.grid_token_nlls, []

    def timed(**arguments: Any) -> Any:
        start = time.perf_counter()
        nll = original(**arguments)
        inside.append(time.perf_counter() - start)
        return nll

    score.grid_token_nlls = timed
    try:
        yield inside
    finally:
        score.grid_token_nlls = original


def window_cost(options: argparse.Namespace, ids: list[int], repeats: int) -> dict[str, Any]:
    """Seconds to read a prompt with every row, in windows of each size, in turn."""
    prompt = Prompt((Segment.of(ids),))
    times: dict[int, list[float]] = {n: [] for n in WINDOWS}
    with ExitStack() as stack:
        trios = {n: stack.enter_context(load(options, n_ctx=N_CTX, n_window=n)) for n in WINDOWS}
        for repeat in range(repeats + 1):
            for n, trio in trios.items():
                trio.forget()
                start = time.perf_counter()
                trio.prefill(prompt, consume=lambda window: None)
                if repeat:  # the first warms up
                    times[n].append(time.perf_counter() - start)
    return {
        str(n): {
            "seconds": spread(t),
            "ratio": spread([a / b for a, b in zip(t, times[N_WINDOW], strict=True)]),
        }
        for n, t in times.items()
    }


# -- lockstep -------------------------------------------------------------------------------


def lockstep_cost(trio: Trio, n_steps: int) -> dict[str, Any]:
    """Greedy decoding after the caches' prompt: a step's time over the models' own decodes."""
    inside = {role: 0.0 for role in ROLES}
    for role, model in trio.models.items():
        model.decode = timed_decode(model.decode, inside, role)  # type: ignore[method-assign]
    steps: list[dict[str, float]] = []
    trio.rows(WEIGHTS.active)
    for _ in range(n_steps):
        inside.update(dict.fromkeys(inside, 0.0))
        start = time.perf_counter()
        fused = fuse(trio.rows(WEIGHTS.active), WEIGHTS, unused=trio.unused)
        trio.advance(int(fused.argmax()))
        steps.append({"step": time.perf_counter() - start, **inside})
    for model in trio.models.values():
        del model.decode  # the class's own again
    steps = steps[1:]  # the first step's rows were there already
    decodes = [sum(s[role] for role in ROLES) for s in steps]
    return {
        "ms": {key: statistics.median(s[key] for s in steps) * 1e3 for key in ("step", *ROLES)},
        "ratio": spread([s["step"] / o for s, o in zip(steps, decodes, strict=True)]),
        "tokens_per_s": 1 / statistics.median(s["step"] for s in steps),
    }


def timed_decode(decode: Any, inside: dict[str, float], role: str) -> Any:
    """A decode that adds its time to `inside[role]`."""

    def timed(*arguments: Any, **options: Any) -> Any:
        start = time.perf_counter()
        rows = decode(*arguments, **options)
        inside[role] += time.perf_counter() - start
        return rows

    return timed


# -- the command ----------------------------------------------------------------------------


def help_time(repeats: int = 7) -> dict[str, float] | None:
    """Seconds of `trimix --help`; None where the command is not installed."""
    command = shutil.which("trimix", path=str(Path(sys.executable).parent))
    times = []
    for _ in range(repeats if command else 0):
        start = time.perf_counter()
        done = subprocess.run([str(command), "--help"], capture_output=True)
        times.append(time.perf_counter() - start)
        if done.returncode != 0:
            return None
    return spread(times) if times else None


# -- words ----------------------------------------------------------------------------------


def described(result: dict[str, Any], n_tokens: int) -> list[str]:
    """The figures, as lines."""
    lines = [f"memory, n_ctx {N_CTX}:"]
    for m in result["memory"].values():
        resident, expected = m["resident"], m["files"] + m["kv"]
        kind = "mmap" if m is result["memory"]["long_mmap"] else "read"
        lines += [
            f"  {m['tokens']} tokens, {kind}: scoring peaks {m['extra'] / _MIB:.1f} MiB over a "
            f"decoded window, {m['extra_over_loaded'] / _MIB:.1f} MiB over the loaded trio",
            f"    resident {resident / _MIB:.0f} MiB = {resident / expected:.3f} × "
            f"(files {m['files'] / _MIB:.0f} + KV caches {m['kv'] / _MIB:.0f} MiB); "
            f"Python and imports alone {m['bare'] / _MIB:.0f} MiB",
        ]
    chosen = result["selection"]
    s = {name: t["median"] for name, t in chosen["seconds"].items()}
    lines += [
        f"\nchoosing weights by {n_tokens} tokens, {available_cores()} threads:",
        f"  select_weights {s['select_weights']:.2f} s, prefill alone {s['prefill']:.2f} s: "
        f"{chosen['ratio']['median']:.2f} × "
        f"(from {chosen['ratio']['min']:.2f} to {chosen['ratio']['max']:.2f})",
        f"  of it the grid {s['grid_nll']:.2f} s; every row of logits, not the last alone, "
        f"{s['every_row'] - s['prefill']:.2f} s",
    ]
    for n, cost in result["windows"].items():
        ratio = cost["ratio"]
        lines.append(
            f"  every row in windows of {n}: {cost['seconds']['median']:.2f} s, "
            f"{ratio['median']:.2f} × windows of {N_WINDOW} "
            f"(from {ratio['min']:.2f} to {ratio['max']:.2f})"
        )
    lock = result["lockstep"]
    each = ", ".join(f"{role} {lock['ms'][role]:.1f}" for role in ROLES)
    lines += [
        f"\nlockstep at {WEIGHTS.alpha}, {WEIGHTS.beta}: {lock['ms']['step']:.1f} ms a token "
        f"({lock['tokens_per_s']:.1f} tokens/s); models' own ms: {each}",
        f"  a step over the models' own decodes: {lock['ratio']['median']:.4f}",
    ]
    took = result["help_s"]
    lines.append(
        f"\ntrimix --help: {took['median']:.3f} s" if took else "\ntrimix --help: not installed"
    )
    return [*lines, ""]


if __name__ == "__main__":
    main()

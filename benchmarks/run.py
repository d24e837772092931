"""`trimix run`: a file of prompts, against a call of `generate` for each with the trio loaded once.

The prompts begin at different places of a text; weights are chosen by each of them, answers are
greedy and as long as they may be. The time of `trimix run` is that of the whole command: it starts
Python, loads the trio, checks the lines, and keeps its journal. Seconds of the processor are
compared too: with --threads 1 they depend little on what else runs. Without files, the nano trio.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import files, load, machine, nano_parser, or_nano, report, spread
from serving import name_of_text

from trimix_gguf import generate
from trimix_gguf.bench.measuring import TEXT
from trimix_gguf.trio.prompt import Prompt, Segment

Rates = tuple[float, float]  # tokens per second, and per second of the processor


def main() -> None:
    """Measure, and print; the last line is JSON."""
    options = parse_options()
    prompts, bias = read_prompts(options)
    one_by_one: list[Rates] = []
    together: list[Rates] = []
    for _ in range(options.rounds):  # alternating: what drifts, drifts for both
        one_by_one.append(rate_of_generate(options, prompts, bias))
        together.append(rate_of_run(options, prompts, bias))
    rounds = list(zip(one_by_one, together, strict=True))
    result = {
        "machine": machine(argparse.Namespace(**{**vars(options), "text": name_of_text(options)})),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),  # how idle threads wait
        "n": {
            name: getattr(options, name)
            for name in ("prompts", "rounds", "parallel", "n_prompt", "n_tokens", "threads")
        },
        "ratio": spread([b[0] / a[0] for a, b in rounds]),
        "ratio_of_processor_time": spread([b[1] / a[1] for a, b in rounds]),
    }
    lines = [
        f"trimix run makes {r['median']:.2f} times the {what} of generate "
        f"({r['min']:.2f} to {r['max']:.2f})"
        for what, r in (
            ("tokens/s", result["ratio"]),
            ("tokens per second of the processor", result["ratio_of_processor_time"]),
        )
    ]
    report(options, result, lines)


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = nano_parser(__doc__)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--parallel", type=int, default=8)
    parser.add_argument("--threads", type=int, default=0, help="of the CPU; 0: all cores")
    return or_nano(parser.parse_args())


def n_ctx(options: argparse.Namespace) -> int:
    """Room for all answers at a time, and as much again for prompts that were read."""
    return 2 * int(options.parallel) * int(options.n_prompt + options.n_tokens)


def read_prompts(options: argparse.Namespace) -> tuple[list[list[int]], dict[str, float]]:
    """Prompts as ids, no two the same, and biases that no answer ends early by."""
    text = TEXT if options.text is None else options.text.read_text(encoding="utf-8")
    with load(options, n_ctx=64) as trio:
        ids = trio.models["large_ins"].tokenize(text)
        bias = {str(token): -100.0 for token in trio.end_of_generation}
    n, round_about = options.n_prompt, ids * (2 + 2 * options.n_prompt // len(ids))
    starts = [divmod(i, len(ids)) for i in range(options.prompts)]
    return [round_about[at : at + n + longer] for longer, at in starts], bias


def rate_of_generate(
    options: argparse.Namespace, prompts: list[list[int]], bias: dict[str, float]
) -> Rates:
    """Generated tokens a second, one prompt after another; the trio is loaded before."""
    own = {int(token): value for token, value in bias.items()}
    settings: dict[str, Any] = {"max_tokens": options.n_tokens, "temperature": 0}
    with load(options, n_ctx=n_ctx(options), n_threads=options.threads) as trio:
        generate(trio, Prompt((Segment.of(prompts[-1]),)), max_tokens=2)
        started, used = time.perf_counter(), time.process_time()
        n = sum(
            generate(trio, Prompt((Segment.of(ids),)), logit_bias=own, **settings).n_tokens
            for ids in prompts
        )
        took, used = time.perf_counter() - started, time.process_time() - used
        return n / took, n / used


def rate_of_run(
    options: argparse.Namespace, prompts: list[list[int]], bias: dict[str, float]
) -> Rates:
    """Generated tokens a second of `trimix run`, from its start to its end."""
    settings = {"max_tokens": options.n_tokens, "temperature": 0, "logit_bias": bias}
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder, "in.jsonl"), Path(folder, "out.jsonl")
        lines = (json.dumps({"prompt": ids, **settings}) + "\n" for ids in prompts)
        source.write_text("".join(lines), encoding="utf-8")
        command = [sys.executable, "-m", "trimix_gguf.cli", "run", str(source), "-o", str(out)]
        command += ["--parallel", str(options.parallel), "--n-ctx", str(n_ctx(options))]
        command += ["--threads", str(options.threads)]
        for role, path in files(options).items():
            command += [f"--{role.replace('_', '-')}", str(path)] if path else []
        started, used = time.perf_counter(), of_children()
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
        took, used = time.perf_counter() - started, of_children() - used
        answers = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    n = sum(a["response"]["usage"]["completion_tokens"] for a in answers)
    return n / took, n / used


def of_children() -> float:
    """Seconds of the processor that ended child processes have used; POSIX only."""
    times = os.times()
    return times.children_user + times.children_system


if __name__ == "__main__":
    main()

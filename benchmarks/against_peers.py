"""A trio's answer beside what one would write without trimix: the same models, ids and length.

    llama_objects       three llama_cpp.Llama(logits_all=True), and a loop in NumPy
    transformers_f32    the reference way: three transformers models in step, on the CPU
    transformers_bf16   the same in bfloat16
    trimix_lockstep     ours, one token through each model at a time
    trimix_speculative  ours, small_cpt drafting where that pays: the default
    large_ins           the large model alone

Each but the last chooses (alpha, beta), then decodes greedily: ours by the method auto, as `trimix
generate` does (some of the prompt's tokens, single models too), the others by the perplexity of the
whole prompt over the published grid. Each figure is of the first prompt of a fresh process
(peers.py); the peers alternate. `extra` is peak resident memory over that of the loaded models. The
transformers peers need their checkpoints as folders and are left out without; where those were
dequantized from the GGUFs, small differences are expected, and reported.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import peers
from common import cpu_name, files, machine, parser, report, spread

from trimix_gguf.machine.loading import Loading
from trimix_gguf.machine.threads import available_cores
from trimix_gguf.mixing.scoring import GRID
from trimix_gguf.trio.model import Model

OURS, LOCKSTEP, ALONE = "trimix_speculative", "trimix_lockstep", "large_ins"
OBJECTS, REFERENCE = "llama_objects", "transformers_bf16"
FIGURES = ("load_s", "select_s", "ttft_s", "decode_tps", "total_s", "loaded", "peak", "extra")
RATIOS = (  # what, of whom, over whose
    ("total_s", OBJECTS, OURS),
    ("extra", OBJECTS, OURS),
    ("select_s", OBJECTS, OURS),
    ("total_s", REFERENCE, OURS),
    ("decode_tps", OURS, REFERENCE),
    ("decode_tps", OURS, LOCKSTEP),
    ("decode_tps", LOCKSTEP, ALONE),
    ("decode_tps", OURS, ALONE),
)
_MIB = 1 << 20

Runs = dict[str, list[dict[str, Any]]]  # peer -> its figures, repeat by repeat


def main() -> None:
    """Measure, and print; the last line is JSON."""
    options = parse_options()
    job = make_job(options)
    runs = measure(options, job)
    summary = {name: summarised(rs) for name, rs in runs.items()}
    compare_tokens(summary)
    result = {
        "machine": {**machine(options), "n_ctx": job["n_ctx"], "versions": versions(runs)},
        "n": {
            "prompt": len(job["ids"]),
            "tokens": options.n_tokens,
            "repeats": options.repeats,
        },
        "peers": summary,
        "ratios": ratios(runs),
    }
    report(options, result, described(result))


# -- what to run ----------------------------------------------------------------------------


def parse_options() -> argparse.Namespace:
    """The command line."""
    options = parser(__doc__)
    options.formatter_class = argparse.RawDescriptionHelpFormatter
    for role in ("large-ins", "small-base"):
        options.add_argument(f"--hf-{role}", type=Path, metavar="FOLDER")
    cpt = options.add_mutually_exclusive_group()
    cpt.add_argument("--hf-small-cpt", type=Path, metavar="FOLDER")
    cpt.add_argument("--hf-small-cpt-lora", type=Path, metavar="FOLDER", help="PEFT adapter")
    options.add_argument("--torch-python", default=sys.executable, help="that has transformers")
    options.add_argument("--n-prompt", type=int, default=300, help="tokens of the text to read")
    options.add_argument("--prompt", type=Path, metavar="FILE", help="the whole prompt, instead")
    options.add_argument("--n-tokens", type=int, default=64, help="to generate")
    options.add_argument("--repeats", type=int, default=1)
    options.add_argument("--peers", nargs="+", choices=peers.PEERS, metavar="PEER")
    options.add_argument("--out", type=Path, help="JSON lines; what is there is not run again")
    result = options.parse_args()
    if result.n_tokens < 2:
        options.error("--n-tokens must be 2 or more: decoding is timed after the first")
    cpt_given = result.hf_small_cpt or result.hf_small_cpt_lora
    has_hf = bool(result.hf_large_ins and result.hf_small_base and cpt_given)
    if result.peers is None:
        result.peers = [p for p in peers.PEERS if has_hf or not is_torch(p)]
    elif not has_hf and any(map(is_torch, result.peers)):
        options.error("the transformers peers need --hf-large-ins, --hf-small-base, --hf-small-cpt")
    return result


def is_torch(peer: str) -> bool:
    """Whether a peer runs on PyTorch."""
    return peer.startswith("transformers")


def make_job(options: argparse.Namespace) -> peers.Job:
    """What every child reads; ids are those that trio.prompt would give."""
    model = Model(options.large_ins, Loading(n_ctx=64, mmap=True))
    text = (options.prompt or options.text).read_text(encoding="utf-8")
    ids = model.bos + model.tokenize(model.normalize(text))
    model.close()
    if options.prompt is None:
        if len(ids) < options.n_prompt:
            raise SystemExit(f"{options.text.name} has {len(ids)} tokens; give fewer --n-prompt")
        ids = ids[: options.n_prompt]
    hf = {name: getattr(options, f"hf_{name}") for name in files(options)}
    return {
        "ids": ids,
        "n_tokens": options.n_tokens,
        "n_ctx": len(ids) + options.n_tokens,
        "n_threads": available_cores(),
        "grid": GRID,
        "files": {name: path and str(path) for name, path in files(options).items()},
        "hf": {name: path and str(path) for name, path in hf.items()},
    }


def setting(job: peers.Job, peer: str) -> dict[str, Any]:
    """What a saved figure must agree in to stand for a run of this job."""
    paths = job["hf" if is_torch(peer) else "files"]
    return {
        "cpu": f"{cpu_name()}, {job['n_threads']} cores",
        "files": {name: Path(path).name for name, path in paths.items() if path},
        "prompt": hashlib.sha256(json.dumps(job["ids"]).encode()).hexdigest()[:16],
        "n_tokens": job["n_tokens"],
    }


# -- running --------------------------------------------------------------------------------


def measure(options: argparse.Namespace, job: peers.Job) -> Runs:
    """The figures of every peer, saved one by one, so that a long run cut short keeps them."""
    saved = read_saved(options.out, job)
    runs: Runs = {peer: [] for peer in options.peers}
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "job.json"
        path.write_text(json.dumps(job), encoding="utf-8")
        for repeat in range(options.repeats):
            for peer in options.peers:
                figures = saved.get((peer, repeat))
                if figures is None:
                    figures = in_fresh_process(options, peer, path)
                    line = {"peer": peer, "repeat": repeat, "setting": setting(job, peer)}
                    save(options.out, {**line, "figures": figures})
                runs[peer].append(figures)
    return runs


def in_fresh_process(options: argparse.Namespace, peer: str, job: Path) -> dict[str, Any]:
    """Figures of one peer, from a process of its own."""
    python = options.torch_python if is_torch(peer) else sys.executable
    done = subprocess.run(
        [python, peers.__file__, peer, str(job)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
    )
    if done.returncode != 0:
        raise SystemExit(f"{peer} failed ({done.returncode}); what was measured is kept in --out")
    figures = json.loads(done.stdout.splitlines()[-1])
    shown = ", ".join(f"{key} {figures[key]:.2f}" for key in ("ttft_s", "decode_tps", "total_s"))
    print(f"{peer}: {shown}", file=sys.stderr)
    return figures


def read_saved(out: Path | None, job: peers.Job) -> dict[tuple[str, int], dict[str, Any]]:
    """Figures that an earlier run left in `out`, by peer and repeat."""
    lines = out.read_text(encoding="utf-8").splitlines() if out and out.exists() else []
    saved = {}
    for line in map(json.loads, lines):
        if line["setting"] != setting(job, line["peer"]):
            raise SystemExit(f"{out} holds figures of other files or lengths; give another --out")
        saved[line["peer"], line["repeat"]] = line["figures"]
    return saved


def save(out: Path | None, line: dict[str, Any]) -> None:
    """Append one line of figures to `out`."""
    if out is not None:
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


# -- figures --------------------------------------------------------------------------------


def summarised(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Spread of each figure over the repeats; weights and tokens are the first repeat's."""
    values = {key: [run[key] for run in runs if run[key] is not None] for key in FIGURES}
    kept = {key: runs[0][key] for key in ("weights", "acceptance", "tokens")}
    return {**{key: spread(v) if v else None for key, v in values.items()}, **kept}


def compare_tokens(summary: dict[str, Any]) -> None:
    """Adds `first_difference` from ours: its index, or None where all tokens are equal."""
    reference = summary.get(LOCKSTEP) or summary.get(OURS)
    for name, figures in summary.items():
        if reference is not None and name != ALONE:
            pairs = enumerate(zip(figures["tokens"], reference["tokens"], strict=True))
            figures["first_difference"] = next((i for i, (a, b) in pairs if a != b), None)


def ratios(runs: Runs) -> dict[str, dict[str, float]]:
    """Repeat by repeat, then their spread; pairs that were not both measured are left out."""
    return {
        f"{key}: {a} over {b}": spread(
            [x[key] / max(y[key], 1e-9) for x, y in zip(runs[a], runs[b], strict=True)]
        )
        for key, a, b in RATIOS
        if a in runs and b in runs
    }


def versions(runs: Runs) -> dict[str, str]:
    """Versions of all that the peers use."""
    return {name: v for rs in runs.values() for name, v in rs[0]["versions"].items()}


def described(result: dict[str, Any]) -> list[str]:
    """The table, as lines."""
    units = "select s   first token s   tokens/s   total s   peak MiB   extra MiB   weights"
    lines = [f"{'':20}{units}      tokens"]
    for name, figures in result["peers"].items():
        m = {key: figures[key]["median"] if figures[key] else 0.0 for key in FIGURES}
        weights = figures["weights"] or ("-", "-")
        lines.append(
            f"{name:20}{m['select_s']:8.2f}{m['ttft_s']:16.2f}{m['decode_tps']:11.2f}"
            f"{m['total_s']:10.2f}{m['peak'] / _MIB:11.0f}{m['extra'] / _MIB:12.0f}   "
            f"{weights[0]}, {weights[1]}".ljust(100)
            + same_tokens(figures)
        )
    lines.append("")
    chosen = {tuple(f["weights"]) for f in result["peers"].values() if f["weights"]}
    if len(chosen) > 1:
        lines.append(f"the peers chose different weights: {sorted(chosen)}")
    if acceptance := result["peers"].get(OURS, {}).get("acceptance"):
        lines.append(f"drafted tokens accepted: {acceptance:.3f}")
    lines += [
        f"{name}: {r['median']:.2f} (from {r['min']:.2f} to {r['max']:.2f})"
        for name, r in result["ratios"].items()
    ]
    return [*lines, ""]


def same_tokens(figures: dict[str, Any]) -> str:
    """Where the tokens of a peer differ from ours, in words."""
    if "first_difference" not in figures:
        return "-"
    at = figures["first_difference"]
    return "as ours" if at is None else f"differ from {at} on"


if __name__ == "__main__":
    main()

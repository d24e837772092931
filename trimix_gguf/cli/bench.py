"""trimix bench: how fast a trio is here, every form against the others in one run."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click

from trimix_gguf.cli.options import (
    new_figure,
    open_trio,
    own_mix,
    parse_mix,
    read_text,
    trio_arguments,
    trio_options,
)
from trimix_gguf.roles import LOADING_ORDER, Role

_BUSY, _MINUTES = 0.7, 5  # a share of the time that leaves waits short; how often a person asks


@click.command()
@trio_options
@click.option(
    "--prompt", metavar="FILE", help="Text to continue; - is stdin. Default: a Kazakh text."
)
@click.option(
    "--n-prompt",
    type=click.IntRange(min=2),
    help="Length of the prompt; it is cut or repeated. Default: 256, or the whole file.",
)
@click.option("--n-tokens", type=click.IntRange(min=1), help="Tokens to decode. Default 64.")
@click.option("--repeats", type=click.IntRange(min=1), help="How often to measure each. Default 3.")
@click.option(
    "--weights", metavar="ALPHA,BETA", help="Default: the trio's own, or chosen from the prompt."
)
@click.option("--plot", metavar="FILE.png", help="Draw speeds, and where the time goes.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of a table.")
def bench(**options: Any) -> None:
    """Measure a trio: each model, lockstep, drafts, scoring, the parts of an answer, memory.

    Decoding is greedy. Everything runs in turn, several times; the figures are medians.
    """
    from trimix_gguf.bench.measuring import N_PROMPT, TEXT, bench_prompt, measure

    plot, as_json = options.pop("plot"), options.pop("as_json")
    figure = new_figure(figsize=(8.4, 7.0)) if plot is not None else None
    path, n_prompt = options.pop("prompt"), options.pop("n_prompt")
    text = TEXT if path is None else read_text(path)
    settings = _settings(options)
    machine = _machine(options)
    with open_trio(options) as trio:
        prompt = bench_prompt(trio, text, n_prompt or (N_PROMPT if path is None else None))
        with _status() as progress:
            figures = measure(trio, prompt, progress=progress, **settings)
        report = {"machine": machine, "files": _files(trio), **figures}
    print(json.dumps(report) if as_json else _table(report))
    if figure is not None:
        _draw(report, figure, plot)


def _settings(options: dict[str, Any]) -> dict[str, Any]:
    """Take bench's own arguments out of the options; unset flags stay out."""
    names = ("n_tokens", "repeats")
    settings = {name: value for name in names if (value := options.pop(name)) is not None}
    text = options.pop("weights")
    mix = own_mix(options) if text is None else parse_mix(text)
    return settings if mix is None else {**settings, "mix": mix}


def _machine(options: dict[str, Any]) -> dict[str, Any]:
    """The processor, its threads, and what was built and installed for it."""
    import importlib.metadata
    import platform

    from trimix_gguf.machine import native
    from trimix_gguf.machine.threads import available_cores

    per_role = trio_arguments(dict(options))["per_role"]
    return {
        "cores": available_cores(),
        "threads": {
            r: per_role.get(r, {}).get("n_threads") or available_cores() for r in LOADING_ORDER
        },
        **native.build_info(),
        **{name: importlib.metadata.version(name) for name in ("trimix-gguf", "numpy")},
        "python": platform.python_version(),
    }


def _files(trio: Any) -> dict[Role, dict[str, Any]]:
    """Name, bytes, tensor types (most bytes first) and device of each role's file."""
    found = {}
    for role in LOADING_ORDER:
        model = trio.models[role]
        types: dict[str, int] = {}
        for tensor in model.file.tensors:
            types[tensor.type] = types.get(tensor.type, 0) + tensor.n_bytes
        found[role] = {
            "name": model.path.name,
            "size": model.file.file_size,
            "types": sorted(types, key=lambda name: -types[name]),
            "device": model.device,
            **({"lora": model.lora.name} if model.lora is not None else {}),
        }
    return found


@contextmanager
def _status() -> Iterator[Callable[[str], None]]:
    """What is being measured, on stderr, only on a terminal."""
    if not sys.stderr.isatty():
        yield lambda what: None
        return
    from rich.console import Console

    with Console(stderr=True).status("") as status:
        yield status.update


# -- words ----------------------------------------------------------------------------------


def _table(report: dict[str, Any]) -> str:
    parts = [*_speeds(report), "", *_parts(report["answer_s"]), "", *_costs(report)]
    return "\n".join([*_heading(report), "", *parts])


def _heading(report: dict[str, Any]) -> list[str]:
    machine, w = report["machine"], report["weights"]
    threads = machine["threads"]
    same = len(set(threads.values())) == 1
    each = (
        str(threads[LOADING_ORDER[0]])
        if same
        else ", ".join(f"{r} {n}" for r, n in threads.items())
    )
    versions = ("trimix-gguf", "llama-cpp-python", "numpy", "python")
    lines = [
        f"{machine['cpu']}, {machine['cores']} cores; threads: {each}",
        f"llama.cpp: {machine['system']}; GPU offload: {machine['gpu_offload']}",
        ", ".join(f"{name} {machine[name]}" for name in versions),
    ]
    for role, file in report["files"].items():
        lora = f" + {file['lora']}" if "lora" in file else ""
        types = "/".join(file["types"])
        lines.append(
            f"{role:<13}{file['name']}{lora}, {_mib(file['size'])}, {types}, {file['device']}"
        )
    return [
        *lines,
        f"{report['n_prompt_tokens']} prompt tokens, {report['n_tokens']} decoded, greedy; "
        f"medians of {report['repeats']}; alpha {w['alpha']:.3g}, beta {w['beta']:.3g}"
        f"{_threshold(w)} ({w['method']})",
    ]


def _threshold(weights: dict[str, Any]) -> str:
    value = weights.get("plausibility_threshold")
    return "" if value is None else f", threshold {value:.3g}"


def _speeds(report: dict[str, Any]) -> list[str]:
    lines = [f"{'tokens/s':<13}{'prefill':>10}{'decode':>10}"]
    for name in (*LOADING_ORDER, "lockstep", "speculative"):
        prefill = report[name].get("prefill_tps")
        shown = "" if prefill is None else f"{prefill:.1f}"
        lines.append(f"{name:<13}{shown:>10}{report[name]['decode_tps']:>10.1f}")
    low, high = report["speculative_over_lockstep_range"]
    drafted, same = report["speculative"], report["same_text"]
    acceptance = drafted["acceptance"]
    lines.append(
        f"speculative over lockstep: {report['speculative_over_lockstep']:.2f} "
        f"(from {low:.2f} to {high:.2f})"
    )
    if acceptance is None:
        lines.append("nothing was drafted: it would not have paid")
    else:
        lengths = ", ".join(f"{n} × {times}" for n, times in drafted["lengths"].items())
        lines.append(
            f"accepted {acceptance:.0%} of what was drafted, {drafted['tokens_per_round']:.2f} "
            f"tokens a round; drafts (length × rounds): {lengths}"
        )
    if same is True:
        return [*lines, "same text either way"]
    where = f"part at token {same['index']}, where their logits are {same['gap']:.1e} apart"
    return [*lines, f"the two texts {where}"]


def _parts(answers: dict[str, dict[str, float]]) -> list[str]:
    """Where the time of a whole answer goes: seconds and shares, a column per configuration."""
    wholes = {name: sum(parts.values()) for name, parts in answers.items()}

    def line(title: str, seconds: dict[str, float]) -> str:
        cells = (f"{seconds[name]:.3f} s {seconds[name] / wholes[name]:>6.1%}" for name in answers)
        return f"{title:<20}" + "".join(f"{cell:>32}" for cell in cells)

    return [
        f"{'a whole answer':<20}" + "".join(f"{name:>32}" for name in answers),
        *(
            line(part, {name: parts[part] for name, parts in answers.items()})
            for part in next(iter(answers.values()))
        ),
        line("all of it", wholes),
    ]


def _costs(report: dict[str, Any]) -> list[str]:
    lockstep, grid = report["lockstep"], report["grid"]
    memory, read = report["memory"], report["bandwidth"]
    floor = "no floor: not all of it is in the CPU's memory"
    if read["floor_ms"] is not None:
        floor = f"floor {read['floor_ms']:.2f} ms a token"
    rows = {
        "first token": f"{report['ttft_s']:.3f} s, choosing weights {report['select_s']:.3f} s",
        "lockstep step": f"{lockstep['outside_share']:.1%} outside llama.cpp "
        f"({lockstep['overhead']:.3f} × the models' own decodes)",
        "grid scoring": f"{grid['ms_per_token']:.2f} ms a token; naive "
        f"{grid['naive_ms_per_token']:.2f} ms, {grid['over_naive']:.1f} ×; "
        f"{grid['share_of_prefill']:.1%} of prefill",
        "memory": f"peak {_mib(memory['peak_rss'])}; files {_mib(memory['files'])}, "
        f"KV caches {_mib(memory['kv'])}",
        "bandwidth": f"{read['gb_per_s']:.1f} GB/s; {_mib(read['bytes_per_token'])} of weights "
        f"a token, {floor}; lockstep {read['measured_ms']:.2f} ms",
        "people": people(min(sum(parts.values()) for parts in report["answer_s"].values())),
    }
    return [f"{name:<15}{text}" for name, text in rows.items()]


def people(answer_s: float) -> str:
    """How many people a server has time for, if each answer takes so long."""
    n = int(_BUSY * 60 * _MINUTES / answer_s)
    who = f"{n} people who each ask once in {_MINUTES} minutes" if n else "nobody who asks as often"
    return f"an answer takes {answer_s:.1f} s: time for {who} (busy {_BUSY:.0%} of it)"


def _mib(n_bytes: int) -> str:
    return f"{n_bytes / (1 << 20):.1f} MiB"


# -- picture --------------------------------------------------------------------------------


def _draw(report: dict[str, Any], figure: Any, path: str) -> None:
    """Bars of tokens a second, by form and by model; below them where an answer's time goes."""
    forms = {"decode": (*LOADING_ORDER, "lockstep", "speculative"), "prefill": LOADING_ORDER}
    above, below = figure.subfigures(2, 1, height_ratios=[4.0, 3.0])
    panels = above.subplots(1, 2, width_ratios=[len(names) for names in forms.values()])
    for axes, (stage, names) in zip(panels, forms.items(), strict=True):
        colors = ["tab:blue" if name in LOADING_ORDER else "crimson" for name in names]
        bars = axes.bar(names, [report[name][f"{stage}_tps"] for name in names], color=colors)
        axes.bar_label(bars, fmt="%.1f")
        axes.set_ylabel(f"{stage}, tokens/s")
        axes.tick_params(axis="x", labelrotation=20)
    w = report["weights"]
    above.suptitle(f"alpha {w['alpha']:.2g}, beta {w['beta']:.2g}; {report['machine']['cpu']}")
    _draw_parts(report["answer_s"], below.subplots())
    figure.savefig(path, dpi=150, format="png")


def _draw_parts(answers: dict[str, dict[str, float]], axes: Any) -> None:
    """A bar of seconds per configuration, the parts one after another."""
    names = list(answers)
    begin = dict.fromkeys(names, 0.0)
    for i, part in enumerate(answers[names[0]]):
        seconds = [answers[name][part] for name in names]
        if any(seconds):
            axes.barh(names, seconds, left=list(begin.values()), label=part, color=f"C{i}")
        begin = {name: begin[name] + answers[name][part] for name in names}
    axes.bar_label(axes.containers[-1], [f" {total:.2f} s" for total in begin.values()])
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_xlabel("seconds of a whole answer")
    axes.legend(ncols=4, fontsize=8, loc="upper center", bbox_to_anchor=(0.4, -0.25))

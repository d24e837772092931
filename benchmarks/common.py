"""What the benchmarks share: the trio's options, the heading, the JSON line."""

import argparse
import importlib.metadata
import json
import platform
import statistics
from pathlib import Path
from typing import Any

from trimix_gguf.machine import processor
from trimix_gguf.trio.trio import NANO, Trio

VERSIONS = ("trimix-gguf", "llama-cpp-python", "numpy")


def parser(description: str | None) -> argparse.ArgumentParser:
    """Options that all benchmarks share: a trio's files and a text."""
    result = argparse.ArgumentParser(description=description)
    for role in ("large-ins", "small-base"):
        result.add_argument(f"--{role}", type=Path, required=True, metavar="GGUF")
    cpt = result.add_mutually_exclusive_group(required=True)
    cpt.add_argument("--small-cpt", type=Path, metavar="GGUF")
    cpt.add_argument("--small-cpt-lora", type=Path, metavar="GGUF", help="over small-base")
    result.add_argument("--text", type=Path, required=True, help="UTF-8 text to read")
    result.add_argument("--json", action="store_true", help="print the last line, JSON, alone")
    return result


def nano_parser(description: str | None) -> argparse.ArgumentParser:
    """As parser(), where a trio and a text may be left out: nano and a built-in one are taken."""
    result = argparse.ArgumentParser(description=description)
    for role in ("large-ins", "small-base", "small-cpt"):
        result.add_argument(f"--{role}", type=Path, metavar="GGUF")
    result.add_argument("--small-cpt-lora", type=Path, metavar="GGUF", help="over small-base")
    result.add_argument("--text", type=Path, help="UTF-8 text to cut prompts from")
    result.add_argument("--n-prompt", type=int, default=32, help="tokens of each prompt")
    result.add_argument("--n-tokens", type=int, default=32, help="tokens of each answer")
    result.add_argument("--json", action="store_true", help="print the last line, JSON, alone")
    return result


def or_nano(options: argparse.Namespace) -> argparse.Namespace:
    """Nano's files, where the options of nano_parser() name none."""
    if options.large_ins is None:
        options.large_ins, options.small_base, options.small_cpt = (
            NANO / f"{role}.gguf" for role in ("large_ins", "small_base", "small_cpt")
        )
    return options


def files(options: argparse.Namespace) -> dict[str, Path | None]:
    """The GGUF files, as arguments of Trio.load."""
    names = ("large_ins", "small_base", "small_cpt", "small_cpt_lora")
    return {name: getattr(options, name) for name in names}


def load(options: argparse.Namespace, **more: Any) -> Trio:
    """Open the trio that the options name."""
    return Trio.load(**files(options), **more)


def text_ids(trio: Trio, options: argparse.Namespace, n_tokens: int) -> list[int]:
    """The first `n_tokens` of the text."""
    ids = trio.models["large_ins"].tokenize(options.text.read_text(encoding="utf-8"))
    if len(ids) < n_tokens:
        raise SystemExit(f"{options.text.name} has {len(ids)} tokens; {n_tokens} are needed")
    return ids[:n_tokens]


def cpu_name() -> str:
    """The processor's name."""
    return processor.describe()[0] or "?"


def versions() -> dict[str, str]:
    """Versions of what computes."""
    return {name: importlib.metadata.version(name) for name in VERSIONS}


def machine(options: argparse.Namespace) -> dict[str, Any]:
    """Device, versions and inputs; files by their names alone."""
    from trimix_gguf.machine.threads import available_cores

    return {
        "cpu": cpu_name(),
        "cores": available_cores(),
        "python": platform.python_version(),
        **versions(),
        "files": {role: path.name for role, path in files(options).items() if path},
        "text": options.text.name,
        "seed": None,  # nothing is drawn: fixed rows, greedy decoding
    }


def report(options: argparse.Namespace, result: dict[str, Any], lines: list[str]) -> None:
    """The heading and `lines`, unless --json; then `result` as one line of JSON."""
    if not options.json:
        for key, value in result["machine"].items():
            print(f"{key}: {value}")
        print(f"n: {result['n']}\n", *lines, sep="\n")
    print(json.dumps(result))


def spread(values: list[float]) -> dict[str, float]:
    """Median, minimum and maximum."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}

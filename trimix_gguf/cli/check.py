"""trimix check: do three GGUF files make a trio?"""

import json
from pathlib import Path
from typing import Any

import click


@click.command()
@click.argument("large_ins", metavar="LARGE")
@click.argument("small_base", metavar="SMALL_BASE")
@click.argument("small_cpt", metavar="SMALL_CPT")
@click.option("--n-ctx", type=click.IntRange(min=8), help="Length of the context to plan for.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of a table.")
def check(
    large_ins: str, small_base: str, small_cpt: str, n_ctx: int | None, as_json: bool
) -> None:
    """Check whether three GGUF files make a trio, and what they need.

    SMALL_CPT may be a LoRA adapter over SMALL_BASE. If they do not make a trio, or do not fit in
    memory: one line that says why, and exit 1.
    """
    from trimix_gguf.convert.check import check_trio
    from trimix_gguf.errors import MemoryNeededError
    from trimix_gguf.machine.memory import in_gib

    report = check_trio(
        large_ins=Path(large_ins),
        small_cpt=Path(small_cpt),
        small_base=Path(small_base),
        **({} if n_ctx is None else {"n_ctx": n_ctx}),
    )
    print(json.dumps(report, ensure_ascii=False) if as_json else _table(report))
    need = report["memory"]
    if not need["fits"]:
        raise MemoryNeededError(
            f"this trio needs {in_gib(need['needed'])} and {in_gib(need['free'])} is free; "
            "choose a smaller quantization or context"
        )


def _table(report: dict[str, Any]) -> str:
    from trimix_gguf.machine.memory import in_gib

    lines = [f"{'':<11}{'type':<9}{'family':<10}{'weights':>9}{'context':>9}{'n_vocab':>9}  file"]
    for role, m in report["models"].items():
        lines.append(
            f"{role:<11}{m['type']:<9}{m['architecture']:<10}{m['n_parameters'] / 1e9:>8.2f}B"
            f"{m['n_ctx_train']:>9}{m['n_vocab']:>9}  {m['file']}"
        )
    need = report["memory"]
    parts = ", ".join(f"{part} {in_gib(need[part])}" for part in ("weights", "kv", "buffers"))
    lines += ["", f"{report['n_common']} tokens in common; tokens a character:"]
    lines += [f"  {s:<18}{r:5.2f}" for s, r in report["tokens_per_character"].items()]
    lines += ["", f"at {need['n_ctx']} tokens: {in_gib(need['needed'])} needed ({parts})"]
    lines += [f"note: {note}" for note in report["notes"]]
    if need["fits"]:
        lines.append(f"these make a trio, and fit in the {in_gib(need['free'])} free")
    return "\n".join(lines)

"""What several commands share: the trio's options, prompts from files, the grid."""

import errno
import functools
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from trimix_gguf.errors import PromptError, TrimixError, WeightsError
from trimix_gguf.roles import ROLES, Role

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def _layers(text: str) -> int | str:
    return text if text == "auto" else int(text)


def whole_number(text: str) -> int | None:
    """A number of 1 or more; None for anything else, and where no computer counts so far."""
    return (int(text) or None) if text.isdecimal() and len(text) < 19 else None


class FiniteRange(click.FloatRange):
    """A range without nan and inf, which no comparison refuses where there is no upper end."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """The number; fails as click's own type does."""
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number", param, ctx)
        return number


ROLE_OPTIONS: dict[str, Callable[[str], Any]] = {
    "gpu_layers": _layers,
    "device": str,
    "threads": int,
    "kv_type": str,
}
FILES = ("large_ins", "small_base", "small_cpt", "small_cpt_lora")


def _over_workers(command: Callable[..., Any]) -> Callable[..., Any]:
    """A command that, with --rpc, runs in a child process: see supervising."""

    @functools.wraps(command)
    def run(*arguments: Any, rpc: tuple[str, ...], **options: Any) -> Any:
        if rpc:
            if options.get("ray") is not None:
                raise click.UsageError("give --ray, or --rpc, not both")
            from trimix_gguf.cli import supervising

            supervising.take_workers(click.get_current_context(), rpc)
        return command(*arguments, **options)

    return run


def option_group(*options: Decorator) -> Decorator:
    """Options as one decorator; `--help` lists them in this order."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


# How each model of a trio is loaded.
_loading_options = option_group(
    click.option("--large-ins", metavar="FILE", help="GGUF of the large instruct model."),
    click.option("--small-base", metavar="FILE", help="GGUF of the small base model."),
    click.option(
        "--small-cpt",
        metavar="FILE",
        help="GGUF of the small model that knows the language.",
    ),
    click.option(
        "--small-cpt-lora",
        metavar="FILE",
        help="LoRA adapter over small_base, in place of small_cpt.",
    ),
    click.option("--n-ctx", type=click.IntRange(min=8), help="Length of the context, in tokens."),
    click.option(
        "--gpu-layers",
        multiple=True,
        metavar="[ROLE=]N|auto",
        help="Layers on the device; -1: all. See `trimix plan`.",
    ),
    click.option(
        "--device",
        multiple=True,
        metavar="[ROLE=]NAME",
        help="Device by name; see `trimix doctor`.",
    ),
    click.option(
        "--threads",
        multiple=True,
        metavar="[ROLE=]N",
        help="CPU threads. Default: all cores.",
    ),
    click.option(
        "--kv-type",
        multiple=True,
        metavar="[ROLE=]TYPE",
        help="Type of the KV cache: f16, q8_0, …",
    ),
    click.option("--mmap/--no-mmap", default=None, help="Map the files instead of reading them."),
    click.option(
        "--mlock",
        is_flag=True,
        default=None,
        help="Lock the weights in memory, out of swap.",
    ),
    click.option(
        "--flash-attn/--no-flash-attn",
        default=None,
        help="Default: only on a device or for a quantized KV cache (slower on the CPU).",
    ),
    click.option(
        "--rpc",
        multiple=True,
        metavar="HOST:PORT[,…]",
        help="Use workers on other machines; see `trimix help machines`.",
    ),
    click.option("--verbose", is_flag=True, help="Show llama.cpp's log, and where layers went."),
    _over_workers,
)
_ONE = "A trio; see `trimix list`. Default: nano."
_SEVERAL = f"{_ONE} Can be given several times."
# The options that name a trio, and how its models are loaded; the same for several trios.
trio_options = option_group(
    click.option("--trio", metavar="NAME|FILE|DIR", help=_ONE), _loading_options
)
trios_options = option_group(
    click.option("--trio", multiple=True, metavar="NAME|FILE|DIR", help=_SEVERAL), _loading_options
)


def each_trio(options: dict[str, Any]) -> list[dict[str, Any]]:
    """The options of a command that takes several trios, for each of them."""
    names = options["trio"] or (None,)
    return [{**options, "trio": name} for name in names]


def open_trio(
    options: dict[str, Any], beside: Any = None, places: Mapping[Role, Any] | None = None
) -> Any:
    """Take the trio's options out of `options` and open it; `beside` as Trio.load has it.

    `places` say by role where layers go, if that is planned already.
    """
    from trimix_gguf.machine import native
    from trimix_gguf.trio.trio import Trio, concurrency

    arguments = trio_arguments(options)
    for role, place in (places or {}).items():
        arguments["per_role"][role] = {**arguments["per_role"].get(role, {}), **place}
    verbose = bool(options.pop("verbose", False))
    native.set_verbose(verbose)
    trio = Trio.load(**arguments, beside=beside)
    models = trio.models.items()
    if idle := [role for role, m in models if m.n_gpu_layers and m.device == "CPU"]:
        print(
            f"note: gpu layers of {', '.join(idle)} stay on the CPU: this build of llama.cpp has "
            "no other device (`trimix doctor`)",
            file=sys.stderr,
        )
    if verbose:
        places = {role: model.device for role, model in trio.models.items()}
        layers = ", ".join(f"{role} {m.n_gpu_layers}" for role, m in trio.models.items())
        print(f"models run {concurrency(places)}; layers offloaded: {layers}", file=sys.stderr)
    return trio


def asked_of(arguments: dict[str, Any]) -> dict[Role, Any]:
    """The fields of Loading by role that arguments of Trio.load set."""
    names = ("n_ctx", "mmap", "mlock", "flash_attn")
    shared = {name: arguments[name] for name in names if name in arguments}
    return {role: {**shared, **arguments["per_role"].get(role, {})} for role in ROLES}


def named_trio(options: dict[str, Any]) -> Any:
    """The TrioFile that the options name, whose files are here; None where they name files.

    Takes nothing out of `options`. What it says of weights is for the command to follow.
    """
    from trimix_gguf.trios.store import SHIPPED, resolve

    name = options.get("trio")
    if any(options.get(role) is not None for role in FILES):
        if name is not None:
            raise click.UsageError("give --trio, or the files of its roles, not both")
        return None
    trio_file = resolve(SHIPPED if name is None else name)
    trio_file.check_files()
    return trio_file


def model_name(trio_file: Any, options: dict[str, Any]) -> str:
    """What requests call the model: the trio's name, or that of the large model's file."""
    return trio_file.name if trio_file is not None else Path(options["large_ins"] or "trio").stem


def about_trio(trio_file: Any) -> str:
    """Its name, and what it says of itself."""
    return ": ".join(filter(None, (trio_file.name, trio_file.description)))


def own_mix(options: dict[str, Any]) -> Any:
    """The fixed Mix that the named trio asks for; None where a prompt is to choose weights."""
    trio_file = named_trio(options)
    return None if trio_file is None else trio_file.fixed_mix


def trio_arguments(options: dict[str, Any]) -> dict[str, Any]:
    """Take the trio's options out: arguments of Trio.load, the trio file's beneath the user's."""
    from trimix_gguf.machine import rpc
    from trimix_gguf.machine.loading import AUTO

    trio_file = named_trio(options)
    options.pop("trio", None)
    files = {r: Path(p) for r in FILES if (p := options.pop(r, None)) is not None}
    if files and not {"large_ins", "small_base"} <= files.keys():
        raise click.UsageError(
            "give --large-ins, --small-base and --small-cpt (or --small-cpt-lora)"
        )
    if files and not {"small_cpt", "small_cpt_lora"} & files.keys():
        raise click.UsageError("give --small-cpt, or --small-cpt-lora over --small-base")
    arguments: dict[str, Any] = {"per_role": {}, **files}
    if trio_file is not None:
        arguments = trio_file.load_arguments()
    for name in ("n_ctx", "mmap", "mlock", "flash_attn"):
        if (value := options.pop(name, None)) is not None:
            arguments[name] = value
    for name, kind in ROLE_OPTIONS.items():
        for text in options.pop(name, ()):
            _set_per_role(arguments["per_role"], name, kind, text)
    if rpc.is_engine():  # whoever names workers wants models there
        for role in ROLES:
            arguments["per_role"].setdefault(role, {}).setdefault("n_gpu_layers", AUTO)
    return arguments


def _set_per_role(
    per_role: dict[str, dict[str, Any]], name: str, kind: Callable[[str], Any], text: str
) -> None:
    from trimix_gguf.trios.triofile import LOADING_FIELDS

    role, _, value = text.rpartition("=")
    role = role.replace("-", "_")
    if role and role not in ROLES:
        raise click.UsageError(
            f"--{name.replace('_', '-')}: {role!r} is not a role; the roles are {ROLES}"
        )
    try:
        converted = kind(value)
    except ValueError:
        raise click.UsageError(f"--{name.replace('_', '-')}: {value!r} is not a number") from None
    for one in [role] if role else ROLES:
        per_role.setdefault(one, {}).update(dict.fromkeys(LOADING_FIELDS[name], converted))


def parse_mix(text: str) -> Any:
    """'0.1,0.9' -> the Mix of these weights, which masks nothing."""
    from trimix_gguf.mixing.fusion import Mix, Weights

    try:
        return Mix(Weights(*(float(w) for w in text.split(","))))
    except (ValueError, TypeError):
        raise WeightsError(f"weights {text!r} are not two numbers such as 0.1,0.9") from None


def bound(*, host: str, port: int) -> Any:
    """A socket at that address; raises ClickException where there can be none."""
    from trimix_gguf.server.running import bind

    try:
        return bind(host, port)
    except OSError as error:
        of_port = error.errno in (errno.EADDRINUSE, errno.EACCES)  # else this host is not here
        option = "--port" if of_port else "--host"
        reason = (error.strerror or str(error)).lower()
        raise click.ClickException(f"{host}:{port}: {reason}; choose another {option}") from None


def new_figure(**options: Any) -> Any:
    """An empty matplotlib figure; raises TrimixError where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise TrimixError("--plot needs matplotlib: pip install 'trimix-gguf[plot]'") from None
    return Figure(layout="constrained", **options)


def read_text(path: str) -> str:
    """A file's or stdin's text ('-'); raises PromptError where it is not UTF-8."""
    name = "stdin" if path == "-" else path
    try:
        raw = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PromptError(
            f"{name} is not UTF-8 (byte {error.start}); save it as UTF-8 and try again"
        ) from None
    except OSError as error:
        raise PromptError(f"{name}: {error.strerror}") from None


def parse_grid_options(texts: tuple[str, ...]) -> Any:
    """--grid once (both weights) or twice (alpha, then beta)."""
    from trimix_gguf.mixing.scoring import GRID, parse_grid

    if not texts:
        return (GRID, GRID)
    if texts == ("continuous",):
        return "continuous"
    if len(texts) > 2:
        raise click.UsageError("--grid takes one list for both weights, or one for each")
    grids = [parse_grid(t) for t in texts]
    return (grids[0], grids[-1])


def context_shift_option(default: str) -> Decorator:
    """What is done where a chat outgrows the context; `default` says in words if it is not set."""
    return click.option(
        "--context-shift/--no-context-shift",
        default=None,
        help="If a chat outgrows the context, move what is left instead of reading it again: fast, "
        f"not exact. Default: {default}.",
    )


grid_option = click.option(
    "--grid",
    multiple=True,
    metavar="LIST|continuous",
    help="Weights to try, e.g. 0.1,0.5,1. Give it twice for alpha, then beta.",
)

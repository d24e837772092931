"""trimix serve: the mix behind an HTTP interface."""

import ipaddress
import os
import re
import secrets
import signal
import sys
from contextlib import closing
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from trimix_gguf.cli import supervising
from trimix_gguf.cli.options import (
    Decorator,
    FiniteRange,
    bound,
    context_shift_option,
    each_trio,
    option_group,
    trios_options,
)
from trimix_gguf.cli.served_trios import groups_of, mixes_by_auto, share_weights
from trimix_gguf.cli.tuning_notes import say_tuning
from trimix_gguf.server.limits import Limits

# name -> type, help; the defaults are those of Limits.
_LIMITS: dict[str, tuple[click.ParamType[Any], str]] = {
    "parallel": (click.IntRange(1, 31), "Answers at the same time; they share --n-ctx tokens."),
    "queue": (click.IntRange(0), "Requests that may wait; further requests get status 429."),
    "per_client": (
        click.IntRange(0),
        "Most answers at once for one key or address; 0: no limit of its own.",
    ),
    "timeout": (FiniteRange(0, min_open=True), "Most seconds for one answer."),
    "read_timeout": (
        FiniteRange(0, min_open=True),
        "Most seconds to receive one request.",
    ),
    "drain": (FiniteRange(0), "Seconds for running answers to finish after Ctrl-C."),
    "body_limit": (click.IntRange(1024), "Most bytes of one request."),
}
_KEY = "TRIMIX_NEW_KEY"
_FIELDS = {field.name.removesuffix("_s"): field for field in fields(Limits)}


def _limit_option(name: str) -> Decorator:
    kind, text = _LIMITS[name]
    flag, default = f"--{name.replace('_', '-')}", _FIELDS[name].default
    return click.option(flag, type=kind, default=default, show_default=True, help=text)


@click.command()
@trios_options
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8080,
    show_default=True,
    help="Port to listen on; 0: any free port.",
)
@option_group(*map(_limit_option, _LIMITS))
@context_shift_option("off")
@click.option(
    "--max-loaded",
    type=click.IntRange(1),
    metavar="N",
    help="Trios in memory at once; those that share weights are one. Default: all that fit.",
)
@click.option(
    "--api-key",
    envvar="TRIMIX_API_KEY",
    show_envvar=True,
    metavar="KEY",
    help="Answer only requests with this key.",
)
@click.option(
    "--api-key-file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Keys, one per line: NAME KEY, or only KEY. It is read again when it changes.",
)
@click.option(
    "--no-auth", is_flag=True, help="Answer everyone, also from other machines, without a key."
)
@click.option(
    "--new-key", is_flag=True, help="If no key is given, make one for this run and print it."
)
@click.option(
    "--cors",
    multiple=True,
    metavar="ORIGIN",
    help="Let web pages of this origin use the server, such as http://localhost:3000; or *.",
)
@click.option(
    "--allowed-host",
    multiple=True,
    metavar="HOST",
    help="Also answer to this name, such as that of a proxy in front of the server.",
)
@click.option(
    "--trusted-proxy",
    multiple=True,
    metavar="IP|CIDR",
    help="Believe X-Forwarded-For from this address.",
)
@click.option(
    "--strict",
    is_flag=True,
    help="Refuse unknown fields and model names. Default: ignore them, and name them in a header.",
)
@click.option(
    "--log-file",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Where to write a line per request. Default: standard error.",
)
@click.option(
    "--task",
    metavar="FILE",
    help="Choose weights once for prompts like those of a file; requests name it as trimix.task.",
)
@click.option(
    "--task-method",
    metavar="METHOD",
    help="How --task chooses; see `trimix help weights`. Default: the trio's own method, or auto.",
)
@click.option("--name", metavar="NAME", help="Model name in the API. Default: the trio's.")
def serve(**options: Any) -> None:
    """Answer over HTTP, like OpenAI's API, many requests at once.

    With several trios, the field model of a request names one, or its language.

    Ctrl-C or SIGTERM ends the server after the running answers, and new requests get status 503; a
    second Ctrl-C ends it now.
    """
    listening = {name: options.pop(name) for name in ("host", "port")}
    made_key = None
    given = (options["api_key"], options["api_key_file"])
    if options.pop("new_key") and given == (None, None):
        # With --rpc a child serves, and another one after it: they have one key.
        options["api_key"] = made_key = os.environ.setdefault(_KEY, secrets.token_urlsafe(16))
    access = _access(listening["host"], options)
    if options["task_method"] is not None and options["task"] is None:
        raise click.UsageError("--task-method goes with --task FILE")
    context = click.get_current_context()
    if workers := supervising.workers_of(context):
        context.exit(_supervise(workers, listening, options))
    limits = Limits(**{_FIELDS[name].name: options.pop(name) for name in _LIMITS})
    with closing(_log(options.pop("log_file"))) as log:
        _run(listening, access, limits, log, options, made_key)


def _supervise(workers: list[str], listening: dict[str, Any], options: dict[str, Any]) -> int:
    """Have a child serve, on workers, at a socket that is opened here; its exit code."""
    from trimix_gguf.cli.supervising_server import run_server

    if sys.platform == "win32":
        raise click.ClickException("serve --rpc needs Linux or macOS: use WSL here")
    first, *others = each_trio(options)
    if apart := [other["trio"] for other in others if not share_weights(first, other)]:
        raise click.UsageError(
            f"with --rpc, trios of one server share large_ins and small_base, and {apart[0]} does "
            f"not with {first['trio']}; start another server, with other workers"
        )
    with bound(**listening) as listener:
        return run_server(workers, listener)


def _access(host: str, options: dict[str, Any]) -> Any:
    """Take what says who may ask out of the options; refuse what would open a machine unasked."""
    from trimix_gguf.server.guard import Access, is_loopback
    from trimix_gguf.server.keys import Keys

    api_key, no_auth = options.pop("api_key"), options.pop("no_auth")
    key_file, cors = options.pop("api_key_file"), options.pop("cors")
    hosts, proxies = options.pop("allowed_host"), options.pop("trusted_proxy")
    if api_key is not None and not re.fullmatch(r"[!-~]+", api_key):
        raise click.UsageError("--api-key takes visible ASCII characters, at least one")
    has_key = api_key is not None or key_file is not None
    if has_key and no_auth:
        raise click.UsageError(
            "give a key (--api-key, --api-key-file, --new-key) or --no-auth, not both"
        )
    local = is_loopback(host)
    if not local and not has_key and not no_auth:
        raise click.UsageError(
            f"--host {host} can be reached from other machines; give --api-key (or "
            "TRIMIX_API_KEY), --api-key-file, --new-key to have one made, or --no-auth to let "
            "anyone in"
        )
    for origin in cors:
        if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s?#]+", origin):
            raise click.UsageError(
                f"--cors {origin!r} is not an origin such as http://localhost:3000"
            )
    return Access(
        local=local,
        keys=Keys(api_key, key_file, say=_note) if has_key else None,
        cors=cors,
        hosts=[_host(name) for name in hosts],
        proxies=[_network(name) for name in proxies],
    )


def _host(name: str) -> str:
    """A host's name as a Host header has it, without a port."""
    if not re.fullmatch(r"[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]", name):
        raise click.UsageError(f"--allowed-host {name!r} is not a name such as ai.example.org")
    return name.strip("[]").rstrip(".").lower()


def _network(name: str) -> Any:
    try:
        return ipaddress.ip_network(name)
    except ValueError:
        raise click.UsageError(
            f"--trusted-proxy {name!r} is not an address such as 127.0.0.1, or 10.0.0.0/8"
        ) from None


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _log(path: Path | None) -> Any:
    from trimix_gguf.server.log import Log

    try:
        return Log(path)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise click.ClickException(f"{path}: {reason}; choose another --log-file") from None


def _say_ready(ready: str, trios: list[dict[str, Any]], parent: Any) -> None:
    """The address first: programs wait for that line; then what is said of the trios' tuning."""
    if parent is not None:
        parent.is_ready()
    _note(ready)
    for given in trios:
        if mixes_by_auto(given):
            say_tuning(given)


def _run(
    listening: dict[str, Any],
    access: Any,
    limits: Limits,
    log: Any,
    options: dict[str, Any],
    made_key: str | None,
) -> None:
    from trimix_gguf.cli import supervising_server
    from trimix_gguf.server.app import Api
    from trimix_gguf.server.running import run
    from trimix_gguf.server.trios import Trios

    host = listening["host"]
    parent = supervising_server.Supervised() if supervising_server.is_supervised() else None
    listener = bound(**listening) if parent is None else parent.listener
    name, strict = options.pop("name"), options.pop("strict")
    task, task_method = options.pop("task"), options.pop("task_method")
    own = ("max_loaded", "context_shift")
    settings = {key: value for key in own if (value := options.pop(key)) is not None}
    with listener:
        given = each_trio(options)
        groups = groups_of(given, name=name, task=task, task_method=task_method)
        trios = Trios(groups, limits=limits, **settings)
        try:
            api = Api(trios, limits=limits, strict=strict)
            if parent is not None:
                parent.watch(api)
            address = f"[{host}]" if ":" in host else host
            url = f"http://{address}:{listener.getsockname()[1]}"
            names = ", ".join(entry.name for entry in trios.entries)
            words = "answers" if trios.is_single else "answer"
            ready = f"{names} {words} at {url}/v1" + (f"\nkey: {made_key}" if made_key else "")
            if (served := trios.entries[0].task) is not None:
                ready += f'\ntask: a request names it by "trimix": {{"task": "{served.name}"}}'
            ended_by = run(
                api.application(access, log),
                listener,
                drain=api.drain,
                stop=api.stop,
                on_ready=lambda: _say_ready(ready, given, parent),
                drain_s=limits.drain_s,
                read_timeout_s=limits.read_timeout_s,
            )
        finally:
            trios.close()
    if ended_by == signal.SIGINT:
        raise KeyboardInterrupt

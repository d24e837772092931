"""trimix serve: the mix behind an HTTP interface."""

import re
import secrets
import signal
import sys
from dataclasses import fields
from typing import Any

import click

from trimix_gguf.cli.options import (
    Decorator,
    model_name,
    named_trio,
    open_trio,
    option_group,
    trio_options,
)
from trimix_gguf.cli.tuning_notes import say_tuning
from trimix_gguf.server.limits import Limits, share_of_context

# name -> type, help; the defaults are those of Limits.
_LIMITS: dict[str, tuple[click.ParamType[Any], str]] = {
    "parallel": (click.IntRange(1, 31), "Answers at the same time; they share --n-ctx tokens."),
    "queue": (click.IntRange(0), "Requests that may wait; further requests get status 429."),
    "timeout": (click.FloatRange(0, min_open=True), "Most seconds for one answer."),
    "read_timeout": (
        click.FloatRange(0, min_open=True),
        "Most seconds to receive one request.",
    ),
    "drain": (click.FloatRange(0), "Seconds for running answers to finish after Ctrl-C."),
    "body_limit": (click.IntRange(1024), "Most bytes of one request."),
}
_FIELDS = {field.name.removesuffix("_s"): field for field in fields(Limits)}


def _limit_option(name: str) -> Decorator:
    kind, text = _LIMITS[name]
    flag, default = f"--{name.replace('_', '-')}", _FIELDS[name].default
    return click.option(flag, type=kind, default=default, show_default=True, help=text)


@click.command()
@trio_options
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8080,
    show_default=True,
    help="Port to listen on; 0: any free port.",
)
@option_group(*map(_limit_option, _LIMITS))
@click.option(
    "--api-key",
    envvar="TRIMIX_API_KEY",
    show_envvar=True,
    metavar="KEY",
    help="Answer only requests with this key.",
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
@click.option("--name", metavar="NAME", help="Model name in the API. Default: the trio's.")
def serve(**options: Any) -> None:
    """Answer over HTTP, like OpenAI's API, many requests at once.

    Ctrl-C or SIGTERM ends the server after the running answers; a second Ctrl-C ends it now.
    """
    listening = {name: options.pop(name) for name in ("host", "port")}
    made_key = None
    if options.pop("new_key") and options["api_key"] is None:
        options["api_key"] = made_key = secrets.token_urlsafe(16)
    access = _access(listening["host"], options)
    limits = Limits(**{_FIELDS[name].name: options.pop(name) for name in _LIMITS})
    _run(listening, access, limits, options, made_key)


def _access(host: str, options: dict[str, Any]) -> dict[str, Any]:
    """Take what says who may ask out of the options; refuse what would open a machine unasked."""
    from trimix_gguf.server.guard import is_loopback

    api_key, no_auth = options.pop("api_key"), options.pop("no_auth")
    cors = options.pop("cors")
    if api_key is not None and not re.fullmatch(r"[!-~]+", api_key):
        raise click.UsageError("--api-key takes visible ASCII characters, at least one")
    if api_key is not None and no_auth:
        raise click.UsageError("give a key (--api-key, --new-key) or --no-auth, not both")
    local = is_loopback(host)
    if not local and api_key is None and not no_auth:
        raise click.UsageError(
            f"--host {host} can be reached from other machines; give --api-key (or "
            "TRIMIX_API_KEY), --new-key to have one made, or --no-auth to let anyone in"
        )
    for origin in cors:
        if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s?#]+", origin):
            raise click.UsageError(
                f"--cors {origin!r} is not an origin such as http://localhost:3000"
            )
    return {"local": local, "api_key": api_key, "cors": cors}


def _say_ready(ready: str, given: dict[str, Any] | None) -> None:
    """The address first: programs wait for that line; then what is said of the trio's tuning."""
    print(ready, file=sys.stderr, flush=True)
    if given is not None:
        say_tuning(given)


def _run(
    listening: dict[str, Any],
    access: dict[str, Any],
    limits: Limits,
    options: dict[str, Any],
    made_key: str | None,
) -> None:
    from trimix_gguf.answering.batching import Batcher
    from trimix_gguf.choosing.methods import AUTO
    from trimix_gguf.server.app import Api
    from trimix_gguf.server.openai import mix_settings
    from trimix_gguf.server.running import bind, run

    host, port = listening["host"], listening["port"]
    try:
        listener = bind(host, port)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise click.ClickException(f"{host}:{port}: {reason}; choose another --port") from None
    name, trio_file = options.pop("name"), named_trio(options)
    name = name or model_name(trio_file, options)
    by_auto = trio_file is not None and trio_file.fixed_mix is None
    by_auto = by_auto and trio_file.method in (None, AUTO)
    given = dict(options) if by_auto else None
    with listener, open_trio(options) as trio:
        batcher = Batcher(trio, n_parallel=limits.parallel, n_queue=limits.queue)
        api = Api(
            trio,
            batcher,
            name=name,
            mix=None if trio_file is None else mix_settings(trio_file.method, trio_file.weights),
            max_tokens=share_of_context(trio.n_ctx, limits.parallel),
            limits=limits,
        )
        address = f"[{host}]" if ":" in host else host
        url = f"http://{address}:{listener.getsockname()[1]}"
        ready = f"{name} answers at {url}/v1" + (f"\nkey: {made_key}" if made_key else "")
        try:
            ended_by = run(
                api.application(**access),
                listener,
                stop=api.stop,
                on_ready=lambda: _say_ready(ready, given),
                drain_s=limits.drain_s,
                read_timeout_s=limits.read_timeout_s,
            )
        finally:
            batcher.close()
    if ended_by == signal.SIGINT:
        raise KeyboardInterrupt

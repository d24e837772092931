"""trimix serve: the mix behind an HTTP interface."""

import re
import secrets
import signal
import sys
from typing import Any

import click

from trimix_gguf.cli.options import named_trio, open_trio, trio_options


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
@click.option(
    "--parallel",
    type=click.IntRange(1, 31),
    default=8,
    show_default=True,
    help="Answers at the same time; they share --n-ctx tokens.",
)
@click.option(
    "--queue",
    type=click.IntRange(0),
    default=32,
    show_default=True,
    help="Requests that may wait; further requests get status 429.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(0, min_open=True),
    default=600.0,
    show_default=True,
    help="Most seconds for one answer.",
)
@click.option(
    "--read-timeout",
    type=click.FloatRange(0, min_open=True),
    default=30.0,
    show_default=True,
    help="Most seconds to receive one request.",
)
@click.option(
    "--drain",
    type=click.FloatRange(0),
    default=10.0,
    show_default=True,
    help="Seconds for running answers to finish after Ctrl-C.",
)
@click.option(
    "--body-limit",
    type=click.IntRange(1024),
    default=1 << 20,
    show_default=True,
    help="Most bytes of one request.",
)
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
    _run(listening, access, options, made_key)


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


def _run(
    listening: dict[str, Any],
    access: dict[str, Any],
    options: dict[str, Any],
    made_key: str | None,
) -> None:
    from trimix_gguf.answering.batching import Batcher
    from trimix_gguf.server.app import Api
    from trimix_gguf.server.openai import mix_settings
    from trimix_gguf.server.running import bind, run

    host, port = listening["host"], listening["port"]
    try:
        listener = bind(host, port)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise click.ClickException(f"{host}:{port}: {reason}; choose another --port") from None
    n_parallel, n_queue = options.pop("parallel"), options.pop("queue")
    limits = {
        "timeout_s": options.pop("timeout"),
        "read_timeout_s": options.pop("read_timeout"),
        "body_limit": options.pop("body_limit"),
    }
    drain_s, name = options.pop("drain"), options.pop("name")
    trio_file = named_trio(options)
    name = name or _name(trio_file, options)
    with listener, open_trio(options) as trio:
        batcher = Batcher(trio, n_parallel=n_parallel, n_queue=n_queue)
        api = Api(
            trio,
            batcher,
            name=name,
            mix=None if trio_file is None else mix_settings(trio_file.method, trio_file.weights),
            max_tokens=max(16, trio.n_ctx // n_parallel),
            most_answers=n_parallel + n_queue,
            **limits,
        )
        address = f"[{host}]" if ":" in host else host
        url = f"http://{address}:{listener.getsockname()[1]}"
        ready = f"{name} answers at {url}/v1" + (f"\nkey: {made_key}" if made_key else "")
        try:
            ended_by = run(
                api.application(**access),
                listener,
                stop=api.stop,
                on_ready=lambda: print(ready, file=sys.stderr, flush=True),
                drain_s=drain_s,
                read_timeout_s=limits["read_timeout_s"],
            )
        finally:
            batcher.close()
    if ended_by == signal.SIGINT:
        raise KeyboardInterrupt


def _name(trio_file: Any, options: dict[str, Any]) -> str:
    """What clients call the model: the trio's name, or that of the large model's file."""
    from pathlib import Path

    return trio_file.name if trio_file is not None else Path(options["large_ins"] or "trio").stem

"""--rpc: the engine runs in a child process, and this one watches the workers.

llama.cpp ends the process that loses a worker. The child is this command again; it has our streams,
our signals are passed on to it, and its exit code is ours. Where a worker is lost, one line says
which.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import click

from trimix_gguf.errors import WorkerError
from trimix_gguf.machine import rpc
from trimix_gguf.machine.borrowing import Link, open_links, parse_workers

LOST = 75  # the child's exit code where llama.cpp lost a worker
_META = "trimix_gguf.rpc"
_LEAVES_S, _ENDS_S = 1.0, 1.5  # for the child to notice by itself, and to end when it is told
_KNOWS_S = 5.0  # after the child, until a link says which worker it was


def take_workers(context: click.Context, given: Sequence[str]) -> None:
    """What a command with --rpc does first: run itself in a child, or be that child."""
    endpoints = parse_workers(",".join(given))
    if rpc.is_engine():
        become_engine()
    elif context.command.name == "serve":  # it stays, to answer while there is no engine
        context.meta[_META] = endpoints
    else:
        context.exit(run_command(endpoints))


def workers_of(context: click.Context) -> list[str]:
    """The endpoints of a command that supervises its engine itself."""
    found: list[str] = context.meta.get(_META, [])
    return found


def become_engine() -> None:
    """In the child: take the workers' devices, and end at once where llama.cpp would abort."""
    parent = os.getppid()

    def end_with_parent() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    if sys.platform != "win32":
        threading.Thread(target=end_with_parent, daemon=True).start()
    rpc.on_abort(_end)
    rpc.add_workers()


def _end(reason: str) -> None:
    if is_of_a_worker(reason):
        os._exit(LOST)  # the parent knows which
    print(f"trimix: llama.cpp ended: {reason}", file=sys.stderr, flush=True)
    os._exit(1)


def is_of_a_worker(reason: str) -> bool:
    """Whether llama.cpp's last words are about a worker."""
    return "rpc" in reason.lower()


def run_command(endpoints: Sequence[str]) -> int:
    """Run this command in a child on these workers; its exit code, or 1 where one is lost.

    Raises WorkerError, BuildError before anything is loaded.
    """
    rpc.require_library()
    links = open_links(endpoints, rpc.build())
    ending = threading.Event()
    heard: list[int] = []
    children: list[subprocess.Popen[bytes]] = []
    with signals_for(children, heard):
        child = start_engine(links)
        pass_on_to(child, children, heard)

        def end(_: Link) -> None:
            ending.set()
            end_engine(child)

        for link in links:
            link.watch(end)
        code = child.wait()
    for_us = code == LOST or ending.is_set()
    lost = what_was_lost(links) if for_us else ""
    for link in links:
        link.close()
    if for_us and code != 0:
        if sys.stdout.isatty():
            print(file=sys.stderr)  # the answer has no end
        raise WorkerError(f"{lost}, then repeat the command")
    if code < 0:
        with suppress(ValueError):
            raise WorkerError(f"the engine died of {signal.Signals(-code).name}")
        return 1
    return code


def start_engine(links: Sequence[Link], **options: Any) -> "subprocess.Popen[bytes]":
    """This command again, as the child; `options` are Popen's, and more of its `env`."""
    workers = [{"endpoint": link.endpoint, "devices": link.devices} for link in links]
    own = {rpc.WORKERS: json.dumps(workers), "GGML_NO_BACKTRACE": "1"}
    environment = {**os.environ, **own, **options.pop("env", {})}
    program = f"import sys; sys.path[:] = {sys.path!r}; from trimix_gguf.cli import main; main()"
    command = [sys.executable, "-c", program, *sys.argv[1:]]
    return subprocess.Popen(command, env=environment, **options)


def end_engine(child: "subprocess.Popen[bytes]") -> None:
    """End a child whose worker was lost, if it does not end by itself."""
    for seconds, how in ((_LEAVES_S, child.terminate), (_ENDS_S, child.kill)):
        with suppress(subprocess.TimeoutExpired):
            child.wait(seconds)
            return
        how()


def what_was_lost(links: Sequence[Link]) -> str:
    """The line about the first worker that was lost; one link may know it a moment later."""
    deadline = time.monotonic() + _KNOWS_S
    while time.monotonic() < deadline:
        for link in links:
            if link.lost is not None:
                return link.lost
        time.sleep(0.05)
    names = ", ".join(link.endpoint for link in links)
    return f"the connection to a worker broke ({names}); see what it says there"


@contextmanager
def signals_for(children: "list[subprocess.Popen[bytes]]", heard: list[int]) -> Iterator[None]:
    """Pass SIGTERM on to the children, and Ctrl-C where the terminal has not sent it to them.

    `heard` gets the numbers of the signals.
    """

    def pass_on(number: int, _: FrameType | None) -> None:
        heard.append(number)
        if number == signal.SIGTERM or not _is_in_front():
            for child in children:
                with suppress(OSError):
                    child.send_signal(number)

    names = [name for name in ("SIGINT", "SIGTERM") if hasattr(signal, name)]
    before = [signal.signal(getattr(signal, name), pass_on) for name in names]
    try:
        yield
    finally:
        for name, handler in zip(names, before, strict=True):
            signal.signal(getattr(signal, name), handler)


def pass_on_to(
    child: "subprocess.Popen[bytes]", children: "list[subprocess.Popen[bytes]]", heard: list[int]
) -> None:
    """Make it the child that signals_for passes signals on to, and pass on what came before."""
    children[:] = [child]
    for number in heard:
        with suppress(OSError):
            child.send_signal(number)


def _is_in_front() -> bool:
    """Whether a terminal's Ctrl-C comes to this process, and so to its children."""
    if sys.platform == "win32":
        return True
    try:
        terminal = os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY)
    except OSError:
        return False
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:
        return False
    finally:
        os.close(terminal)

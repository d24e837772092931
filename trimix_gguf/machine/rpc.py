"""llama.cpp's RPC library: it serves this machine's devices, and has those of other machines.

A command with --rpc runs its engine in a child process (cli/supervising.py): llama.cpp ends the
process when it loses a worker. What the workers have is in the child's environment.
"""

import ctypes
import importlib.metadata
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trimix_gguf.errors import BuildError, WorkerError
from trimix_gguf.machine import self_test
from trimix_gguf.machine.loading import REMOTE
from trimix_gguf.machine.typed_json import parse

WORKERS = "TRIMIX_RPC_WORKERS"  # an engine's workers, as JSON
_kept: list[Any] = []  # callbacks that C code holds


def build() -> str:
    """The build, as workers and engines compare it: the processors may differ."""
    version = importlib.metadata.version("llama-cpp-python")
    base = ctypes.CDLL(str(_library("ggml-base")))
    base.ggml_version.restype = ctypes.c_char_p
    return f"llama-cpp-python {version}, ggml {base.ggml_version().decode()}"


def require_library() -> None:
    """Raise BuildError where llama.cpp was built without its RPC library."""
    _library("ggml-rpc")


def _library(name: str) -> Path:
    folder = self_test.library_folder()
    # By its SONAME where there is one: a wheel has copies in place of links.
    for file in (f"lib{name}.so.0", f"lib{name}.so", f"lib{name}.dylib", f"{name}.dll"):
        if (folder / file).is_file():
            return folder / file
    raise BuildError(
        f"{folder} has no {name}: llama.cpp was built without RPC; build it again: "
        "python -m trimix_gguf.machine.build install"
    )


def is_remote(device: str | None) -> bool:
    """Whether a device's name is that of a worker's device, or of several."""
    return device is not None and device.startswith(REMOTE)


def is_engine() -> bool:
    """Whether this process is the child whose models are on workers."""
    return WORKERS in os.environ


def endpoints() -> list[str]:
    """The addresses of an engine's workers."""
    return [worker["endpoint"] for worker in parse(os.environ.get(WORKERS, "[]"), [{}])]


def serve(port: int, cache: str | None, n_threads: int, names: list[str]) -> None:
    """Serve devices at a port of this machine, one engine at a time; returns where it cannot."""
    from trimix_gguf.machine import native

    chosen = [device.handle for name in names for device in native.devices() if device.name == name]
    array = (ctypes.c_void_p * len(chosen))(*chosen)
    start = _loaded().ggml_backend_rpc_start_server
    start.argtypes = [ctypes.c_char_p] * 2 + [ctypes.c_size_t] * 2 + [ctypes.c_void_p]
    start.restype = None
    folder = None if cache is None else os.fsencode(cache)
    start(f"127.0.0.1:{port}".encode(), folder, n_threads, len(chosen), array)


def add_workers() -> None:
    """Make the workers' devices some of this process's own; raises WorkerError."""
    from trimix_gguf.machine import native

    add_server = _loaded().ggml_backend_rpc_add_server
    add_server.argtypes, add_server.restype = [ctypes.c_char_p], ctypes.c_void_p
    # A wheel has copies in place of links, so that llama.cpp may have a registry of its own.
    registries = (native.libggml, native.lib._lib)
    for worker in parse(os.environ[WORKERS], [{}]):
        reg = add_server(worker["endpoint"].encode())
        if not reg:
            raise WorkerError(f"worker {worker['endpoint']} has no device")
        for library in registries:
            library.ggml_backend_register(ctypes.c_void_p(reg))
        for about in worker["devices"]:
            native.remote.append({**about, "endpoint": worker["endpoint"]})


def _loaded() -> ctypes.CDLL:
    """The library; native goes first, which tries llama.cpp and loads what this one needs."""
    from trimix_gguf.machine import native  # noqa: F401

    return ctypes.CDLL(str(_library("ggml-rpc")))


def on_abort(tell: Callable[[str], None]) -> None:
    """Have llama.cpp call `tell` with its reason, on any thread, before it ends the process."""
    from trimix_gguf.machine import native

    callback = ctypes.CFUNCTYPE(None, ctypes.c_char_p)(
        lambda text: tell((text or b"").decode("utf-8", "replace"))
    )
    _kept.append(callback)
    native.libggml.ggml_set_abort_callback(callback)  # ggml-base's, as this process has it


def end_with_input() -> None:
    """End this process once its standard input is closed: whoever started it has ended."""

    def wait() -> None:
        while os.read(0, 4096):
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()

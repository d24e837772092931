"""llama.cpp itself: the one importer of llama_cpp, its log kept quiet, its devices listed."""

import ctypes
import importlib
import importlib.util
import mmap
import os
import re
import sys
import threading
import unicodedata
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trimix_gguf.errors import ModelError, ModelFileError, PromptError
from trimix_gguf.machine import self_test
from trimix_gguf.machine.loading import REMOTE, REMOTE_CPU, REMOTE_GPU, Loading
from trimix_gguf.machine.quantization import FLOATS

KV_TYPES = (*FLOATS, "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")
MOST_RUN = 2000  # some 300 bytes of stack each; Windows has 1 MB
_LONG_RUN = re.compile(rf"\S{{{MOST_RUN + 1},}}|\s{{{MOST_RUN + 1},}}")
QUANTIZE_BUFFER = 256 << 20  # bytes of a tensor's rows that the quantizer holds at once
# What workers say of their devices, in the order of llama.cpp's names RPC0, RPC1, …
remote: list[dict[str, Any]] = []


def _bindings(*names: str) -> list[Any]:
    """Modules of llama_cpp without its own __init__.

    That loads chat formats, jinja2 and the high-level class: 10 MB, and half of the start.
    """
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None:
        raise ImportError("llama-cpp-python is not installed")
    loaded = sys.modules.get("llama_cpp")
    if loaded is None:
        sys.modules["llama_cpp"] = importlib.util.module_from_spec(spec)
    try:
        return [importlib.import_module(f"llama_cpp.{name}") for name in names]
    finally:
        if loaded is None:
            del sys.modules["llama_cpp"]  # whoever imports the package itself gets it whole


self_test.require()
lib, _ggml = _bindings("llama_cpp", "_ggml")
libggml = _ggml.libggml

_WARN, _ERROR, _CONTINUE = 3, 4, 5
# What llama.cpp adds after its reason, as the loading functions return.
_SAYS_NOTHING = re.compile(r"failed to (load model|load vocab|apply lora adapter|initialize)\W*$")
_errors: deque[str] = deque(maxlen=8)
_verbose = False
_closing_stderr = threading.Lock()


def _log(level: int, text: bytes, _: Any) -> None:
    line = text.decode("utf-8", errors="replace")
    if _verbose and sys.stderr is not None:
        sys.stderr.write(line)
    elif level == _ERROR and line.strip():
        _errors.append(line.strip())


_log_callback = lib.llama_log_callback(_log)


def listen() -> None:
    """Have llama.cpp log to us, from now on; importing llama_cpp whole takes its log over."""
    _errors.clear()
    lib.llama_log_set(_log_callback, ctypes.c_void_p(0))


listen()
lib.llama_backend_init()
if libggml.ggml_backend_dev_count() == 0:  # a portable build: the fitting backend is chosen here
    libggml.ggml_backend_load_all_from_path(str(_ggml.libggml_base_path).encode())


def set_verbose(verbose: bool) -> None:
    """Send llama.cpp's own log to stderr, or keep only its last errors."""
    global _verbose
    _verbose = verbose


def last_error() -> str:
    """llama.cpp's newest error line that says why, to put into an error of this package."""
    lines = list(_errors) or ["llama.cpp gave no reason"]
    _errors.clear()
    return next((line for line in reversed(lines) if not _SAYS_NOTHING.search(line)), lines[-1])


@contextmanager
def stderr_closed() -> Iterator[None]:
    """Silence what llama.cpp prints past its log, such as a grammar's parse errors.

    One thread at a time: a second one would keep the first one's closed stream as its own.
    """
    with _closing_stderr, _stderr_closed():
        yield


@contextmanager
def _stderr_closed() -> Iterator[None]:
    if sys.stderr is not None:
        sys.stderr.flush()
    try:
        kept = os.dup(2)
    except OSError:  # it is closed already, as in a service
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def return_freed() -> None:
    """Give the system what the heap holds of freed blocks, where the C library can (glibc)."""
    with suppress(OSError, AttributeError):
        _c_library().malloc_trim(0)


def drop_pages(array: NDArray[Any]) -> None:
    """Give the system the memory under `array`, which reads as zeros until it is written again."""
    page = mmap.PAGESIZE
    start = -(-array.ctypes.data // page) * page
    size = (array.ctypes.data + array.nbytes) // page * page - start
    if sys.platform == "linux" and size > 0:
        _c_library().madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), mmap.MADV_DONTNEED)


def _c_library() -> Any:
    """What the process has loaded already, C library included; OSError where that has no name."""
    try:
        return ctypes.CDLL(None)
    except TypeError as error:
        raise OSError("Windows names no library of the whole process") from error


def without_tokenizer(params: Any, architecture: str, n_vocab: int) -> Any:
    """Load a model without its tokenizer, about 200 bytes per token; keep what is returned."""
    overrides = _overrides(
        {"tokenizer.ggml.model": "no_vocab", f"{architecture}.vocab_size": n_vocab}
    )
    params.kv_overrides = overrides
    return overrides


def ggml_type(name: str) -> int:
    """'q8_0' -> GGML_TYPE_Q8_0."""
    return int(getattr(lib, f"GGML_TYPE_{name.upper()}"))


@dataclass(frozen=True)
class Device:
    """A ggml backend device; memory in bytes, 0 where the backend does not say."""

    name: str
    description: str
    kind: str
    free: int
    total: int
    handle: int


def devices() -> list[Device]:
    """Every device that this build of llama.cpp can use, the CPU included."""
    found = []
    libggml.ggml_backend_dev_count.restype = ctypes.c_size_t
    libggml.ggml_backend_dev_get.restype = ctypes.c_void_p
    libggml.ggml_backend_dev_get.argtypes = [ctypes.c_size_t]
    for name in ("ggml_backend_dev_name", "ggml_backend_dev_description"):
        getattr(libggml, name).restype = ctypes.c_char_p
        getattr(libggml, name).argtypes = [ctypes.c_void_p]
    libggml.ggml_backend_dev_type.argtypes = [ctypes.c_void_p]
    libggml.ggml_backend_dev_memory.argtypes = [ctypes.c_void_p] + [
        ctypes.POINTER(ctypes.c_size_t)
    ] * 2
    for i in range(libggml.ggml_backend_dev_count()):
        handle = libggml.ggml_backend_dev_get(i)
        if (name := libggml.ggml_backend_dev_name(handle).decode()).startswith(REMOTE):
            found.append(_remote(name, handle))
            continue
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        libggml.ggml_backend_dev_memory(handle, ctypes.byref(free), ctypes.byref(total))
        kind = libggml.ggml_backend_dev_type(handle)
        found.append(
            Device(
                name=name,
                description=libggml.ggml_backend_dev_description(handle).decode("utf-8", "replace"),
                kind={0: "CPU", 1: "GPU", 2: "integrated GPU"}.get(kind, "accelerator"),
                free=free.value,
                total=total.value,
                handle=handle,
            )
        )
    return found


def _remote(name: str, handle: int) -> Device:
    """A worker's device, as the worker describes it: llama.cpp knows only its address."""
    about = remote[int(name.removeprefix(REMOTE))]
    kind = REMOTE_CPU if about["kind"] == "CPU" else REMOTE_GPU
    description = f"{about['description']} at {about['endpoint']}"
    return Device(name, description, kind, about["free"], about["total"], handle)


class _Kept(ctypes.Structure):
    """llama_model_tensor_buft_override: tensors of these names go to this kind of buffer."""

    _fields_ = (("pattern", ctypes.c_char_p), ("buffer_type", ctypes.c_void_p))


def place_on(params: Any, loading: Loading) -> list[Any]:
    """Have a model loaded on the devices that `loading` names; keep what is returned meanwhile.

    Raises ModelError for a device that is not here.
    """
    known = {device.name.lower(): device for device in devices()}
    names = str(loading.device).split("+")
    for name in names:
        if name.lower() not in known:
            have = ", ".join(device.name for device in known.values())
            raise ModelError(f"device {name!r} is not here; this build has {have}")
    chosen = [known[name.lower()] for name in names]
    # The CPU is always used: if it is the one named, the list is empty.
    handles = [None if device.kind == "CPU" else device.handle for device in chosen]
    array = (ctypes.c_void_p * (len(handles) + 1))(*handles, None)
    params.devices = ctypes.cast(array, ctypes.c_void_p)
    kept: list[Any] = [array]
    if loading.split:
        split = (ctypes.c_float * max(int(lib.llama_max_devices()), len(chosen)))(*loading.split)
        params.tensor_split = ctypes.cast(split, ctypes.POINTER(ctypes.c_float))
        kept.append(split)
    if loading.keep_output:
        libggml.ggml_backend_cpu_buffer_type.restype = ctypes.c_void_p
        in_ram = _Kept(b"^(output|token_embd)", libggml.ggml_backend_cpu_buffer_type())
        overrides = (_Kept * 2)(in_ram, _Kept())
        params.tensor_buft_overrides = ctypes.cast(overrides, ctypes.c_void_p)
        kept.append(overrides)
    return kept


def gpu_offload() -> bool:
    """Whether this build of llama.cpp can put layers on another device than the CPU."""
    return bool(lib.llama_supports_gpu_offload())


def build_info() -> dict[str, str]:
    """Versions and CPU features of the llama.cpp in use."""
    import importlib.metadata  # 2 MB that answering has no use for
    import platform

    return {
        "llama-cpp-python": importlib.metadata.version("llama-cpp-python"),
        "system": lib.llama_print_system_info().decode().strip(" |"),
        "gpu_offload": "yes" if gpu_offload() else "no",
        "cpu": next((d.description for d in devices() if d.kind == "CPU"), platform.processor()),
    }


def quantize(
    source: str,
    out: str,
    file_type: int,
    *,
    requantize: bool,
    imatrix: Mapping[str, NDArray[np.float32]] | None = None,
    keys: Mapping[str, str | int] | None = None,
) -> int:
    """llama.cpp's quantizer on a whole file; 0 where it succeeded. It can take minutes.

    `imatrix` has means of squared inputs by weight name, `keys` go into the file's metadata.
    """
    params = lib.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize = file_type, requantize
    params.max_buf_size = QUANTIZE_BUFFER
    if imatrix:
        entries = (lib.llama_model_imatrix_data * (len(imatrix) + 1))()  # ends without a name
        for entry, (name, means) in zip(entries, imatrix.items(), strict=False):
            entry.name, entry.size = name.encode(), means.size
            entry.data = means.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        params.imatrix = entries
    if keys:
        params.kv_overrides = _overrides(keys)
    names = os.fsencode(source), os.fsencode(out)
    return int(lib.llama_model_quantize(*names, ctypes.byref(params)))


def _overrides(keys: Mapping[str, str | int]) -> Any:
    """Metadata for llama.cpp, whose strings take 127 bytes; it ends with an empty key."""
    overrides: Any = (lib.llama_model_kv_override * (len(keys) + 1))()
    for override, (key, value) in zip(overrides, keys.items(), strict=False):
        override.key = key.encode()
        if isinstance(value, str):
            override.tag = lib.LLAMA_KV_OVERRIDE_TYPE_STR
            override.value.val_str = value.encode()[:127].decode(errors="ignore").encode()
        else:
            override.tag = lib.LLAMA_KV_OVERRIDE_TYPE_INT
            override.value.val_i64 = value
    return overrides


def cut_runs(text: str) -> list[str]:
    """`text` in parts, none of which has a word, or white space, of more than MOST_RUN characters.

    It is cut before a sign that follows a letter if there is one, as tokenizers cut there too.
    """
    parts, at = [], 0
    for run in _LONG_RUN.finditer(text):
        begin = run.start()
        while run.end() - begin > MOST_RUN:
            begin = _cut(text, begin)
            parts.append(text[at:begin])
            at = begin
    return [*parts, text[at:]]


def _cut(text: str, begin: int) -> int:
    """Where to cut a run that begins there."""
    kinds = [unicodedata.category(c) for c in text[begin : begin + MOST_RUN + 1]]
    for i in range(MOST_RUN, MOST_RUN // 2, -1):
        if kinds[i][0] in "PS" and kinds[i - 1][0] in "LMN":
            return begin + i
    whole = (i for i in range(MOST_RUN, MOST_RUN // 2, -1) if kinds[i][0] != "M")
    return begin + next(whole, MOST_RUN)  # before no mark that goes on a letter


def tokenize(vocab: Any, text: str, *, special: bool = False, long_runs: bool = True) -> list[int]:
    """Ids of `text` without BOS; `special` reads control tokens such as <|im_start|>.

    Without `long_runs`, they are cut: std::regex, by which llama.cpp cuts the text for many
    tokenizers, needs stack for each character of a match.
    """
    if not long_runs:
        return [i for part in cut_runs(text) for i in tokenize(vocab, part, special=special)]
    raw = text.encode("utf-8")
    room = len(raw) + 8
    ids = (lib.llama_token * room)()
    n = lib.llama_tokenize(vocab, raw, len(raw), ids, room, False, special)
    if n < 0:
        ids = (lib.llama_token * -n)()
        n = lib.llama_tokenize(vocab, raw, len(raw), ids, -n, False, special)
    return list(ids[:n])


def piece(vocab: Any, token: int, *, special: bool = False) -> bytes:
    """Bytes of one token; control tokens are empty unless `special`.

    Raises PromptError for an id outside the vocabulary: llama.cpp would end the process.
    """
    n_vocab = lib.llama_vocab_n_tokens(vocab)
    if not 0 <= token < n_vocab:
        raise PromptError(f"there is no token {token}; there are 0 to {n_vocab - 1}")
    size = 64
    while True:
        buffer = ctypes.create_string_buffer(size)
        n = lib.llama_token_to_piece(vocab, token, buffer, size, 0, special)
        if n >= 0:
            return buffer.raw[:n]
        size = -n


def tokenize_texts(path: str, texts: list[str], *, special: bool = False) -> list[list[int]]:
    """Ids of each text by the vocabulary of a GGUF, whose weights are not loaded."""
    with vocabulary(path) as vocab:
        return [tokenize(vocab, text, special=special, long_runs=False) for text in texts]


@contextmanager
def vocabulary(path: str) -> Iterator[Any]:
    """The vocabulary of a GGUF, whose weights are not loaded; raises ModelFileError."""
    listen()
    params = lib.llama_model_default_params()
    params.vocab_only = True
    model = lib.llama_model_load_from_file(os.fsencode(path), params)
    if not model:
        raise ModelFileError(f"{path}: llama.cpp cannot read its vocabulary: {last_error()}")
    try:
        yield lib.llama_model_get_vocab(model)
    finally:
        lib.llama_model_free(model)

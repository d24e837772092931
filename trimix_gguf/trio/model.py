"""Model: one GGUF in one llama.cpp context, with its KV cache and its position."""

import ctypes
import os
import time
import unicodedata
import weakref
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trimix_gguf.errors import ContextFullError, ModelError, ModelFileError
from trimix_gguf.machine import file_trial, native
from trimix_gguf.machine.added_tokens import AddedTokens
from trimix_gguf.machine.file_trial import FileTrial
from trimix_gguf.machine.gguf_file import GGUFFile, read_gguf
from trimix_gguf.machine.hashes import state_of
from trimix_gguf.machine.loading import Loading
from trimix_gguf.machine.native import lib
from trimix_gguf.machine.products import OutputClock, Watch
from trimix_gguf.machine.threads import MOST_THREADS, available_cores
from trimix_gguf.machine.vocabulary import END_IDS, NORMALIZER, usual_normalizer
from trimix_gguf.trio.decode_times import seconds_by_size
from trimix_gguf.trio.handle import Handle

# Pre-tokenizers that llama.cpp has code of its own for; the others go through std::regex.
_WITHOUT_REGEX = ("qwen2", "llama-bpe", "gpt-2", "smollm")
_ENDS = ("eos", "eot", "eom")  # token ids in a GGUF's metadata that end a text
_ROPES = (lib.LLAMA_ROPE_TYPE_NORM, lib.LLAMA_ROPE_TYPE_NEOX)  # of one position per token
Logits = NDArray[np.float32]  # [n, n_vocab]
Entry = tuple[int, int, int, bool]  # id, position, sequence, whether its row is wanted


class Model:
    """One GGUF (and LoRA adapter) with a context of `n_ctx` positions in all its sequences.

    Sequence 0 is there from the start, with `n_past` ids; fork() starts others as copies.
    `share` is a Model of the same file whose weights this one reads too: a small_cpt that is
    small_base plus an adapter keeps one copy in memory. Without `tokenizer` it takes only ids,
    in less memory. `watch` sees what the weights are multiplied with. Raises ModelFileError for a
    file that is damaged, ModelError where llama.cpp refuses it.
    """

    vocab, _ctx, _memory, _batch, _weights = (Handle() for _ in range(5))

    def __init__(
        self,
        path: Path | str,
        loading: Loading = Loading(),  # noqa: B008  # frozen
        *,
        lora: Path | str | None = None,
        lora_scale: float = 1.0,
        share: "Model | None" = None,
        tokenizer: bool = True,
        watch: Watch | OutputClock | None = None,
    ) -> None:
        if loading.n_threads > MOST_THREADS:
            raise ModelError(f"{loading.n_threads} threads are too many; at most {MOST_THREADS}")
        self.path, self.loading = Path(path), loading
        self.file: GGUFFile = share.file if share is not None else read_gguf(self.path)
        self.n_past = 0
        self.n_window = loading.n_window
        self.n_batch = max(loading.n_batch, loading.n_window)
        self.lora = Path(lora) if lora is not None else None
        self._watch = watch  # kept: llama.cpp calls it
        self.kv_types = (loading.type_k, loading.type_v)
        self.n_gpu_layers = int(loading.n_gpu_layers)
        self.device = device_of(self.n_gpu_layers, loading.device)
        self.flash_attn = loading.flash_attn  # None: as llama.cpp decides for a device
        if self.device == "CPU":
            self.flash_attn = loading.has_flash_attention(offloaded=False)
        self.n_threads = loading.n_threads or available_cores()
        self.chat_template: str | None = self.file.metadata.get("tokenizer.chat_template")
        self._added = AddedTokens.of(self.file) if tokenizer else None
        self.decode_seconds: dict[int, deque[float]] = {}  # ids decoded at once -> the last times
        self._weights = _Weights(self.file, loading, tokenizer) if share is None else share._weights
        known = self.file.metadata
        self._takes_long_runs = (
            known.get("tokenizer.ggml.model") != "gpt2"
            or known.get("tokenizer.ggml.pre") in _WITHOUT_REGEX
        )
        self.vocab = lib.llama_model_get_vocab(self._weights.handle)
        self.n_vocab = int(lib.llama_vocab_n_tokens(self.vocab))
        self._ctx = self._open_context(loading.n_ctx)
        self._memory = lib.llama_get_memory(self._ctx)
        self._batch = lib.llama_batch_init(self.n_batch, 0, 1)
        self._close = weakref.finalize(self, _free, self._ctx, self._batch, self._weights)
        # llama.cpp rounds up; keep what was asked for.
        self.n_ctx = min(loading.n_ctx, int(lib.llama_n_ctx(self._ctx)))
        if self.lora is not None:
            self._apply_lora(self.lora, lora_scale)

    def _open_context(self, n_ctx: int) -> Any:
        type_k, type_v = self.kv_types
        for kind in self.kv_types:
            if kind not in native.KV_TYPES:
                raise ModelError(
                    f"KV-cache type {kind!r} is unknown; one of {', '.join(native.KV_TYPES)}"
                )
        params = lib.llama_context_default_params()
        params.n_ctx = n_ctx
        params.n_batch = params.n_ubatch = self.n_batch
        params.n_outputs_max = self.n_window  # llama.cpp sizes its logits buffers by it
        params.n_seq_max = self.n_window  # each may want its row
        params.kv_unified = True  # sequences share cells, and each may fill the context
        params.n_threads = params.n_threads_batch = self.n_threads
        params.type_k, params.type_v = native.ggml_type(type_k), native.ggml_type(type_v)
        params.flash_attn_type = -1 if self.flash_attn is None else int(self.flash_attn)
        params.swa_full = True  # a sliding-window cache could not be rewound
        params.no_perf = True
        if self._watch is not None:
            params.cb_eval = self._watch.callback
        context = lib.llama_init_from_model(self._weights.handle, params)
        if not context:
            raise ModelError(
                f"{self.path}: llama.cpp opened no context of {n_ctx} positions "
                f"(K {type_k}, V {type_v}): {native.last_error()}"
            )
        return context

    def _apply_lora(self, path: Path, scale: float) -> None:
        adapter = self._weights.adapter(path)
        handles = (lib.llama_adapter_lora_p_ctypes * 1)(adapter)
        if lib.llama_set_adapters_lora(self._ctx, handles, 1, (ctypes.c_float * 1)(scale)) != 0:
            raise ModelError(f"{path}: llama.cpp cannot apply it: {native.last_error()}")

    @property
    def is_on_disk(self) -> bool:
        """Whether the file of its weights is still the one that was loaded."""
        return bool(self._weights.is_on_disk)

    @property
    def can_shift(self) -> bool:
        """Whether what was read can move to other positions: only where RoPE encodes them."""
        by_rope = lib.llama_model_rope_type(self._weights.handle) in _ROPES
        return bool(by_rope and lib.llama_memory_can_shift(self._memory))

    # -- decoding ---------------------------------------------------------------------------

    def decode(self, ids: Sequence[int], *, every_row: bool = False) -> Logits:
        """Append ids to sequence 0; logits [n ≤ n_window, n_vocab], or [1, n_vocab] of the last id.

        At most n_batch ids. Zero-copy and on failure as decode_entries.
        """
        n = len(ids)
        most = self.n_window if every_row else self.n_batch
        if not 0 < n <= most:
            raise ValueError(f"decode takes 1 … {most} ids, got {n}")
        entries = [
            (token, self.n_past + i, 0, every_row or i == n - 1) for i, token in enumerate(ids)
        ]
        return self.decode_entries(entries)

    def decode_entries(self, entries: Sequence[Entry]) -> Logits:
        """Append ids to any sequences; logits [n ≤ n_window, n_vocab] of the rows wanted.

        At most n_batch entries, each sequence's in the order of their positions. Zero-copy: the
        rows are llama.cpp's own buffer, valid until the next decode and for as long as this Model
        lives. Raises ContextFullError where the cells of all sequences are used up, ModelError;
        sequence 0 and `n_past` are then as before, others that the call names are to be dropped.
        """
        n_first = sum(sequence == 0 for _, _, sequence, _ in entries)  # of sequence 0
        if n_first and self.n_past + n_first > self.n_ctx:
            raise ContextFullError(
                f"{self.path.name}: {self.n_past + n_first} tokens do not fit in a context of "
                f"{self.n_ctx}; raise --n-ctx or shorten the prompt"
            )
        started = time.perf_counter()
        try:
            rows = self._decode(entries)
        except ModelError:
            if n_first:
                self.rewind(self.n_past)
            raise
        self.n_past += n_first
        took = time.perf_counter() - started  # what drafts are planned by
        self.decode_seconds.setdefault(len(entries), deque(maxlen=5)).append(took)
        return rows

    def _decode(self, entries: Iterable[Entry]) -> Logits:
        batch, n, n_rows = self._batch, 0, 0
        for token, position, sequence, wanted in entries:
            batch.token[n] = token
            batch.pos[n] = position
            batch.n_seq_id[n] = 1
            batch.seq_id[n][0] = sequence
            batch.logits[n] = wanted
            n += 1
            n_rows += wanted
        batch.n_tokens = n
        status = lib.llama_decode(self._ctx, batch)
        if status == 1:
            raise ContextFullError(
                f"{self.path.name}: no room for {n} more tokens in a context of {self.n_ctx}; "
                "raise --n-ctx"
            )
        if status != 0:
            reason = "interrupted" if status == 2 else native.last_error()
            raise ModelError(f"{self.path.name}: decoding failed ({status}): {reason}")
        if n_rows == 0:
            return np.empty((0, self.n_vocab), dtype=np.float32)
        pointer = lib.llama_get_logits(self._ctx)  # waits for the device
        return np.ctypeslib.as_array(pointer, shape=(n_rows, self.n_vocab))

    def fork(self, source: int, target: int) -> None:
        """Let sequence `target`, empty so far, share what `source` holds; no cell is copied."""
        lib.llama_memory_seq_cp(self._memory, source, target, -1, -1)

    def drop(self, sequence: int, n_past: int = 0) -> None:
        """Forget what a sequence holds from position `n_past` on. Raises ModelError."""
        if not lib.llama_memory_seq_rm(self._memory, sequence, n_past, -1):
            raise ModelError(f"{self.path.name}: llama.cpp cannot rewind this architecture")

    def drop_rows(self) -> None:
        """Give the system the memory of the logits read so far; they are gone."""
        pointer = lib.llama_get_logits(self._ctx)
        if self.device == "CPU" and pointer:
            native.drop_pages(np.ctypeslib.as_array(pointer, shape=(self.n_window, self.n_vocab)))
            native.return_freed()

    def seconds(self, most: int) -> NDArray[np.float64]:
        """What decoding 1, 2, … `most` ids at once takes [most]; see decode_times."""
        return seconds_by_size(self.decode_seconds, most)

    def rewind(self, n_past: int) -> None:
        """Forget every position from `n_past` on."""
        if not lib.llama_memory_seq_rm(self._memory, 0, n_past, -1):
            # A cache that cannot be cut (recurrent state) can only be emptied whole.
            lib.llama_memory_clear(self._memory, True)
            self.n_past = 0
            if n_past > 0:
                raise ModelError(f"{self.path.name}: llama.cpp cannot rewind this architecture")
        self.n_past = min(self.n_past, n_past)

    def shift(self, sequence: int, start: int, end: int) -> None:
        """Forget positions `start` to `end` of a sequence; those after them move into their place.

        They keep what they took from the forgotten ones. No other sequence may have their cells.
        Raises ModelError.
        """
        if not self.can_shift or not lib.llama_memory_seq_rm(self._memory, sequence, start, end):
            raise ModelError(f"{self.path.name}: llama.cpp cannot shift this architecture")
        lib.llama_memory_seq_add(self._memory, sequence, end, -1, start - end)
        if sequence == 0:
            self.n_past -= max(0, min(end, self.n_past) - start)

    def save_state(self, path: Path) -> None:
        """Write the cache to a file. Raises ModelError."""
        none = (lib.llama_token * 1)()
        if not lib.llama_state_seq_save_file(self._ctx, os.fsencode(path), 0, none, 0):
            raise ModelError(f"{path}: llama.cpp cannot write the state: {native.last_error()}")

    def load_state(self, path: Path, most: int) -> None:
        """Put back a cache of at most `most` ids, by save_state of the same model. ModelError."""
        none, n_ids = (lib.llama_token * 1)(), ctypes.c_size_t()
        read = lib.llama_state_seq_load_file(
            self._ctx, os.fsencode(path), 0, none, 1, ctypes.byref(n_ids)
        )
        self.n_past = int(lib.llama_memory_seq_pos_max(self._memory, 0)) + 1 if read else 0
        if not read or self.n_past > most:
            self.rewind(0)
            raise ModelError(
                f"{path}: llama.cpp cannot read it as a state of {self.path.name} with a context "
                f"of {self.n_ctx}: {native.last_error()}"
            )

    # -- text ↔ ids -------------------------------------------------------------------------

    def normalize(self, text: str) -> str:
        """`text` as this tokenizer's training saw it; llama.cpp itself normalizes nothing."""
        metadata = self.file.metadata
        usual = usual_normalizer(str(metadata.get("tokenizer.ggml.pre", "")))
        in_nfc = metadata.get(NORMALIZER, usual) == "nfc"
        return unicodedata.normalize("NFC", text) if in_nfc else text

    def tokenize(self, text: str, *, special: bool = False) -> list[int]:
        """Ids of `text` without BOS; `special` reads control tokens such as <|im_start|>."""
        long_runs = self._takes_long_runs
        if self._added is None:
            return native.tokenize(self.vocab, text, special=special, long_runs=long_runs)
        return self._added.tokenize(
            text,
            lambda part: native.tokenize(self.vocab, part, long_runs=long_runs),
            special=special,
        )

    def piece(self, token: int, *, special: bool = False) -> bytes:
        """Bytes of one token; control tokens are empty unless `special`. Raises PromptError."""
        return native.piece(self.vocab, token, special=special)

    @property
    def bos(self) -> list[int]:
        """[BOS] where this vocabulary adds one, else []."""
        return [lib.llama_vocab_bos(self.vocab)] if lib.llama_vocab_get_add_bos(self.vocab) else []

    def end_of_generation(self) -> frozenset[int]:
        """The ids that end a text: those the file names, and by their text those it does not."""
        named = [*map(self.file.special_id, _ENDS), *(self.file.array(END_IDS) or ())]
        is_eog = lib.llama_vocab_is_eog
        found = (i for i in range(self.n_vocab) if is_eog(self.vocab, i))
        return frozenset((*found, *(i for i in named if i is not None and i < self.n_vocab)))

    def special_tokens(self) -> dict[str, int]:
        """The ids of "bos", "eos", "pad" and "unk" that the file names, as llama.cpp has them."""
        # Where a file names none, llama.cpp takes some ordinary token. It tells nobody of "unk".
        found = {
            "bos": ("bos", lib.llama_vocab_bos),
            "eos": ("eos", lib.llama_vocab_eos),
            "pad": ("padding", lib.llama_vocab_pad),
            "unk": ("unknown", lambda vocab: self.file.special_id("unknown")),
        }
        named = {
            name: int(of(self.vocab))
            for name, (key, of) in found.items()
            if self.file.special_id(key) is not None
        }
        return {name: i for name, i in named.items() if 0 <= i < self.n_vocab}

    def unused(self) -> NDArray[np.bool_]:
        """bool [n_vocab]: ids of type UNUSED, which no mix may pick."""
        flag, attr = lib.LLAMA_TOKEN_ATTR_UNUSED, lib.llama_vocab_get_attr
        return np.array([bool(attr(self.vocab, i) & flag) for i in range(self.n_vocab)])

    def close(self) -> None:
        """Free the context, and the weights once no other Model shares them."""
        self._close()
        del self.vocab, self._ctx, self._memory, self._batch, self._weights
        self.n_past = 0  # nothing is left to rewind


class _Weights:
    """A loaded llama_model and its adapters, freed when the last Model lets go."""

    def __init__(self, file: GGUFFile, loading: Loading, tokenizer: bool) -> None:
        path = file.path
        file_trial.require([FileTrial(path, loading, tokenizer=tokenizer)])
        native.listen()
        self._state = state_of(path)  # before it is read
        params = lib.llama_model_default_params()
        if not tokenizer:
            n_vocab = len(file.array("tokenizer.ggml.tokens") or ())
            overrides = native.without_tokenizer(params, file.architecture, n_vocab)  # noqa: F841
        params.n_gpu_layers = int(loading.n_gpu_layers)
        params.load_mode = int(loading.mmap) + 2 * int(loading.mlock)
        placed = native.place_on(params, loading) if loading.device else None  # noqa: F841
        self.path, self._loading, self._tokenizer = path, loading, tokenizer
        self.handle = lib.llama_model_load_from_file(os.fsencode(path), params)
        if not self.handle:
            raise ModelFileError(f"{path}: llama.cpp cannot load it: {native.last_error()}")
        self._adapters: dict[tuple[Any, ...], Any] = {}  # by path and state_of
        weakref.finalize(self, lib.llama_model_free, self.handle)
        native.return_freed()
        encodes = lib.llama_model_has_encoder(self.handle)
        if encodes or not lib.llama_model_has_decoder(self.handle):
            raise ModelFileError(f"{path}: not a decoder-only language model; it cannot generate")
        if lib.llama_model_is_recurrent(self.handle) or lib.llama_model_is_hybrid(self.handle):
            raise ModelFileError(
                f"{path}: a model with a recurrent state, as Mamba; what it has read cannot be "
                "taken back, which drafts and kept prompts need"
            )

    @property
    def is_on_disk(self) -> bool:
        """Whether the file is still the one that was loaded."""
        try:
            return state_of(self.path) == self._state
        except OSError:
            return False

    def adapter(self, path: Path) -> Any:
        """Load a LoRA once, and again where its file is another; freed with the model."""
        read_gguf(path)
        known = (path, *state_of(path))
        if known not in self._adapters:
            trial = FileTrial(self.path, self._loading, lora=path, tokenizer=self._tokenizer)
            file_trial.require([trial])
            native.listen()
            handle = lib.llama_adapter_lora_init(self.handle, os.fsencode(path))
            if not handle:
                raise ModelFileError(
                    f"{path}: not an adapter for {self.path.name}: {native.last_error()}"
                )
            self._adapters[known] = handle
        return self._adapters[known]


def _free(context: Any, batch: Any, _weights: _Weights) -> None:
    lib.llama_free(context)  # before the weights, which this call's frame still holds
    lib.llama_batch_free(batch)


def device_of(n_gpu_layers: int = 0, device: str | None = None) -> str:
    """Where a model's layers are: 'CPU', or the other device's name."""
    return (device or "GPU") if n_gpu_layers and native.gpu_offload() else "CPU"

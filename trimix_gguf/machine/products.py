"""What a running model multiplies its weights with, product by product.

llama.cpp calls back for every node of its graph (`cb_eval`), as it does for its own tools/imatrix.
Source: struct ggml_tensor in ggml/include/ggml.h, ggml_backend_sched_eval_callback.
"""

import ctypes
import math
import time
from collections.abc import Callable, Collection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trimix_gguf.errors import ModelError
from trimix_gguf.machine.native import lib, libggml

# (name of the weights, rows [n, n_in], which matrix of a stack each row meets [n])
Take = Callable[[str, NDArray[np.float32], NDArray[np.intp]], None]
_LAST = b"result_norm"  # the node before the output layer
_OBJECT_BYTES = 32  # what ggml_tensor_overhead() counts besides the tensor itself


class _Tensor(ctypes.Structure):
    """ggml_tensor: sizes `ne` and strides `nb` in bytes, both innermost first."""


_Tensor._fields_ = [
    ("type", ctypes.c_int),
    ("buffer", ctypes.c_void_p),
    ("ne", ctypes.c_int64 * 4),
    ("nb", ctypes.c_size_t * 4),
    ("op", ctypes.c_int),
    ("op_params", ctypes.c_int32 * 16),
    ("flags", ctypes.c_int32),
    ("src", ctypes.POINTER(_Tensor) * 10),
    ("view_src", ctypes.c_void_p),
    ("view_offs", ctypes.c_size_t),
    ("data", ctypes.c_void_p),
    ("name", ctypes.c_char * 64),
    ("extra", ctypes.c_void_p),
    ("padding", ctypes.c_char * 8),
]


class Watch:
    """Gives `take` the rows that a context multiplies its `weights` with.

    For `Model(watch=...)`. The output layer is not computed, so the logits mean nothing. `take` is
    called on the thread that decodes; what it raises, `check` raises after the decode. Raises
    ModelError where this llama.cpp's tensors have another form.
    """

    def __init__(self, weights: Collection[str], take: Take) -> None:
        _check_form()
        libggml.ggml_op_name.restype = ctypes.c_char_p
        libggml.ggml_nbytes.restype = ctypes.c_size_t
        libggml.ggml_nbytes.argtypes = [ctypes.c_void_p]
        libggml.ggml_backend_tensor_get.argtypes = [ctypes.c_void_p] * 2 + [ctypes.c_size_t] * 2
        libggml.ggml_backend_tensor_get.restype = None
        self._weights, self._take = frozenset(weights), take
        self._error: BaseException | None = None
        self.callback = lib.ggml_backend_sched_eval_callback(self._called)

    def check(self) -> None:
        """Raise what went wrong in the last decode: ctypes lets nothing through."""
        if (error := self._error) is not None:
            self._error = None
            raise error

    def _called(self, address: int, ask: bool, _: Any) -> bool:
        """llama.cpp's two calls for a node: whether we want it, and then (False ends) its data."""
        if self._error is not None:
            return False
        try:
            node = _Tensor.from_address(address)
            if node.name == _LAST:
                return ask  # wanted; and then enough: what follows is the output layer
            name = self._weights_of(node)
            if not ask and name is not None:
                self._take(name, *_rows(node))
            return not ask or name is not None
        except BaseException as error:
            self._error = error
            return False

    def _weights_of(self, node: _Tensor) -> str | None:
        """The name of the weights in a product that is watched; None for any other node."""
        if libggml.ggml_op_name(node.op) not in (b"MUL_MAT", b"MUL_MAT_ID"):
            return None
        name = node.src[0].contents.name.decode("utf-8", "replace")
        name = name.partition("#")[2].partition("#")[0] or name  # CUDA0#blk.0.attn_k.weight#0
        is_float = node.src[1].contents.type == lib.GGML_TYPE_F32
        return name if is_float and name in self._weights else None


class OutputClock:
    """Notes when the last decode began its output layer, on time.perf_counter's scale.

    For `Model(watch=...)`. Raises ModelError as Watch does.
    """

    def __init__(self) -> None:
        _check_form()
        self.began = -math.inf
        self.callback = lib.ggml_backend_sched_eval_callback(self._called)

    def _called(self, address: int, ask: bool, _: Any) -> bool:
        is_last = ctypes.string_at(address + _Tensor.name.offset, len(_LAST) + 1) == _LAST + b"\0"
        if is_last and not ask:  # it was computed, and the output layer comes now
            self.began = time.perf_counter()
        return is_last or not ask


def _check_form() -> None:
    """Raise ModelError where this llama.cpp's tensors have another form."""
    libggml.ggml_tensor_overhead.restype = ctypes.c_size_t
    n_bytes = libggml.ggml_tensor_overhead() - _OBJECT_BYTES
    if n_bytes != ctypes.sizeof(_Tensor):
        raise ModelError(
            f"this llama.cpp has tensors of {n_bytes} bytes, expected "
            f"{ctypes.sizeof(_Tensor)}; install the llama-cpp-python that trimix names"
        )


def _rows(node: _Tensor) -> tuple[NDArray[np.float32], NDArray[np.intp]]:
    """The rows of a product's input [n, n_in], and which matrix of a stack each meets [n]."""
    weights, inputs = node.src[0].contents, _values(node.src[1].contents, np.float32)
    if libggml.ggml_op_name(node.op) == b"MUL_MAT":
        of_3, of_2 = (np.arange(n) for n in inputs.shape[:2])
        which = (of_3[:, None] % weights.ne[3]) * weights.ne[2] + of_2 % weights.ne[2]
        which = np.broadcast_to(which[:, :, None], inputs.shape[:3])
    else:  # experts: [1, n_tokens, 1 or n_used, n_in] and the chosen ones [n_tokens, n_used]
        which = _values(node.src[2].contents, np.int32)[0, 0]
        inputs = inputs[0][:, np.arange(which.shape[1]) % inputs.shape[2]]
    return inputs.reshape(-1, inputs.shape[-1]), which.ravel().astype(np.intp)


def _values(tensor: _Tensor, dtype: type) -> NDArray[Any]:
    """A copy of a tensor's data, from whichever device, outermost size first."""
    address = ctypes.addressof(tensor)
    raw = np.empty(libggml.ggml_nbytes(address), np.uint8)
    libggml.ggml_backend_tensor_get(address, raw.ctypes.data, 0, raw.nbytes)
    return np.ndarray(tuple(tensor.ne)[::-1], dtype, raw, strides=tuple(tensor.nb)[::-1])

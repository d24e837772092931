"""llama.cpp's own logits of a GGUF, as exact as it gives them."""

import numpy as np

# Imported whole, llama_cpp takes llama.cpp's log over, and cannot decode all of it.
from trimix_gguf.machine.native import lib as llama_cpp


def load(path, **options):
    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_default_params()
    for name, value in options.items():
        setattr(params, name, value)
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
    assert model, f"llama.cpp refused {path}"
    return model


def llama_logits(path, ids, adapter=None):
    """Return llama.cpp's logits [n_tokens, n_vocab] in float32 throughout, one decode each."""
    model = load(path)
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_threads, params.n_threads_batch = 256, 1, 1
    # A float16 cache or flash attention alone differs by 0.04, far more than float32 does.
    params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
    context = llama_cpp.llama_init_from_model(model, params)
    if adapter is not None:
        loaded = llama_cpp.llama_adapter_lora_init(model, str(adapter).encode())
        assert loaded, f"llama.cpp refused {adapter}"
        handles = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(loaded)
        scales = (llama_cpp.ctypes.c_float * 1)(1.0)
        assert llama_cpp.llama_set_adapters_lora(context, handles, 1, scales) == 0
    n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    rows = []
    for token in ids:
        batch = llama_cpp.llama_batch_get_one((llama_cpp.llama_token * 1)(token), 1)
        assert llama_cpp.llama_decode(context, batch) == 0
        pointer = llama_cpp.llama_get_logits_ith(context, -1)
        rows.append(np.ctypeslib.as_array(pointer, shape=(n_vocab,)).copy())
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)
    return np.stack(rows)

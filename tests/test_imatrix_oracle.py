"""Importance matrices against transformers: the squares of what each Linear gets, summed."""

from functools import partial

import numpy as np
import pytest

from trimix_gguf.convert.architectures import ARCHITECTURES
from trimix_gguf.convert.calibration import calibrate
from trimix_gguf.convert.hf import convert_hf
from trimix_gguf.convert.tokenizer_bpe import QWEN2_SPLIT
from trimix_gguf.machine.loading import Loading
from trimix_gguf.trio.model import Model

torch = pytest.importorskip("torch", reason="the oracle needs torch")
pytest.importorskip("transformers", reason="the oracle needs transformers")
pytest.importorskip("tokenizers", reason="the oracle's tokenizer needs tokenizers")

from tiny_checkpoints import LINES, save_model, save_tokenizer  # noqa: E402

N_CTX, N_CHUNKS = 96, 3
# Of a matrix's largest sum; ggml has Gemma's GELU in a table of float16.
TOLERANCES = {"gemma3": 1e-3}


def sums_of_squares(model, chunks):
    """Module name -> [n_in] sums over every token of every chunk, by hooks on each Linear."""
    sums = {}

    def add(name):
        def hook(module, inputs):
            x = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).double()
            sums[name] = sums.get(name, 0) + (x**2).sum(dim=0).numpy()

        return hook

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(add(name))
        elif type(module).__name__.endswith("Experts"):
            module.register_forward_pre_hook(experts(name, sums))
        elif type(module).__name__.endswith("Router"):
            module.register_forward_pre_hook(add(name))
    with torch.no_grad():
        for chunk in chunks:
            model(input_ids=torch.tensor([chunk]))
    return sums


def experts(name, sums):
    """The same for a stack of experts, by the router's choice: [n_expert, n_in], and the counts."""

    def hook(module, inputs):
        hidden, chosen, _ = inputs
        for i in range(module.num_experts):
            x = hidden[(chosen == i).any(dim=-1)]
            gate, up = (x @ module.gate_up_proj[i].T).chunk(2, dim=-1)
            for part, rows in (("up", x), ("gate", x), ("down", module.act_fn(gate) * up)):
                stack = sums.setdefault(f"{name}.{{}}.{part}_proj", [0] * module.num_experts)
                stack[i] = stack[i] + (rows.detach().double() ** 2).sum(dim=0).numpy()
            counts = sums.setdefault(f"{name}.counts", [0] * module.num_experts)
            counts[i] += len(x)

    return hook


@pytest.mark.parametrize("name", ["llama untied", "llama biased", "qwen2", "qwen3moe", "gemma3"])
def test_sums_equal_those_of_transformers(tmp_path, monkeypatch, name):
    # With a float16 cache they are 1e-3 off, and a router's near tie goes to another expert.
    exact = partial(Loading, type_k="f32", type_v="f32")
    monkeypatch.setattr("trimix_gguf.convert.calibration.Loading", exact)
    oracle = save_model(tmp_path, name)
    save_tokenizer(tmp_path, QWEN2_SPLIT)
    gguf, text = tmp_path / "m.gguf", tmp_path / "text.txt"
    convert_hf(tmp_path, gguf, type="f32")
    text.write_bytes("\n".join(LINES * 4).encode())
    found = calibrate(gguf, [text], tmp_path / "i.gguf", n_tokens=N_CHUNKS * N_CTX, n_ctx=N_CTX)
    model = Model(gguf)
    ids = [*model.bos, *model.tokenize(text.read_bytes().decode())]
    chunks = [ids[i : i + N_CTX] for i in range(0, N_CHUNKS * N_CTX, N_CTX)]
    chunks = [[*model.bos, *chunk[len(model.bos) :]] for chunk in chunks]
    model.close()
    expected = sums_of_squares(oracle, chunks)
    layer_modules = ARCHITECTURES[type(oracle).__name__].layer_modules
    n_compared = 0
    for module, (target, sizes) in layer_modules.items():
        for i in range(oracle.config.num_hidden_layers) if len(sizes) > 1 else ():
            key = f"blk.{i}.{target}.weight"
            sums = np.array(expected[f"model.layers.{i}.{module}"])
            assert found.counts[key].sum() == N_CHUNKS * N_CTX * (1 if sums.ndim == 1 else 2), key
            scale = np.abs(sums).max(axis=-1, keepdims=True)
            difference = np.abs(found.sums[key] - sums) / scale
            print(f"{key}: largest difference {difference.max():.1e} of the largest sum")
            assert difference.max() < TOLERANCES.get(name, 1e-4), key
            if sums.ndim == 2:
                counts = expected[f"model.layers.{i}.mlp.experts.counts"]
                assert found.counts[key].tolist() == counts
            n_compared += 1
    assert n_compared == len(found.sums) >= 14

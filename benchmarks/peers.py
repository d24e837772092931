"""One prompt, answered by one peer in a process of its own: its times, memory and tokens.

    python benchmarks/peers.py PEER JOB.json

benchmarks/against_peers.py writes the job and reads the last line, JSON. The transformers peers
import nothing of trimix_gguf: they may run by a Python that has torch alone. Linux: memory comes
from /proc. Every peer reads the same ids, decodes greedily by the weights that it chose, skips a
model whose coefficient is 0, and gives exactly `n_tokens`: ids that end a text do not end it.
"""

import importlib.metadata
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

Job = dict[str, Any]  # ids, n_tokens, n_ctx, n_threads, grid, files (GGUF) and hf (folders)


def main() -> None:
    """Measure, and print; the last line is JSON."""
    name, path = sys.argv[1:]
    job = json.loads(Path(path).read_text(encoding="utf-8"))
    meter = Meter()
    PEERS[name](job, meter)
    print(json.dumps(meter.figures()))


class Meter:
    """The clock and the memory of one prompt, from its ids to the last token."""

    def __init__(self) -> None:
        self.created = time.perf_counter()
        self.weights: tuple[float, float] | None = None
        self.chosen: float | None = None
        self.tokens: list[int] = []
        self.times: list[float] = []
        self.acceptance: float | None = None  # of drafted tokens

    def start(self) -> None:
        """The models are loaded; what follows is the prompt's."""
        self.loading_peak, self.loaded = memory("VmHWM"), memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from VmRSS
        self.started = time.perf_counter()

    def choose(self, alpha: float, beta: float) -> None:
        """The weights, and when they were chosen."""
        self.weights, self.chosen = (alpha, beta), time.perf_counter()

    def token(self, token: int) -> None:
        """One more token, and when it came."""
        self.tokens.append(token)
        self.times.append(time.perf_counter())

    def figures(self) -> dict[str, Any]:
        """Seconds from the start of the prompt, and bytes; `extra` is over the loaded models."""
        peak, first, last = memory("VmHWM"), self.times[0], self.times[-1]
        packages = ("torch", "transformers", "peft", "llama_cpp")
        return {
            "load_s": self.started - self.created,
            "select_s": self.chosen and self.chosen - self.started,
            "ttft_s": first - self.started,
            "decode_tps": (len(self.times) - 1) / (last - first),
            "total_s": last - self.started,
            "loaded": self.loaded,
            "peak": max(peak, self.loading_peak),
            "extra": peak - self.loaded,
            "weights": self.weights,
            "acceptance": self.acceptance,
            "tokens": self.tokens,
            "versions": {
                name: importlib.metadata.version(name.replace("llama_cpp", "llama-cpp-python"))
                for name in packages
                if name in sys.modules
            },
        }


def memory(field: str) -> int:
    """Bytes of one field of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status has no {field}")


def decode(job: Job, meter: Meter, weights: tuple[float, float], rows: Any, read: Any) -> None:
    """Greedy, one token through each active model; `read(role, token)` is its next row [n_vocab].

    `rows` follow the prompt, role -> [n_vocab], in NumPy or torch.
    """
    alpha, beta = weights
    mix = {"large_ins": alpha, "small_cpt": beta, "small_base": round(1 - alpha - beta, 9)}
    mix = {role: c for role, c in mix.items() if c != 0}
    for step in range(job["n_tokens"]):
        if step > 0:
            rows = {role: read(role, meter.tokens[-1]) for role in mix}
        meter.token(int(sum(c * rows[role] for role, c in mix.items()).argmax()))


# -- llama.cpp by its high-level class ------------------------------------------------------


def llama_objects(job: Job, meter: Meter) -> None:
    """Three llama_cpp.Llama that keep all logits, and NumPy over whole arrays."""
    from llama_cpp import Llama

    options = {
        "n_ctx": job["n_ctx"],
        "n_threads": job["n_threads"],
        "n_threads_batch": job["n_threads"],
        "logits_all": True,
        "verbose": False,
    }
    files, ids = job["files"], job["ids"]
    cpt = files["small_cpt"] or files["small_base"]
    large_ins = Llama(model_path=files["large_ins"], **options)
    small_base = Llama(model_path=files["small_base"], **options)
    small_cpt = Llama(model_path=cpt, lora_path=files["small_cpt_lora"], **options)
    models = {"large_ins": large_ins, "small_cpt": small_cpt, "small_base": small_base}
    n_vocab = min(model.n_vocab() for model in models.values())
    meter.start()
    for model in models.values():
        model.eval(ids)
    prompt_rows = [model.scores[: len(ids) - 1, :n_vocab] for model in models.values()]
    weights = lowest_perplexity(*prompt_rows, np.asarray(ids[1:]), job["grid"])
    meter.choose(*weights)

    def last_row(role: str) -> np.ndarray:
        return models[role].scores[models[role].n_tokens - 1, :n_vocab]

    def read(role: str, token: int) -> np.ndarray:
        models[role].eval([token])
        return last_row(role)

    decode(job, meter, weights, {role: last_row(role) for role in models}, read)


def lowest_perplexity(
    large_ins: np.ndarray,
    small_cpt: np.ndarray,
    small_base: np.ndarray,
    targets: np.ndarray,
    grid: list[float],
) -> tuple[float, float]:
    """One log-softmax a grid point over logits [n_tokens, n_vocab]."""
    tokens, nll = np.arange(len(targets)), {}
    for a, b in product(grid, grid):
        fused = a * large_ins + b * small_cpt + (1 - a - b) * small_base
        fused -= fused.max(axis=-1, keepdims=True)
        picked = fused[tokens, targets]
        nll[a, b] = (np.log(np.exp(fused).sum(axis=-1)) - picked).mean()
    return min(nll, key=nll.__getitem__)


# -- transformers ---------------------------------------------------------------------------


def transformers(job: Job, meter: Meter, *, dtype: str) -> None:
    """Three transformers models in step, each with its cache, and the grid in torch."""
    import torch
    from torch.nn.functional import cross_entropy

    torch.set_num_threads(job["n_threads"])
    torch.set_grad_enabled(False)
    ids, grid = job["ids"], job["grid"]
    models = hf_models(job["hf"], getattr(torch, dtype))
    meter.start()
    outputs = {role: model(torch.tensor([ids]), use_cache=True) for role, model in models.items()}
    caches = {role: out.past_key_values for role, out in outputs.items()}
    n_vocab = min(out.logits.shape[-1] for out in outputs.values())
    logits = {role: out.logits[0, :, :n_vocab].float() for role, out in outputs.items()}
    del outputs  # in bfloat16 its logits are a second copy
    large_ins, small_cpt, small_base = (logits[role][:-1] for role in models)
    targets, nll = torch.tensor(ids[1:]), {}
    for a, b in product(grid, grid):
        fused = a * large_ins + b * small_cpt + (1 - a - b) * small_base
        nll[a, b] = float(cross_entropy(fused, targets))
    weights = min(nll, key=nll.__getitem__)
    meter.choose(*weights)

    def read(role: str, token: int) -> Any:
        out = models[role](torch.tensor([[token]]), past_key_values=caches[role], use_cache=True)
        return out.logits[0, -1, :n_vocab].float()

    decode(job, meter, weights, {role: logits[role][-1] for role in models}, read)


def hf_models(folders: dict[str, str | None], dtype: Any) -> dict[str, Any]:
    """In formula order; an adapter is merged in float32, as rounding would eat small changes."""
    import torch
    from transformers import AutoModelForCausalLM

    def load(folder: str | None, dtype: Any) -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()

    # small_cpt first: what merging needs is free again before the others come.
    if folders["small_cpt_lora"]:
        from peft import PeftModel

        base = load(folders["small_base"], torch.float32)
        adapted = PeftModel.from_pretrained(base, folders["small_cpt_lora"])
        small_cpt = adapted.merge_and_unload().to(dtype).eval()
    else:
        small_cpt = load(folders["small_cpt"], dtype)
    large_ins, small_base = (load(folders[r], dtype) for r in ("large_ins", "small_base"))
    models = {"large_ins": large_ins, "small_cpt": small_cpt, "small_base": small_base}
    for parameter in (p for model in models.values() for p in model.parameters()):
        parameter.flatten()[::1024].sum()  # weights may be mapped: every page counts as loaded
    return models


# -- ours -----------------------------------------------------------------------------------


def trimix(job: Job, meter: Meter, *, speculative: str) -> None:
    """What `trimix generate --temperature 0` does."""
    from trimix_gguf.answering.generation import stream_generate
    from trimix_gguf.trio.prompt import Prompt, Segment
    from trimix_gguf.trio.trio import Trio

    with Trio.load(**job["files"], n_ctx=job["n_ctx"]) as trio:
        meter.start()
        if trio.end_of_generation:  # found within the time, as for every user, then left out
            trio.end_of_generation = frozenset()
        for chunk in stream_generate(
            trio,
            Prompt((Segment.of(job["ids"]),)),
            max_tokens=job["n_tokens"],
            temperature=0.0,
            speculative=speculative,
            on_selection=lambda s: meter.choose(s.weights.alpha, s.weights.beta),
        ):
            for token in chunk.tokens:
                meter.token(token.id)
            meter.acceptance = chunk.speed.get("acceptance")


def large_ins(job: Job, meter: Meter) -> None:
    """large_ins alone: nothing to choose, nothing to mix."""
    from trimix_gguf.machine.loading import Loading
    from trimix_gguf.trio.model import Model

    # llama.cpp's own batch.
    model = Model(job["files"]["large_ins"], Loading(n_ctx=job["n_ctx"], n_batch=512))
    ids, size = job["ids"], model.n_batch
    meter.start()
    for start in range(0, len(ids), size):
        row = model.decode(ids[start : start + size])[-1]
    decode(job, meter, (1.0, 0.0), {"large_ins": row}, lambda _, token: model.decode([token])[-1])


PEERS: dict[str, Callable[[Job, Meter], None]] = {
    "llama_objects": llama_objects,
    "transformers_f32": partial(transformers, dtype="float32"),
    "transformers_bf16": partial(transformers, dtype="bfloat16"),
    "trimix_lockstep": partial(trimix, speculative="off"),
    "trimix_speculative": partial(trimix, speculative="auto"),
    "large_ins": large_ins,
}


if __name__ == "__main__":
    main()

"""The model in training: which of its numbers change, and its loss over the tokens that occur."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from trimix_gguf.adapting.extras import need, quiet
from trimix_gguf.adapting.outlook import RANK
from trimix_gguf.adapting.rows import Rows

if TYPE_CHECKING:
    import torch

ALPHA_OF_RANK = 2.0  # the scale of B·A: alpha = 2 √rank where it is divided by √rank


def add_adapter(model: Any, rank: int = RANK, *, embeddings: bool = False) -> Any:
    """Put rank-stabilised LoRA pairs on all linear layers, in float32; the rest is frozen.

    With `embeddings` on the embeddings and the output layer too; one pair for both where they
    are one matrix.
    """
    peft = need("peft")
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=ALPHA_OF_RANK * math.sqrt(rank),
        use_rslora=True,
        target_modules=_with_embeddings(model) if embeddings else "all-linear",
        lora_dropout=0.0,
        bias="none",
    )
    with quiet():
        adapted = peft.get_peft_model(model, config)
    for module in adapted.modules():
        # Else PEFT makes a float32 copy of what each pair reads, and keeps it until the way back.
        if hasattr(module, "cast_input_dtype_enabled"):
            module.cast_input_dtype_enabled = False
    if embeddings:
        _prepare_embeddings(adapted.get_base_model())
    return adapted


def _with_embeddings(model: Any) -> list[str]:
    """Names of all linear layers and the embeddings; a head that is the embeddings stays out."""
    linear = need("torch").nn.Linear
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head if head.weight is table.weight else None
    return [
        name
        for name, module in model.named_modules()
        if module is table or (isinstance(module, linear) and module is not tied)
    ]


def _prepare_embeddings(whole: Any) -> None:
    """Make the first step as small as that of a linear layer, and let a tied head follow."""
    torch = need("torch")
    table, head = whole.get_input_embeddings(), whole.get_output_embeddings()
    with torch.no_grad():  # PEFT draws from a normal distribution: sixty times too large
        for numbers in table.lora_embedding_B.values():
            numbers *= 1 / math.sqrt(3 * len(numbers))

    def follow(_: Any, given: Any, result: Any) -> Any:
        changed = _change_of_tied(whole)
        if changed is None:
            return result
        a, b = changed
        return result + (given[0].to(b.dtype) @ b @ a).to(result.dtype)

    if not hasattr(head, "lora_A"):
        head.register_forward_hook(follow)


def _change_of_tied(whole: Any) -> tuple[Any, Any] | None:
    """A [r, n_vocab], B [n_embd, r] of the embeddings' pair, scaled; None where there is none."""
    table = whole.get_input_embeddings()
    if not hasattr(table, "lora_embedding_A"):  # as after merging
        return None
    ((name, a),) = table.lora_embedding_A.items()
    return a * table.scaling[name], table.lora_embedding_B[name]


def head_rows(whole: Any, ids: Any) -> Any:
    """The output layer's rows of some ids [n, n_embd], with what pairs add to them."""
    head = whole.get_output_embeddings()
    rows = head.weight[ids]
    if hasattr(head, "lora_A"):
        ((name, b),) = head.lora_B.items()
        return rows + head.scaling[name] * (b.weight[ids] @ head.lora_A[name].weight)
    changed = _change_of_tied(whole)
    if changed is None:
        return rows
    a, b = changed
    return rows + (b @ a[:, ids]).T


def inner_model(model: Any) -> Any:
    """The transformers model, below PEFT's where that is around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def trained_numbers(model: Any) -> dict[str, torch.Tensor]:
    """The parameters that change, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def make_taught(model: Any, rows: Rows) -> Any:
    """A torch module: (ids, counts) [n_rows, n_block] -> the mean loss over `rows`' own tokens.

    Other tokens of the vocabulary would take a third to a half of the time, most of it for
    scripts that the text never has.
    """
    torch = need("torch")
    occurring = torch.from_numpy(np.unique(np.asarray(rows.ids)).astype(np.int64))

    class Taught(torch.nn.Module):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = model
            self.register_buffer("occurring", occurring, persistent=False)

        def forward(self, ids: Any, counts: Any) -> Any:
            whole = inner_model(self.model)
            decoder = getattr(whole, whole.base_model_prefix)
            hidden = decoder(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
            head = head_rows(whole, self.occurring)
            logits = torch.nn.functional.linear(hidden, head.to(hidden.dtype)).float()
            targets = torch.searchsorted(self.occurring, ids[:, 1:].contiguous())
            nll = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), targets.flatten(), reduction="none"
            )
            weights = counts[:, 1:].flatten().float()
            return nll @ weights / weights.sum()

    return Taught()


def products_per_second(n_in: int, n_out: int, n_rows: int = 512) -> dict[str, float]:
    """Multiplications and additions per second in each type that can be trained in, measured.

    It takes about a second. On a graphics card, bfloat16 is listed where PyTorch says it has it.
    """
    torch = need("torch")
    on_card = torch.cuda.is_available()
    names = ["float32", "bfloat16"]
    if not (torch.cuda.is_bf16_supported() if on_card else torch.backends.mkldnn.is_available()):
        names.remove("bfloat16")
    found = {}
    for name in names:
        options = {"dtype": getattr(torch, name), "device": "cuda" if on_card else "cpu"}
        a, b = torch.ones(n_rows, n_in, **options), torch.ones(n_out, n_in, **options)
        times = []
        for _ in range(8):
            started = time.perf_counter()
            float(torch.nn.functional.linear(a, b)[0, 0])  # waits for a card
            times.append(time.perf_counter() - started)
        found[name] = 2 * n_rows * n_in * n_out / min(times)
    return found


def faster_dtype(products: Mapping[str, float]) -> str:
    """'bfloat16' where it is clearly faster than float32."""
    return "bfloat16" if products.get("bfloat16", 0) > 1.25 * products["float32"] else "float32"

"""Teach a small model a language by LoRA on raw and parallel text: a stronger small_cpt.

    python benchmarks/train_adapter.py --base BASE.gguf --start PEFT_DIR --data DATA -o OUT \\
        [--tokens 250000] [--exercises 0.45]

Continues the PEFT adapter START of the dequantized BASE (`pip install -e '.[oracle]'`) on Kazakh
paragraphs, sentence pairs and some English, so that the language is learned and English is not
forgotten, and on exercises made of them (teaching_text.py), so that it goes on to answer as
exemplars do. A run that was stopped goes on where it was. OUT gets `base`, a checkpoint folder, and
`adapter`: `trimix convert lora OUT/adapter --base OUT/base -o kk.gguf`. The batches are large:
with glibc, MALLOC_ARENA_MAX=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184 keep their
memory, which some machines take long to give anew.
"""

import argparse
import math
import random
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from peft import PeftModel
from teaching_text import Pieces, documents
from transformers import AutoModelForCausalLM, AutoTokenizer

BLOCK = 512  # tokens in a step's row, which holds most exercises whole
LEARNING_RATE = 3e-4
SAVE_EVERY_S = 300


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base", type=Path, required=True, metavar="GGUF")
    parser.add_argument("--start", type=Path, required=True, metavar="PEFT_DIR")
    parser.add_argument("--data", type=Path, required=True, help="holds corpus/ and parallel/")
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=250_000)
    parser.add_argument("--exercises", type=float, default=0.0, metavar="SHARE", help="of the text")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    source = {"pretrained_model_name_or_path": options.base.parent, "gguf_file": options.base.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    base = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    base.hf_quantizer = None  # it was dequantized in loading; else it cannot be saved
    base.config.__dict__.pop("quantization_config", None)
    base.save_pretrained(options.out / "base")
    tokenizer.save_pretrained(options.out / "base")
    model = PeftModel.from_pretrained(base, options.start, is_trainable=True)
    texts = documents(options.data, random.Random(options.seed), options.exercises)
    rows = list(islice(blocks(tokenizer, texts), options.tokens // BLOCK))
    ids, counts = (torch.tensor(part) for part in zip(*rows, strict=True))
    train(model, ids, counts, options)


def blocks(
    tokenizer: AutoTokenizer, texts: Iterator[Pieces]
) -> Iterator[tuple[list[int], list[float]]]:
    """Rows of BLOCK ids and what each counts, documents end to end."""
    ids: list[int] = []
    counts: list[float] = []
    for pieces in texts:
        for text, count in pieces:
            found = tokenizer(text, add_special_tokens=False)["input_ids"]
            ids += found
            counts += [count] * len(found)
        ids.append(tokenizer.eos_token_id)
        counts.append(1.0)
        while len(ids) >= BLOCK:
            yield ids[:BLOCK], counts[:BLOCK]
            ids, counts = ids[BLOCK:], counts[BLOCK:]


def train(
    model: PeftModel, rows: torch.Tensor, counts: torch.Tensor, options: argparse.Namespace
) -> None:
    """On `rows` of ids, of shape (steps, tokens), against the ids that are in them.

    All 151,936 would take a third to a half of the time, most of it for scripts never seen here.
    `counts`, of the same shape: what a token counts in its row's mean loss.
    """
    ids, targets = torch.unique(rows, return_inverse=True)
    inner = model.get_base_model()
    unembedding = inner.lm_head.weight.detach()[ids].T.contiguous()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(
        trained.values(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0
    )
    n_steps, state_file = len(rows), options.out / "state.pt"
    first = 0
    if state_file.exists():
        state = torch.load(state_file)
        model.load_state_dict(state["trained"], strict=False)
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]

    def save(step: int) -> None:
        part = state_file.with_suffix(".part")
        state = {"trained": trained, "optimizer": optimizer.state_dict(), "step": step}
        torch.save(state, part)
        part.replace(state_file)

    started = saved = time.monotonic()
    running = None
    for step in range(first, n_steps):
        optimizer.param_groups[0]["lr"] = learning_rate(step, n_steps)
        hidden = inner.model(input_ids=rows[step : step + 1]).last_hidden_state[0]
        logits = hidden[:-1] @ unembedding
        nll = torch.nn.functional.cross_entropy(logits, targets[step, 1:], reduction="none")
        loss = nll @ counts[step, 1:] / counts[step, 1:].sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        value = loss.item()
        running = value if running is None else 0.95 * running + 0.05 * value
        now = time.monotonic()
        if step % 5 == 0:
            rate = (step + 1 - first) / (now - started)
            left = (n_steps - step - 1) / rate / 60
            print(
                f"step {step}/{n_steps} loss {running:.3f} "
                f"{rate * BLOCK:.0f} tokens/s, {left:.0f} min left",
                flush=True,
            )
        if now - saved > SAVE_EVERY_S:
            save(step + 1)
            saved = now
    model.save_pretrained(options.out / "adapter")
    state_file.unlink(missing_ok=True)


def learning_rate(step: int, n_steps: int) -> float:
    """Linear warm-up over 20 steps, then a cosine down to 5 %."""
    slope = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / n_steps))
    return LEARNING_RATE * min(1, (step + 1) / 20) * slope


if __name__ == "__main__":
    main()

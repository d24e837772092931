"""Teach a small model a language by LoRA on raw and parallel text: a stronger small_cpt.

    python benchmarks/train_adapter.py --base BASE.gguf --start PEFT_DIR --data DATA -o OUT \\
        [--tokens 250000]

Continues the PEFT adapter START of the dequantized BASE (`pip install -e '.[oracle]'`) on Kazakh
paragraphs, sentence pairs and some English, so that the language is learned and English is not
forgotten; no task's questions and no labels. A run that was stopped goes on where it was. OUT gets
`base`, a checkpoint folder, and `adapter`: `trimix convert lora OUT/adapter --base OUT/base -o
kk.gguf`. The batches are large: with glibc, MALLOC_ARENA_MAX=1 MALLOC_MMAP_MAX_=0
MALLOC_TRIM_THRESHOLD_=17179869184 keep their memory, which some machines take long to give anew.
"""

import argparse
import csv
import math
import random
import re
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

BLOCK, ROWS = 256, 2  # tokens in a row of a batch, rows
LEARNING_RATE = 3e-4
MIX = {"pairs": 0.55, "kazakh": 0.35, "english": 0.1}  # of the documents' characters
SAVE_EVERY_S = 300


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base", type=Path, required=True, metavar="GGUF")
    parser.add_argument("--start", type=Path, required=True, metavar="PEFT_DIR")
    parser.add_argument("--data", type=Path, required=True, help="holds corpus/ and parallel/")
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=250_000)
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
    n_steps = options.tokens // (BLOCK * ROWS)
    text = blocks(tokenizer, options.data, options.seed)
    train(model, torch.tensor([*islice(text, n_steps * ROWS)]).view(n_steps, ROWS, BLOCK), options)


def train(model: PeftModel, batches: torch.Tensor, options: argparse.Namespace) -> None:
    """On `batches`, ids of shape (steps, rows, tokens), against the ids that are in them.

    All 151,936 would take a third to a half of the time, most of it for scripts never seen here.
    """
    ids, targets = torch.unique(batches, return_inverse=True)
    inner = model.get_base_model()
    unembedding = inner.lm_head.weight.detach()[ids].T.contiguous()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(
        trained.values(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0
    )
    n_steps, state_file = len(batches), options.out / "state.pt"
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
        hidden = inner.model(input_ids=batches[step]).last_hidden_state
        logits = hidden[:, :-1] @ unembedding
        wanted = targets[step, :, 1:]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten())
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
                f"{rate * BLOCK * ROWS:.0f} tokens/s, {left:.0f} min left",
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


# -- text -----------------------------------------------------------------------------------


def blocks(tokenizer: AutoTokenizer, data: Path, seed: int) -> Iterator[list[int]]:
    """Rows of BLOCK ids, documents end to end."""
    end, ids = tokenizer.eos_token_id, []
    for text in documents(data, random.Random(seed)):
        ids += [*tokenizer(text, add_special_tokens=False)["input_ids"], end]
        while len(ids) >= BLOCK:
            yield ids[:BLOCK]
            ids = ids[BLOCK:]


def documents(data: Path, rng: random.Random) -> Iterator[str]:
    """One after another, whichever kind is furthest behind its share; for ever."""
    kinds = {
        "pairs": around(pair_documents(data, rng), rng),
        "kazakh": around(paragraphs([data / "corpus/kk/train.txt"], 6), rng),
        "english": around(paragraphs(sorted((data / "corpus/en").glob("*-*.txt")), 6), rng),
    }
    read = dict.fromkeys(kinds, 0)
    while True:
        kind = min(kinds, key=lambda k: read[k] / MIX[k])
        text = next(kinds[kind])
        read[kind] += len(text)
        yield text


def around(texts: list[str], rng: random.Random) -> Iterator[str]:
    while True:
        yield from rng.sample(texts, len(texts))


def paragraphs(files: list[Path], n_lines: int) -> list[str]:
    lines = [
        line.strip()
        for file in files
        for line in file.read_text(encoding="utf-8").splitlines()
        if len(line.split()) > 3
    ]
    return [" ".join(lines[i : i + n_lines])[:1500] for i in range(0, len(lines), n_lines)]


def pair_documents(data: Path, rng: random.Random) -> list[str]:
    """Four aligned pairs each, one direction a document, every pair in both."""
    with (data / "parallel/kk-en.tsv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    good = [
        {"Kazakh": sentence(row["kk"]), "English": sentence(row["en"])}
        for row in rows
        if float(row["score"]) >= 0.5 and all(4 <= len(row[x].split()) <= 40 for x in ("kk", "en"))
    ]
    texts = []
    for source, target in (("Kazakh", "English"), ("English", "Kazakh")):
        shuffled = rng.sample(good, len(good))
        for i in range(0, len(shuffled), 4):
            texts.append(
                "\n\n".join(
                    f"{source}: {pair[source]}\n{target}: {pair[target]}"
                    for pair in shuffled[i : i + 4]
                )
            )
    return texts


def sentence(tokens: str) -> str:
    """Lower-cased words and marks apart -> a sentence as it is written."""
    text = re.sub(r" ([.,;:!?%)»])", r"\1", tokens.strip())
    text = re.sub(r"([(«]) ", r"\1", text)
    return text[:1].upper() + text[1:]


if __name__ == "__main__":
    main()

"""Teach a small model a language by LoRA on raw and parallel text: a stronger small_cpt.

    python benchmarks/train_adapter.py --base BASE.gguf --start PEFT_DIR --data DATA -o OUT \\
        [--tokens 250000] [--exercises 0.45]

Continues the PEFT adapter START of the dequantized BASE (`pip install -e '.[oracle]'`) on Kazakh
paragraphs, sentence pairs and some English, so that the language is learned and English is not
forgotten, and on exercises made of them (teaching_text.py), so that it goes on to answer as
exemplars do. A run that was stopped goes on where it was. OUT gets `base`, a checkpoint folder, and
`adapter`: `trimix convert lora OUT/adapter --base OUT/base -o kk.gguf`. The batches are large:
with glibc, MALLOC_ARENA_MAX=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184 keep their
memory, which some machines are slow to give again.
"""

import argparse
import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from peft import PeftModel
from teaching_text import Pieces, documents
from transformers import AutoModelForCausalLM, AutoTokenizer

from trimix_gguf.convert import training

BLOCK = 512  # tokens in a step's row, which holds most exercises whole
LEARNING_RATE = 3e-4


def main() -> None:
    """Prepare base, adapter and text, then train."""
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
    settings = training.Settings(LEARNING_RATE, state=options.out / "state.pt", n_steps=len(rows))

    def loss_of(step: int) -> torch.Tensor:
        hidden = inner.model(input_ids=rows[step : step + 1]).last_hidden_state[0]
        logits = hidden[:-1] @ unembedding
        nll = torch.nn.functional.cross_entropy(logits, targets[step, 1:], reduction="none")
        return nll @ counts[step, 1:] / counts[step, 1:].sum()

    def show(standing: training.Standing) -> None:
        if standing.step % 5 == 0:
            print(standing.in_words(BLOCK, len(rows)), flush=True)

    training.train(model, loss_of, settings, progress=show)
    model.save_pretrained(options.out / "adapter")
    settings.state.unlink()


if __name__ == "__main__":
    main()

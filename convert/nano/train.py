"""Train the nano trio from raw text: tokenizer, two small models, two large ones.

    python convert/nano/train.py tokenizer  --data DATA --work WORK
    python convert/nano/train.py small_base --data DATA --work WORK
    python convert/nano/train.py small_cpt  --data DATA --work WORK   # continues small_base
    python convert/nano/train.py large_base --data DATA --work WORK   # beside the small ones
    python convert/nano/train.py large_ins  --data DATA --work WORK   # continues large_base

Each model trains on `--threads` cores. After Ctrl-C it goes on where it was, after a kill where it
was a few minutes before. `make nano` runs all of it and converts the result to GGUF.
"""

import argparse
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import corpus
import numpy as np
import torch
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import LlamaConfig, LlamaForCausalLM

from trimix_gguf.convert import training
from trimix_gguf.convert.tokenizer_bpe import QWEN2_SPLIT

N_VOCAB = 6144
N_CTX = 512
N_CTX_SHORT = 256  # of rows before the rate falls: a fifth faster, and few texts are longer
TOKENS_PER_STEP = 4096
END_OF_TEXT = "<|endoftext|>"
SPECIALS = [END_OF_TEXT, corpus.USER, corpus.ASSISTANT, corpus.END]

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ '<|assistant|>' + message['content'] + '<|end|>' }}"
    "{% else %}{{ '<|user|>' + message['content'] + '<|end|>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@dataclass(frozen=True)
class Recipe:
    """Size of one model, and how long it trains."""

    n_embd: int
    n_layer: int
    n_ff: int
    n_head: int
    n_head_kv: int
    n_tokens: int  # seen in training, all epochs together
    learning_rate: float
    start: str | None = None  # role whose weights it continues


SMALL = (256, 6, 704, 4, 2)
LARGE = (384, 6, 1024, 6, 2)
RECIPES = {
    "small_base": Recipe(*SMALL, 4_000_000, 4e-3),
    "small_cpt": Recipe(*SMALL, 19_000_000, 3e-3, start="small_base"),
    "large_base": Recipe(*LARGE, 5_500_000, 4e-3),
    "large_ins": Recipe(*LARGE, 9_000_000, 3e-3, start="large_base"),
}


SHARES = {  # of each text, 1: once an epoch. small_base has the Kazakh that any web crawl holds.
    "small_base": {"english": 1, "kazakh": 0.08, "instructions": 0.2},
    "small_cpt": {"english": 0.05, "kazakh": 1, "instructions": 0.1},
    "large_base": {"english": 1, "kazakh": 1, "instructions": 0.5},
    "large_ins": {"english": 0.1, "kazakh": 1, "instructions": 0.4},
}


def documents(role: str, data: Path) -> list[str]:
    """What a role reads in an epoch."""
    seed = list(SHARES).index(role) + 1
    parts = ((getattr(corpus, text)(data, seed), share) for text, share in SHARES[role].items())
    return corpus.mix(seed, *parts)


def train_tokenizer(data: Path, work: Path) -> None:
    """Byte-level BPE over equal amounts of English and Kazakh characters."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()  # as the runtime normalizes for this pre-tokenizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            # Letters with one leading mark, single digits, punctuation runs, newlines apart.
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=N_VOCAB,
        special_tokens=[AddedToken(t, special=True, normalized=False) for t in SPECIALS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    texts = corpus.english(data, 0) + corpus.kazakh(data, 0)
    tokenizer.train_from_iterator(texts, trainer)
    work.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(work / "tokenizer.json"))


def token_stream(role: str, data: Path, work: Path) -> np.ndarray:
    """uint16 [n]: every document after an <|endoftext|>; cached beside the checkpoints."""
    cache = work / f"{role}.tokens.npy"
    if cache.exists():
        return np.load(cache, mmap_mode="r")
    tokenizer = Tokenizer.from_file(str(work / "tokenizer.json"))
    end = tokenizer.token_to_id(END_OF_TEXT)
    ids: list[int] = []
    for encoded in tokenizer.encode_batch(documents(role, data), add_special_tokens=False):
        ids.append(end)
        ids.extend(encoded.ids)
    stream = np.asarray(ids, dtype=np.uint16)
    np.save(cache, stream)
    return stream


def build(role: str, work: Path) -> LlamaForCausalLM:
    """The model of a role before its training: of random weights, or what it continues."""
    recipe = RECIPES[role]
    if recipe.start is not None:
        return LlamaForCausalLM.from_pretrained(work / recipe.start, dtype=torch.float32)
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=N_VOCAB,
        hidden_size=recipe.n_embd,
        num_hidden_layers=recipe.n_layer,
        intermediate_size=recipe.n_ff,
        num_attention_heads=recipe.n_head,
        num_key_value_heads=recipe.n_head_kv,
        max_position_embeddings=N_CTX,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config)


def batch(stream: np.ndarray, step: int, n_ctx: int) -> torch.Tensor:
    """int64 [rows, n_ctx]: blocks, shuffled again each epoch: a function of the step only."""
    n_blocks, n_rows = len(stream) // n_ctx, TOKENS_PER_STEP // n_ctx
    rows = []
    for k in range(step * n_rows, (step + 1) * n_rows):
        epoch, at = divmod(k, n_blocks)
        start = int(_order(epoch, n_blocks)[at]) * n_ctx
        rows.append(np.asarray(stream[start : start + n_ctx], dtype=np.int64))
    return torch.from_numpy(np.stack(rows))


@lru_cache(maxsize=2)
def _order(epoch: int, n_blocks: int) -> np.ndarray:
    return np.random.default_rng(epoch).permutation(n_blocks)


def train(role: str, data: Path, work: Path, scale: float = 1) -> None:
    """Train one model, and publish it."""
    recipe = RECIPES[role]
    stream = token_stream(role, data, work)
    n_steps = int(recipe.n_tokens * scale) // TOKENS_PER_STEP
    model = build(role, work)
    n_params = sum(p.numel() for p in model.parameters())
    print(
        f"{role}: {n_params:,} parameters, {len(stream):,} tokens of text, {n_steps} steps",
        flush=True,
    )
    settings = training.Settings(
        recipe.learning_rate,
        state=work / f"{role}.state.pt",
        n_steps=n_steps,
        n_warm_up=min(50, n_steps // 10 + 1),
        decay_from=int(0.6 * n_steps),
        final_share=0.03,
        betas=(0.9, 0.95),
        weight_decay=0.1,
        smoothing=0.98,
        save_every_s=180,
    )

    @torch.compile(dynamic=False)
    def loss_of_rows(ids: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(ids[:, :-1]).logits
        return torch.nn.functional.cross_entropy(
            logits.float().reshape(-1, N_VOCAB), ids[:, 1:].reshape(-1)
        )

    def loss_of(step: int) -> torch.Tensor:
        n_ctx = N_CTX_SHORT if step < settings.decay_from else N_CTX
        return loss_of_rows(batch(stream, step, n_ctx))

    def show(standing: training.Standing) -> None:
        if standing.step % 20 == 0:
            print(role, standing.in_words(TOKENS_PER_STEP, n_steps), flush=True)

    model.train()
    training.train(model, loss_of, settings, progress=show)
    publish(role, model, work)
    settings.state.unlink()


def publish(role: str, model: LlamaForCausalLM, work: Path) -> None:
    """Write a Hugging Face checkpoint folder: config, safetensors, tokenizer."""
    folder = work / role
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes((work / "tokenizer.json").read_bytes())
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": corpus.END if role == "large_ins" else END_OF_TEXT,
        "add_bos_token": True,
        "model_max_length": N_CTX,
    }
    if role == "large_ins":
        settings["chat_template"] = CHAT_TEMPLATE
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")


def main() -> None:
    """Train what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["tokenizer", *RECIPES])
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with corpus/, parallel/, eval/"
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--scale", type=float, default=1, help="of the recipe's tokens: a trial")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.what == "tokenizer":
        train_tokenizer(options.data, options.work)
    else:
        train(options.what, options.data, options.work, options.scale)


if __name__ == "__main__":
    main()

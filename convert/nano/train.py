"""Train the nano trio from raw text: tokenizer, small_base, large_base, large_ins.

    python convert/nano/train.py tokenizer  --data DATA --work WORK
    python convert/nano/train.py small_base --data DATA --work WORK
    python convert/nano/train.py large_base --data DATA --work WORK   # may run beside it
    python convert/nano/train.py large_ins  --data DATA --work WORK   # continues large_base

`trimix adapt` makes small_cpt from small_base. Each model trains on `--threads` cores. After Ctrl-C
it goes on where it was, after a kill where it was a few minutes before. `make nano` runs all of it
and converts the result to GGUF.
"""

import argparse
import json
from dataclasses import dataclass
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


RECIPES = {
    "small_base": Recipe(192, 5, 512, 6, 2, 5_000_000, 4e-3),
    "large_base": Recipe(320, 7, 832, 10, 5, 4_600_000, 3e-3),
    "large_ins": Recipe(320, 7, 832, 10, 5, 1_500_000, 1e-3, start="large_base"),
}


def documents(role: str, data: Path) -> list[str]:
    """What each role reads; the small share of Kazakh stands for what any web crawl holds."""
    if role == "small_base":
        return corpus.mix(
            1,
            (corpus.english(data, 1), 1),
            (corpus.kazakh(data, 1), 0.08),
            (corpus.instructions(data, 1), 0.2),
        )
    if role == "large_ins":  # a short second stage: instructions, and more of the language
        return corpus.mix(
            4,
            (corpus.english(data, 4), 0.1),
            (corpus.kazakh(data, 4), 0.5),
            (corpus.instructions(data, 4), 0.4),
        )
    return corpus.mix(
        3,
        (corpus.english(data, 3), 1),
        (corpus.kazakh(data, 3), 0.2),
        (corpus.instructions(data, 3), 1),
    )


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


def batch(stream: np.ndarray, step: int, n_rows: int) -> torch.Tensor:
    """int64 [n_rows, N_CTX]: blocks, shuffled again each epoch: a function of the step only."""
    n_blocks = len(stream) // N_CTX
    rows = []
    for k in range(step * n_rows, (step + 1) * n_rows):
        epoch, at = divmod(k, n_blocks)
        order = np.random.default_rng(epoch).permutation(n_blocks)
        start = int(order[at]) * N_CTX
        rows.append(np.asarray(stream[start : start + N_CTX], dtype=np.int64))
    return torch.from_numpy(np.stack(rows))


def train(role: str, data: Path, work: Path, scale: float = 1, n_rows: int = 8) -> None:
    """Train one model, and publish it."""
    recipe = RECIPES[role]
    stream = token_stream(role, data, work)
    n_steps = int(recipe.n_tokens * scale) // (n_rows * N_CTX)
    model = build(role, work)
    n_params = sum(p.numel() for p in model.parameters())
    print(
        f"{role}: {n_params:,} parameters, {len(stream):,} tokens of text, {n_steps} steps",
        flush=True,
    )
    n_warm_up = max(1, n_steps // 50)
    settings = training.Settings(
        recipe.learning_rate,
        state=work / f"{role}.state.pt",
        n_steps=n_steps,
        n_warm_up=n_warm_up,
        decay_from=n_warm_up,
        final_share=0.03,
        betas=(0.9, 0.95),
        weight_decay=0.1,
        smoothing=0.98,
        save_every_s=180,
    )

    def loss_of(step: int) -> torch.Tensor:
        ids = batch(stream, step, n_rows)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(ids).logits
        return torch.nn.functional.cross_entropy(
            logits[:, :-1].float().reshape(-1, N_VOCAB), ids[:, 1:].reshape(-1)
        )

    def show(standing: training.Standing) -> None:
        if standing.step % 20 == 0:
            print(role, standing.in_words(n_rows * N_CTX, n_steps), flush=True)

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

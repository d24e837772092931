"""Laws of Model, Trio and decoding, on the shipped trio."""

import sys

import numpy as np
import pytest
from conftest import KAZAKH

from trimix_gguf import Trio, Weights, generate, score, select_weights, stream_generate
from trimix_gguf.answering.answer import TextStream
from trimix_gguf.errors import ContextFullError, ModelError, PromptError
from trimix_gguf.machine import native
from trimix_gguf.machine.loading import Loading
from trimix_gguf.mixing.fusion import fuse
from trimix_gguf.roles import ROLES
from trimix_gguf.trio.model import Model
from trimix_gguf.trio.prompt import Prompt, Segment


def last_rows(trio, ids):
    trio.prefill(Prompt((Segment.of(ids),)))
    return {role: row.copy() for role, row in trio.rows().items()}


def close(a, b):
    return np.allclose(a, b, atol=2e-2)  # batched and single decodes differ by rounding


@pytest.fixture
def ids(trio):
    model = trio.models["large_ins"]
    return model.bos + model.tokenize(KAZAKH * 3)


def test_windowed_prefill_equals_token_by_token(trio, ids):
    rows = last_rows(trio, ids)
    for role, model in trio.models.items():
        model.rewind(0)
        for token in ids:
            row = model.decode([token])
        assert close(rows[role], row[-1])
    trio.rewind(len(ids))


def test_rewind_then_decode_equals_fresh(trio, ids):
    fresh = last_rows(trio, ids)
    trio.rewind(10)
    assert trio.n_past == len(ids) - 10
    for token in ids[-10:]:
        trio.advance(token)
    again = trio.rows()
    assert all(close(fresh[role], again[role]) for role in ROLES)


def test_a_failed_prefill_leaves_the_caches_alike(trio, ids):
    def fail(window):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trio.prefill(trio.prompt(KAZAKH), consume=fail)
    assert {m.n_past for m in trio.models.values()} == {0} and trio.n_past == 0
    assert all(np.isfinite(row).all() for row in last_rows(trio, ids).values())


@pytest.mark.parametrize("wrong", [-1, 6144, 2**31])
def test_a_token_that_no_model_has_is_refused(trio, wrong):
    """Bug: llama.cpp's samplers ended the process for a prompt of one's own ids."""
    prompt = Prompt((Segment.of([0, 50, wrong, 60]),))
    for ask in (
        lambda: generate(trio, prompt, weights=Weights(1, 0), max_tokens=2, dry_multiplier=0.8),
        lambda: score(trio, [prompt]),
        lambda: select_weights(trio, prompt),
        lambda: trio.prefill(prompt),
        lambda: trio.text([wrong]),
    ):
        with pytest.raises(PromptError, match=f"{wrong}.*0 to {trio.n_vocab - 1}"):
            ask()


def test_a_model_without_weight_is_not_decoded(trio):
    calls = dict.fromkeys(ROLES, 0)
    originals = {role: model.decode_entries for role, model in trio.models.items()}

    def counted(role):
        def decode(*a, **k):
            calls[role] += 1
            return originals[role](*a, **k)

        return decode

    for role, model in trio.models.items():
        model.decode_entries = counted(role)
    try:
        generate(trio, KAZAKH, weights=Weights(0.1, 0.9), max_tokens=6, seed=1)
    finally:
        for role, model in trio.models.items():
            model.decode_entries = originals[role]
    assert calls["small_base"] == 0 and calls["large_ins"] > 0 and calls["small_cpt"] > 0


def test_a_role_left_out_catches_up(trio, ids):
    expected = last_rows(trio, ids)["small_base"]
    trio.prefill(Prompt((Segment.of(ids[:4]),)))
    for token in ids[4:]:
        trio.advance(token)
        trio.rows(("large_ins",))
    assert close(trio.rows(("small_base",))["small_base"], expected)


def test_single_models_are_points_of_the_mix(trio):
    for name, weights in (("large_ins", (1, 0)), ("small_cpt", (0, 1)), ("small_base", (0, 0))):
        trio.prefill(trio.prompt(KAZAKH))
        rows = trio.rows()
        assert np.array_equal(fuse(rows, Weights(*weights)), rows[name])


def test_scored_perplexity_equals_a_plain_log_softmax(trio):
    prompt = trio.prompt(KAZAKH)
    result = score(trio, prompt)
    sequence = [i for s in prompt.segments for i in s.ids["large_ins"]]
    rows = {}
    for role, model in trio.models.items():
        model.rewind(0)
        parts = [model.decode([t])[0].astype(np.float64) for t in sequence[:-1]]
        rows[role] = np.stack(parts)
    for i, alpha in enumerate(result.alphas):
        for j, beta in enumerate(result.betas):
            fused = sum(c * rows[role] for role, c in Weights(alpha, beta).coefficients.items())
            top = fused.max(-1, keepdims=True)
            logprobs = fused - top - np.log(np.exp(fused - top).sum(-1, keepdims=True))
            nll = -logprobs[np.arange(len(sequence) - 1), sequence[1:]].sum()
            assert result.nll[0][i, j] == pytest.approx(nll, rel=2e-3)
    trio.rewind(trio.n_past)


def test_per_role_segments_move_positions_apart_and_score_nothing(trio):
    model = trio.models["large_ins"]
    control = model.tokenize("<|user|>", special=True)
    message = Segment.of(model.tokenize(KAZAKH))
    prompt = Prompt((Segment.per_role({"large_ins": control}), message))
    result = score(trio, prompt)
    assert result.n_tokens == [len(message.ids["large_ins"]) - 1]  # no row before it in all three
    assert trio.models["large_ins"].n_past == trio.models["small_cpt"].n_past + len(control)


def test_chosen_weights_have_the_lowest_perplexity(trio):
    selection = select_weights(trio, trio.prompt(KAZAKH))
    table = selection.perplexities()
    assert table["fused"] == min(np.exp(selection.score.on_grid().ravel()))
    continuous = select_weights(trio, trio.prompt(KAZAKH), grid="continuous")
    assert continuous.perplexities()["fused"] <= table["fused"] * (1 + 1e-6)


def test_entropy_method_and_last_tokens(trio):
    assert select_weights(trio, trio.prompt(KAZAKH), method="ent").method == "ent"
    few = select_weights(trio, trio.prompt(KAZAKH), last=5)
    assert few.score.n_tokens == [5]


def test_greedy_is_the_argmax_of_the_mix(trio):
    weights = Weights(0.3, 0.9)
    tokens = [
        token.id
        for event in stream_generate(trio, KAZAKH, weights=weights, temperature=0, max_tokens=8)
        for token in event.tokens
    ]
    trio.prefill(trio.prompt(KAZAKH))
    for token in tokens:
        assert int(fuse(trio.rows(), weights).argmax()) == token
        trio.advance(token)


def test_a_full_context_keeps_what_was_produced(nano_files):
    with Trio.load(**nano_files, n_ctx=32, n_window=8) as small:
        text = list(
            stream_generate(
                small, "Ол", weights=Weights(0.1, 0.9), max_tokens=10_000,
                logit_bias={i: -1e9 for i in small.end_of_generation},
            )
        )  # fmt: skip
        assert text[-1].finish_reason == "context" and text[-1].n_tokens > 0
        with pytest.raises(ContextFullError):
            small.models["large_ins"].decode([1] * 8)
            for _ in range(8):
                small.models["large_ins"].decode([1] * 8)
        with pytest.raises(PromptError, match="n-ctx"):
            small.prefill(small.prompt(KAZAKH * 20))


def test_options_per_role_and_quantized_kv(nano_files):
    per_role = {"large_ins": {"type_k": "q8_0", "type_v": "q8_0", "flash_attn": True}}
    with Trio.load(**nano_files, n_ctx=64, per_role=per_role, mmap=True) as opened:
        assert generate(opened, "Ол", max_tokens=3, seed=1).n_tokens > 0
    with pytest.raises(ModelError, match="KV-cache type"):
        Model(nano_files["small_base"], Loading(type_k="q9"))


def test_shared_weights_are_loaded_once(nano_files):
    first = Model(nano_files["small_base"], Loading(n_ctx=64))
    second = Model(nano_files["small_base"], Loading(n_ctx=64), share=first)
    assert first._weights is second._weights
    first.close()  # the second still works
    assert second.decode([5]).shape == (1, second.n_vocab)


def test_a_model_without_its_tokenizer_reads_the_same(nano_files):
    whole = Model(nano_files["small_base"], Loading(n_ctx=64))
    bare = Model(nano_files["small_base"], Loading(n_ctx=64), tokenizer=False)
    assert bare.n_vocab == whole.n_vocab
    assert np.array_equal(bare.decode([5, 6, 7]), whole.decode([5, 6, 7]))
    assert int(bare.file.metadata["tokenizer.ggml.eos_token_id"]) in bare.end_of_generation()
    assert bare.end_of_generation() <= whole.end_of_generation()


def test_rows_outlive_the_memory_they_were_scored_in(trio):
    prompt = trio.prompt(KAZAKH * 3)
    seen = {}

    def consume(window):
        seen.update({role: rows[-1].copy() for role, rows in window.rows.items()})

    trio.prefill(prompt, consume=consume)
    after = {role: row.copy() for role, row in trio.rows().items()}
    assert all(row.any() for row in after.values())
    trio.prefill(prompt)
    trio.forget_rows()
    assert all(close(after[role], row) for role, row in trio.rows().items())
    assert not any(np.array_equal(after[role], seen[role]) for role in ROLES)


def test_dropped_pages_are_given_back_and_no_others():
    block = np.ones(1 << 20, np.float32)
    native.drop_pages(block[5000:900_000])
    assert block[:5000].all() and block[900_000:].all()
    assert sys.platform != "linux" or not block[8000:890_000].any()


@pytest.mark.parametrize("text", ["Қазақша 🙂 сөз", "བོད་ཡིག", "ئۇيغۇرچە", "a\u0301 é"])
def test_incremental_utf8_is_whole(text):
    stream = TextStream(())
    raw = text.encode()
    parts = [stream.push(raw[i : i + 1]) for i in range(len(raw))]
    assert "".join(parts) + stream.flush() == text and "\ufffd" not in "".join(parts)


def test_stop_strings_are_held_back_and_cut():
    stream = TextStream(["END", "\n\n"])
    assert stream.push(b"abE") == "ab"
    assert stream.push(b"N") == ""
    assert stream.push(b"x") == "ENx"
    assert stream.push(b"yE") + stream.push(b"NDz") == "y" and stream.stopped
    assert stream.flush() == ""


def test_tokenize_round_trips_bytes(trio):
    model = trio.models["large_ins"]
    text = "Сәлем,  әлем!\n\n🙂 བོད ئۇيغۇر"
    assert b"".join(model.piece(i) for i in model.tokenize(text)).decode() == text


def test_real_trio_shares_weights_and_fuses_below_each_model(real_files):
    with Trio.load(**real_files, n_ctx=256) as real:
        assert real.models["small_cpt"]._weights is real.models["small_base"]._weights
        assert real.unused.sum() == 271
        table = select_weights(real, real.prompt(KAZAKH)).perplexities()
        assert table["small_cpt"] < table["small_base"]
        assert table["fused"] <= min(table[r] for r in ROLES)

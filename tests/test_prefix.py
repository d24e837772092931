"""What the caches hold already is not read again, and nobody can tell by the numbers."""

import json
import random

import numpy as np
import pytest
from conftest import KAZAKH
from test_cli import one_line_error

from trimix_gguf import Trio, Weights, generate, select_weights
from trimix_gguf import score as score_prompts
from trimix_gguf.answering.prompt_cache import load_prompt, save_prompt
from trimix_gguf.errors import ModelError
from trimix_gguf.trio.prompt import Prompt, Segment

EXACT = {"flash_attn": False, "type_k": "f32", "type_v": "f32", "n_threads": 1}
TOLERANCE = 2e-4  # nats in all: batches of other sizes round differently


@pytest.fixture(scope="module")
def kept():
    with Trio.nano(**EXACT) as opened:
        yield opened


@pytest.fixture(scope="module")
def fresh():
    """Emptied before each use."""
    with Trio.nano(**EXACT) as opened:

        def empty():
            opened.rewind(10_000)
            return opened

        empty.trio = opened
        yield empty


def tokens_read(trio, call):
    """Tokens that large_ins decodes during `call`."""
    model, n = trio.models["large_ins"], 0
    decode = model.decode_entries

    def counted(entries):
        nonlocal n
        n += len(entries)
        return decode(entries)

    model.decode_entries = counted
    try:
        call()
    finally:
        del model.decode_entries
    return n


def assert_as_fresh(kept, fresh, prompt, **options):
    ours, oracle = score_prompts(kept, prompt, **options), score_prompts(fresh(), prompt, **options)
    assert ours.n_tokens == oracle.n_tokens
    np.testing.assert_allclose(ours.nll[0], oracle.nll[0], atol=TOLERANCE)
    expected = fresh.trio.rows()
    for role, row in kept.rows().items():
        np.testing.assert_allclose(row, expected[role], atol=5e-3)


def random_prompt(rng, words):
    """Segments of a few words: scored, not scored, or a role's own."""
    segments = [Segment.of([0], scored=False)]
    for _ in range(rng.randint(1, 4)):
        ids = [t for _ in range(rng.randint(1, 3)) for t in rng.choice(words)]
        kind = rng.choice(["scored", "scored", "unscored", "own"])
        if kind == "own":
            segments.append(Segment.per_role({"large_ins": ids, "small_cpt": ids[:1]}))
        else:
            segments.append(Segment.of(ids, scored=kind == "scored"))
    return Prompt(tuple(segments))


def test_random_prompts_one_after_another(kept, fresh):
    """Prompts that share beginnings, cut at any place and scored in any part of it."""
    rng = random.Random(3)
    words = [kept.models["large_ins"].tokenize(w) for w in (KAZAKH, " Қазақстан", " бүгін заң")]
    n_read = n_whole = 0
    for _ in range(60):
        prompt = random_prompt(rng, words)
        if rng.random() < 0.3:
            generate(kept, prompt, weights=Weights(0.1, 0.9), max_tokens=3, seed=1)
            continue
        if not prompt.n_scored:
            continue
        n_read += tokens_read(kept, lambda p=prompt: assert_as_fresh(kept, fresh, p))
        n_whole += prompt.n_tokens()
    assert n_read < n_whole


def test_many_prompts_pay_for_their_prefix_once(kept, fresh):
    prefix = " ".join([KAZAKH] * 12)
    n_read = []
    for end in (" Абай", " Алматы қаласы", " Астана", " Абай Құнанбаев"):
        prompt = kept.prompt(prefix + end)
        n_read.append(tokens_read(kept, lambda p=prompt: assert_as_fresh(kept, fresh, p)))
        best = select_weights(kept, prompt, score_tokens="all").weights
        assert best == select_weights(fresh(), prompt, score_tokens="all").weights
    whole = kept.prompt(prefix).n_tokens()
    assert n_read[0] >= whole
    assert all(n < whole / 4 for n in n_read[1:])


def test_marked_answers_and_another_grid(kept, fresh):
    shots = "Мәтін: бүгін. Тақырып: [[спорт]]\nМәтін: заң. Тақырып: [[саясат]]\nМәтін: "
    for text in ("ертең", "кеше", "кеше болды"):
        prompt = kept.prompt(shots + text, spans=("[[", "]]"))
        assert_as_fresh(kept, fresh, prompt)
        assert_as_fresh(kept, fresh, prompt, grid=((0.2, 0.4), (0.5, 1.0)))


def test_a_text_after_an_answer(kept, fresh):
    """The answer is in the caches; a prompt that goes on from it is read from there."""
    weights = Weights(0.1, 0.9)
    answer = generate(kept, KAZAKH, weights=weights, max_tokens=20, temperature=0).text
    longer = kept.prompt(KAZAKH + answer + " Бірақ")
    n_read = tokens_read(
        kept, lambda: generate(kept, longer, weights=weights, max_tokens=1, temperature=0)
    )
    assert n_read < longer.n_tokens() / 2
    oracle = generate(fresh(), longer, weights=weights, max_tokens=8, temperature=0)
    assert generate(kept, longer, weights=weights, max_tokens=8, temperature=0).text == oracle.text


def test_a_failure_on_the_way_leaves_no_sums_behind(kept, fresh):
    prompt = kept.prompt(" ".join([KAZAKH] * 6))

    def interrupt(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score_prompts(kept, prompt, progress=interrupt)
    assert_as_fresh(kept, fresh, prompt)


def test_a_saved_prompt_goes_on_as_if_it_had_just_been_read(kept, tmp_path):
    prompt, options = kept.prompt(" ".join([KAZAKH] * 5)), {"max_tokens": 12, "temperature": 0}
    kept.forget()
    oracle = generate(kept, prompt, prompt_cache=tmp_path / "saved", **options)
    with Trio.nano(**EXACT) as other:
        again = []
        n_read = tokens_read(
            other,
            lambda: again.append(
                generate(other, prompt, prompt_cache=tmp_path / "saved", **options)
            ),
        )
    assert (again[0].text, again[0].selection.weights) == (oracle.text, oracle.selection.weights)
    assert again[0].selection.perplexities() == oracle.selection.perplexities()
    assert n_read < prompt.n_tokens() / 2


def test_a_saved_prompt_of_other_models_or_damaged_is_refused(trimix, nano_files, tmp_path):
    saved = tmp_path / "saved"
    command = ("generate", KAZAKH, "-n", "3", "--seed", "1", "--prompt-cache", saved)
    first, second = trimix(*command), trimix(*command)
    assert first.returncode == second.returncode == 0
    assert first.stdout == second.stdout and first.stdout.strip()
    assert {p.name for p in tmp_path.iterdir()} == {"saved"}
    for other in (("--kv-type", "q8_0"), ("--flash-attn",)):
        assert "another large_ins" in one_line_error(trimix(*command, *other))
    state = saved / "small_cpt.state"
    state.write_bytes(state.read_bytes()[:-50])
    assert "is damaged" in one_line_error(trimix(*command))
    (saved / "prompt.json").write_text("{}")
    assert "is not a saved prompt" in one_line_error(trimix(*command))


def test_a_saved_prompt_of_weights_that_differ_in_the_middle_is_refused(nano_files, tmp_path):
    """Bug: the ends of a file stood for all of it, which a merged adapter may leave as they are."""
    weights = bytearray(nano_files["small_cpt"].read_bytes())
    file, saved = tmp_path / "small_cpt.gguf", tmp_path / "saved"
    for known in (True, False):
        file.write_bytes(weights)
        with Trio.load(**{**nano_files, "small_cpt": file}, **EXACT) as trio:
            if known:
                trio.prefill(trio.prompt(KAZAKH))
                save_prompt(trio, saved)
                assert load_prompt(trio, saved)
            else:
                with pytest.raises(ModelError, match="another small_cpt"):
                    load_prompt(trio, saved)
        weights[len(weights) // 2] ^= 1


@pytest.mark.parametrize("n", [5, 32, 40])
def test_a_segment_that_goes_on_where_the_last_prompt_ended(kept, fresh, n):
    """Bug: the first token after the kept beginning was not scored inside a segment."""
    ids = [t for s in kept.prompt(KAZAKH * 4).segments for t in s.ids["large_ins"]]
    assert len(ids) > n + 2
    kept.forget()
    for length in (n, n + 1, len(ids)):
        assert_as_fresh(kept, fresh, Prompt((Segment.of(ids[:length]),)))


TAMPERED = {
    "ids": [{}, 5, {"large_ins": [-1]}, {"large_ins": ["1"]}, {"large_ins": [10**9]}],
    "sums": [{"key": 5}, {"points": 5}, {"points": {}, "units": [], "sums": []}, "x"],
    "models": [[], 5, {"large_ins": 5}],
    "states": [[], {}],
}


@pytest.mark.parametrize("key", TAMPERED)
def test_a_kept_prompt_of_other_types_is_refused_in_one_line(tmp_path, key):
    """Bug: prompt.json with a number where a list is expected gave a traceback."""
    folder = tmp_path / "saved"
    with Trio.nano(**EXACT) as trio:
        trio.prefill(trio.prompt(KAZAKH))
        trio.rows()
        save_prompt(trio, folder)
        file = folder / "prompt.json"
        whole = json.loads(file.read_text(encoding="utf-8"))
        for value in TAMPERED[key]:
            if key == "ids" and isinstance(value, dict) and value:
                value = whole["ids"] | value
            file.write_text(json.dumps(whole | {key: value}), encoding="utf-8")
            if value == {"key": 5}:  # sums of an earlier version are left out
                assert load_prompt(trio, folder)
                continue
            with pytest.raises(ModelError, match="remove it, or name another"):
                load_prompt(trio, folder)
        for text in ("[" * 100_000, "", "5", '{"ids": ' + "9" * 5000 + "}"):
            file.write_text(text, encoding="utf-8")
            with pytest.raises(ModelError, match="is not a saved prompt"):
                load_prompt(trio, folder)

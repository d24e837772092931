"""Structured output: what ends by itself is valid under its schema, at a bounded cost."""

import json
import random
import re
import subprocess
import sys
import warnings

import jsonschema
import numpy as np
import pytest
import schemas
from conftest import KAZAKH
from schemas import ASKED, BROKEN, COSTLY, REFUSED, accepts, chain, mask_of

from trimix_gguf import Sampler, Sampling, Weights, generate
from trimix_gguf.errors import SamplerError, SchemaError
from trimix_gguf.mixing.masks import SchemaMask
from trimix_gguf.mixing.patterns import portable


@pytest.mark.parametrize("schema", ASKED, ids=lambda s: str(s)[:60])
def test_an_answer_that_ends_by_itself_is_valid(trio, schema):
    """Bug: the old converter dropped keywords, took other definitions, and wrote raw newlines."""
    n_ended = 0
    for seed in range(4):
        answer = generate(
            trio, KAZAKH, weights=Weights(0.5, 0.5), max_tokens=200, seed=seed, temperature=1.2,
            top_k=0, top_p=1.0, min_p=0.0, json_schema=schema,
        )  # fmt: skip
        if answer.finish_reason == "stop":
            n_ended += 1
            jsonschema.validate(json.loads(answer.text), schema)
    assert n_ended  # else nothing was judged


@pytest.mark.filterwarnings("ignore:Possible set:FutureWarning")  # jsonschema uses re
@pytest.mark.parametrize(("schema", "values"), BROKEN, ids=lambda s: str(s)[:60])
def test_what_breaks_a_schema_cannot_be_written(schema, values):
    mask = mask_of(schema)
    for value in values:
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(value, schema)
        assert not accepts(mask, value), value


@pytest.mark.parametrize(("schema", "named"), REFUSED, ids=lambda s: str(s)[:60])
def test_a_schema_that_cannot_be_held_is_refused_by_name(schema, named):
    with pytest.raises(SchemaError, match=re.escape(named)) as caught:
        mask_of(schema)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 500


@pytest.mark.parametrize("name", COSTLY)
def test_the_cost_of_a_schema_is_bounded(trio, name):
    """Bug: references in a chain ended the process or gave status 500; a cycle of two ways
    doubled the states at each token. Counted, not timed: a limit of llguidance may end it."""
    rng = np.random.default_rng(0)
    try:
        mask = SchemaMask(trio.token_tree, COSTLY[name])
        for _ in range(60):
            mask.accept(int(rng.choice(np.flatnonzero(mask.allowed()))))
    except (SchemaError, ValueError) as error:  # refused, or nothing more may come
        assert isinstance(error, SchemaError) or mask.may_end


def test_a_chain_of_references_is_walked_on_a_stack_of_its_own():
    """Bug: 20,000 references overflowed llguidance's stack; on Windows a few hundred would."""
    program = (
        f"import sys, threading; sys.path[:] = {sys.path!r}; import schemas\n"
        "threading.stack_size(256 << 10)\n"
        "t = threading.Thread(target=lambda: schemas.mask_of(schemas.chain(1900, "
        "schemas.WRAPS['items']))); t.start(); t.join(); print('whole')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True)
    assert done.returncode == 0 and done.stdout.strip() == b"whole", done.stderr[-300:]
    with pytest.raises(SchemaError, match="more than 4000"):
        mask_of(chain(20_000, schemas.WRAPS["reference"]))


def test_objects_have_the_named_properties_only_where_that_cannot_break_a_schema():
    named = {"type": "object", "properties": {"a": {"type": "null"}}}
    assert not accepts(mask_of(named), {"b": 1})
    assert accepts(mask_of({"allOf": [named, {"required": ["b"]}]}), {"b": 1})
    assert accepts(mask_of({**named, "additionalProperties": True}), {"b": 1})
    assert accepts(mask_of({**named, "required": ["b"]}), {"b": 1})


def test_a_schema_that_is_kept_begins_at_its_beginning():
    schema = {"type": "array", "items": {"type": "null"}}
    first = mask_of(schema)
    first.accept(ord("["))
    assert mask_of(schema).allows(ord("[")) and not mask_of(schema).allows(ord("n"))
    for i in range(20):  # more than are kept
        assert accepts(mask_of({"const": i}), i)
    assert first.allows(ord("n")) and accepts(mask_of(schema), [None])


def test_white_space_has_an_end():
    mask = mask_of({"type": "array", "items": {"type": "null"}})
    for byte in b"[\n  ":
        mask.accept(byte)
    assert not mask.allows(ord("\n")) and mask.allows(ord("n"))


def test_a_sampler_in_a_schema_copies_its_state(trio):
    text = '{"a": "сөз", "b": [1, 2]}'
    mask, tree = SchemaMask(trio.token_tree, {"type": "object"}), trio.token_tree
    assert tree.n_vocab == trio.n_vocab
    for token in trio.models["large_ins"].tokenize(text):
        twin = mask.clone()
        before = mask.allowed()
        assert twin.allows(token) and before[token]
        twin.accept(token)
        assert np.array_equal(mask.allowed(), before)
        mask.accept(token)
    assert mask.may_end
    assert not any(mask.allows(token) for token in trio.end_of_generation)  # the sampler's matter


def test_every_token_of_a_mask_is_allowed_alone_too(trio):
    mask = SchemaMask(trio.token_tree, {"type": "object"})
    rng = np.random.default_rng(0)
    for _ in range(20):
        allowed = mask.allowed()
        for token in rng.choice(trio.n_vocab, 100):
            assert mask.allows(int(token)) == allowed[token]
        if not allowed.any():
            break
        mask.accept(int(rng.choice(np.flatnonzero(allowed))))


ATOMS = [
    "a", "b", "ә", ".", r"\d", r"\w", r"\s", r"\D", r"\W", r"\S", "[ab]", "[^a]", r"[\w-]",
    r"[^\w]", r"[^\W]", r"[^\s\d]", r"[\S]", "[a&&b]", "[^a&&b]", "[^[:alpha:]]", "[]a]", "[^]a]",
    "^", "$", r"\.", r"\ә", "(a|b)", "(?:ab|)", "(^a|b$)", r"\u0041", "[а-я]", r"\n", "[+-]", "~",
    "[a~~b]", "/", r"\/", '"', r"\\", "[|]", "|", "{", "}", "#", "<", r"\<", r"\A", r"\b",
]  # fmt: skip
QUANTIFIERS = ["", "", "", "", "*", "+", "?", "{2}", "{1,3}", "*?", "++", "{2,}", "?{2}"]
TEXTS = [
    "", "a", "b", "ab", "ba", "aa", "ә", "1", "²", "٣", "_", "-", " ", "\n", "a\n", "\x1c",
    "\u0301", "A", "&", "~", "[", ":", '"', "\\", ".", "/", "|", "aaab", "bab", "}", "{", "#", "<",
    "\u200d", "\ufeff", "Ⓐ", "\x85", "\u2028", "ª", "ⅷ", "\u0345",
]  # fmt: skip


def test_no_text_is_written_that_a_pattern_does_not_match():
    """Random patterns, some of no language: what the mask takes, Python's re finds."""
    rng, n = random.Random(0), 0
    for _ in range(400):
        pattern = "".join(
            rng.choice(ATOMS) + rng.choice(QUANTIFIERS) for _ in range(rng.randint(1, 4))
        )
        try:
            mask = mask_of({"type": "string", "pattern": pattern})
        except SchemaError:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of [[:alpha:]]
            found = re.compile(pattern)
        n += 1
        for text in [*TEXTS, *("".join(rng.choices(TEXTS, k=3)) for _ in range(10))]:
            if accepts(mask, text):
                assert found.search(text), (pattern, text)
    assert n > 100


def test_a_pattern_that_all_dialects_share_stays_as_it_is():
    for pattern in ("^[a-z]+$", "(a|b)*?c{2,3}", "^[А-Яа-яӘә]{3}$", "a.b"):
        assert portable(pattern) == pattern


def test_a_sampler_needs_the_tree_for_a_schema_only(trio):
    vocab = trio.models["large_ins"].vocab
    Sampler(vocab, trio.n_vocab, Sampling())
    with pytest.raises(SamplerError, match="token_tree"):
        Sampler(vocab, trio.n_vocab, Sampling(json_schema={}))
    with pytest.raises(SamplerError, match="JSON"):
        generate(trio, "а", weights=Weights(1, 0), json_schema="{")
    assert generate(trio, "а", weights=Weights(1, 0), max_tokens=2, json_schema="true").n_tokens


@pytest.mark.parametrize("rules", [{"json_schema": {"enum": ["иә"]}}, {"grammar": 'root ::= "иә"'}])
def test_a_grammar_goes_before_the_plausibility_threshold(trio, rules):
    """Bug: where large_ins found no token plausible that the grammar allows, the answer failed."""
    # At threshold 1 only large_ins' first choice is left.
    answer = generate(
        trio, KAZAKH, weights=Weights(0.5, 0.5), plausibility_threshold=1.0, max_tokens=20, **rules
    )
    assert answer.text.strip('"') == "иә"

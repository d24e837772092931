"""Laws of the vocabulary contract: the same tokens pass, and the first difference is named."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFWriter, TokenType

from trimix_gguf.errors import VocabularyMismatch
from trimix_gguf.machine.gguf_file import MAX_LISTED, GGUFArray, GGUFFile, read_gguf
from trimix_gguf.machine.vocabulary import check_contract

MODELS = Path(os.environ.get("TRIMIX_MODELS", "~/.cache/trimix-models")).expanduser()
SMOLLM = MODELS / "smollm2-135m-instruct-q4_1.gguf"
QWEN_SMALL = MODELS / "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"
QWEN_LARGE = MODELS / "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf"

Make = Callable[..., GGUFFile]


@pytest.fixture(params=[40, MAX_LISTED + 100], ids=["listed", "lazy"])
def n_tokens(request: pytest.FixtureRequest) -> int:
    """Short arrays are kept with the metadata, long ones are read from the file when asked."""
    return int(request.param)


@pytest.fixture
def make(tmp_path: Path, n_tokens: int) -> Make:
    """Writes a GGUF that holds a vocabulary alone; `edit` changes its parts first."""

    def write(
        name: str = "model",
        edit: Callable[[dict[str, Any]], None] | None = None,
        n_padding: int = 0,
    ) -> GGUFFile:
        parts: dict[str, Any] = {
            "model": "gpt2",
            "pre": "qwen2",
            "tokens": [f"тіл{i}" for i in range(n_tokens)],
            "types": [int(TokenType.NORMAL)] * n_tokens,
            "merges": [f"a{i} b{i}" for i in range(n_tokens)],
            "scores": None,
            "bos": 0,
            "add_bos": True,
            "eos": 1,
            "add_eos": False,
        }
        parts["tokens"] += [f"[PAD{n_tokens + i}]" for i in range(n_padding)]
        parts["types"] += [int(TokenType.UNUSED)] * n_padding
        if edit is not None:
            edit(parts)
        path = tmp_path / f"{name}.gguf"
        writer = GGUFWriter(path, "llama")
        writer.add_tokenizer_model(parts["model"])
        writer.add_tokenizer_pre(parts["pre"])
        writer.add_token_list(parts["tokens"])
        for add, values in (
            (writer.add_token_types, parts["types"]),
            (writer.add_token_scores, parts["scores"]),
            (writer.add_token_merges, parts["merges"]),
            (writer.add_bos_token_id, parts["bos"]),
            (writer.add_eos_token_id, parts["eos"]),
            (writer.add_add_bos_token, parts["add_bos"]),
            (writer.add_add_eos_token, parts["add_eos"]),
        ):
            if values is not None:
                add(values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        return read_gguf(path)

    return write


def check(large_ins: GGUFFile, small_cpt: GGUFFile, small_base: GGUFFile | None = None) -> int:
    return check_contract(
        {"large_ins": large_ins, "small_cpt": small_cpt, "small_base": small_base or large_ins}
    )


def refusal(large_ins: GGUFFile, small_cpt: GGUFFile) -> str:
    """The message of a refusal, checked to come in either order and to be one line."""
    with pytest.raises(VocabularyMismatch):
        check(small_cpt, large_ins)
    with pytest.raises(VocabularyMismatch) as caught:
        check(large_ins, small_cpt)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


def test_the_arrays_are_stored_as_meant(make: Make, n_tokens: int) -> None:
    kept = make().metadata["tokenizer.ggml.tokens"]
    assert isinstance(kept, GGUFArray if n_tokens > MAX_LISTED else list)


def test_identical_vocabularies_pass(make: Make, n_tokens: int) -> None:
    assert check(make("a"), make("b"), make("c")) == n_tokens


def test_one_file_in_every_role_passes(make: Make, n_tokens: int) -> None:
    file = make()
    assert check(file, file) == n_tokens


def test_sizes_may_differ_by_padding(make: Make, n_tokens: int) -> None:
    large, small, middle = make("a", n_padding=9), make("b"), make("c", n_padding=3)
    assert check(large, small, large) == n_tokens
    assert check(small, large, large) == n_tokens
    assert check(large, middle, small) == n_tokens
    assert check(large, middle, large) == n_tokens + 3


def test_control_tokens_past_the_other_s_end_pass(make: Make, n_tokens: int) -> None:
    """As Gemma 3's mark for images, which its 1B lacks."""

    def mark(parts: dict[str, Any]) -> None:
        parts["types"][n_tokens] = int(TokenType.CONTROL)

    assert check(make("a", n_padding=3, edit=mark), make("b")) == n_tokens


def test_more_tokens_that_are_no_padding_are_refused(make: Make, n_tokens: int) -> None:
    def speak(parts: dict[str, Any]) -> None:
        parts["types"][-1] = int(TokenType.NORMAL)

    message = refusal(make("a", n_padding=2, edit=speak), make("b"))
    assert message.startswith(f"large_ins has '[PAD{n_tokens + 1}]' as token {n_tokens + 1}")


def put(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda parts: parts.update({key: value})


def put_item(key: str, index: int, value: Any) -> Callable[[dict[str, Any]], None]:
    def edit(parts: dict[str, Any]) -> None:
        parts[key][index] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "flaw"),
    [
        (put("model", "llama"), "tokenizer model is 'llama' in small_cpt but 'gpt2' in large_ins"),
        (put("pre", "llama-bpe"), "pre-tokenizer is 'llama-bpe' in small_cpt but 'qwen2'"),
        (put_item("tokens", 17, "ә"), "token 17 is 'ә' in small_cpt but 'тіл17' in large_ins"),
        (put_item("types", 3, 3), "type of token 3 is 3 in small_cpt but 1 in large_ins"),
        (put_item("merges", 5, "x y"), "merge 5 of small_cpt differs"),
        (lambda parts: parts["merges"].pop(), "merge {last} of small_cpt differs"),
        (put("bos", 2), "bos_token_id is 2 in small_cpt but 0 in large_ins"),
        (put("add_bos", False), "add_bos_token is False in small_cpt but True in large_ins"),
        (put("add_bos", None), "add_bos_token is False in small_cpt but True in large_ins"),
        (put("add_eos", True), "add_eos_token is True in small_cpt but False in large_ins"),
    ],
)
def test_the_first_difference_is_named(
    make: Make, n_tokens: int, edit: Callable[[dict[str, Any]], None], flaw: str
) -> None:
    message = refusal(make("a"), make("b", edit))
    assert message.startswith(flaw.format(last=n_tokens - 1))
    assert "one tokenizer" in message


def test_of_several_differences_the_first_is_named(make: Make, n_tokens: int) -> None:
    def edit(parts: dict[str, Any]) -> None:
        parts["tokens"][n_tokens - 1] = parts["tokens"][n_tokens - 7] = "x"

    assert refusal(make("a"), make("b", edit)).startswith(f"token {n_tokens - 7} is 'x'")


def test_the_third_model_is_checked_too(make: Make) -> None:
    with pytest.raises(VocabularyMismatch, match="token 4 is 'x' in small_base"):
        check(make("a"), make("b"), make("c", put_item("tokens", 4, "x")))


def test_an_end_that_is_never_added_may_differ(make: Make, n_tokens: int) -> None:
    """Instruct models end at another token than their base; neither appends it to a prompt."""
    assert check(make("a", put("eos", 5)), make("b")) == n_tokens


def sentencepiece(
    edit: Callable[[dict[str, Any]], None] | None = None,
) -> Callable[[dict[str, Any]], None]:
    def apply(parts: dict[str, Any]) -> None:
        parts.update(model="llama", pre="default", merges=None)
        parts["scores"] = [-float(i) for i in range(len(parts["tokens"]))]
        if edit is not None:
            edit(parts)

    return apply


def test_sentencepiece_scores_are_compared(make: Make, n_tokens: int) -> None:
    assert check(make("a", sentencepiece()), make("b", sentencepiece())) == n_tokens
    other = make("b", sentencepiece(put_item("scores", 6, -0.5)))
    message = refusal(make("a", sentencepiece()), other)
    assert message.startswith("score of token 6 is -0.5 in small_cpt but -6.0 in large_ins")


def test_scores_that_one_sentencepiece_file_lacks_are_refused(make: Make) -> None:
    """The absent array once ended in StopIteration."""
    refusal(make("a", sentencepiece()), make("b", sentencepiece(put("scores", None))))


def test_sentencepiece_adds_bos_unless_told_otherwise(make: Make, n_tokens: int) -> None:
    """Absent once counted as False, so that a file that says True was refused."""
    absent = make("a", sentencepiece(put("add_bos", None)))
    assert check(absent, make("b", sentencepiece(put("add_bos", True)))) == n_tokens
    message = refusal(absent, make("c", sentencepiece(put("add_bos", False))))
    assert message.startswith("add_bos_token is False in small_cpt but True in large_ins")
    other = make("d", sentencepiece(lambda parts: parts.update(add_bos=None, bos=2)))
    assert refusal(absent, other).startswith("bos_token_id is 2 in small_cpt but 0")


def test_llama_3_adds_bos_unless_told_otherwise(make: Make, n_tokens: int) -> None:
    absent = make("a", lambda parts: parts.update(pre="llama-bpe", add_bos=None))
    assert check(absent, make("b", put("pre", "llama-bpe"))) == n_tokens


def test_scores_mean_nothing_to_bpe(make: Make, n_tokens: int) -> None:
    """Older converters wrote them for BPE as well, which reads only its merges."""
    scored = make("b", lambda parts: parts.update(scores=[0.0] * n_tokens))
    assert check(make("a"), scored) == n_tokens


def test_absent_types_are_normal_ones(make: Make, n_tokens: int) -> None:
    assert check(make("a"), make("b", put("types", None))) == n_tokens
    control = make("c", put_item("types", 3, int(TokenType.CONTROL)))
    refusal(control, make("b", put("types", None)))


def test_a_file_without_a_vocabulary_is_refused(make: Make, tmp_path: Path) -> None:
    path = tmp_path / "bare.gguf"
    writer = GGUFWriter(path, "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert refusal(make("a"), read_gguf(path)).startswith("bare.gguf holds no vocabulary")


def real(*paths: Path) -> list[GGUFFile]:
    for path in paths:
        if not path.exists():
            pytest.skip(f"{path.name} is not in {MODELS}")
    return [read_gguf(path) for path in paths]


def test_two_real_families_are_told_apart() -> None:
    smollm, qwen = real(SMOLLM, QWEN_SMALL)
    assert "pre-tokenizer is 'qwen2' in small_cpt but 'smollm' in large_ins" in refusal(
        smollm, qwen
    )


def test_two_real_sizes_of_one_family_pass() -> None:
    large, small = real(QWEN_LARGE, QWEN_SMALL)
    assert check(large, small) == 151_936


@pytest.mark.parametrize(
    ("key", "value", "flaw"),
    [
        ("tokens", "тілX", "token 3 is 'тілX'"),
        ("types", int(TokenType.UNUSED), "type of token 3 is 5"),
        ("merges", "a3 bX", "merge 3 of small_cpt"),
    ],
)
def test_a_difference_that_changes_no_size_is_found(
    make: Make, key: str, value: object, flaw: str
) -> None:
    def edit(parts: dict[str, Any]) -> None:
        parts[key][3] = value

    assert refusal(make("a"), make("b", edit)).startswith(flaw)

"""Laws of prompts: no token is lost or moved by marking what is scored."""

from collections.abc import Callable

import pytest

from trimix_gguf.errors import PromptError
from trimix_gguf.roles import ROLES
from trimix_gguf.trio.prompt import Prompt, Segment, text_prompt

BOS = [1]
MARKS = ("[[", "]]")
WORDS = [b"ab", b": yes", b"no.", "қ".encode(), " ә".encode()]


def tokenize(text: str) -> list[int]:
    """Longest known word first, else single bytes, as ids 300 … and 2 … 257."""
    raw, ids = text.encode(), []
    while raw:
        word = max((w for w in WORDS if raw.startswith(w)), key=len, default=raw[:1])
        ids.append(300 + WORDS.index(word) if word in WORDS else 2 + word[0])
        raw = raw[len(word) :]
    return ids


def piece(token: int) -> bytes:
    return WORDS[token - 300] if token >= 300 else bytes([token - 2])


def make(text: str, *, bos: list[int] = BOS, spans: tuple[str, str] | None = MARKS) -> Prompt:
    return text_prompt(text, tokenize, piece, bos=bos, spans=spans)


def ids(prompt: Prompt) -> list[int]:
    return [i for s in prompt.segments for i in s.ids["large_ins"]]


def scored(prompt: Prompt) -> list[bytes]:
    """Text of each scored segment."""
    chosen = [s.ids["large_ins"] for s in prompt.segments if s.scored]
    return [b"".join(map(piece, part)) for part in chosen]


def test_plain_text_is_bos_unscored_then_everything_scored() -> None:
    prompt = make("ab cd", spans=None)
    assert [(s.ids["small_cpt"], s.scored) for s in prompt.segments] == [
        ((1,), False),
        (tuple(tokenize("ab cd")), True),
    ]
    assert prompt.n_scored == 4 and prompt.n_tokens() == 5
    assert all(s.shared for s in prompt.segments)


def test_a_vocabulary_without_bos_gets_none() -> None:
    assert ids(make("ab cd", bos=[], spans=None)) == tokenize("ab cd")


def test_marks_in_plain_text_are_text() -> None:
    assert ids(make("a [[b]]", spans=None)) == BOS + tokenize("a [[b]]")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x [[y]] z", [b"y"]),
        ("[[y]]", [b"y"]),
        ("[[y]] z", [b"y"]),
        ("x [[y]]", [b"y"]),
        ("x [[y]] z [[w]]", [b"y", b"w"]),
        ("[[y]][[w]]", [b"y", b"w"]),
        ("[[]]x [[y]]", [b"y"]),
        ("тіл: [[қазақ]].", ["қазақ".encode()]),
    ],
)
def test_only_what_stands_between_marks_is_scored(text: str, expected: list[bytes]) -> None:
    prompt = make(text)
    assert scored(prompt) == expected
    assert ids(prompt) == BOS + tokenize(text.replace("[[", "").replace("]]", ""))
    assert ids(prompt).count(BOS[0]) == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x[[w: y]]es", [b"w"]),  # ': yes' begins in the span and ends past it
        ("x:[[ yes.]]", [b"."]),  # and begins before it
        ("[[tn]]o. [[t]]", [b"t", b"t"]),
        ("n[[o]]. [[t]]", [b"t"]),  # 'no.' swallows the first span whole
        ("[[n]][[o.]]", [b"no."]),  # across two spans it is all the answers'
    ],
)
def test_a_token_across_a_border_is_not_scored(text: str, expected: list[bytes]) -> None:
    prompt = make(text)
    assert ids(prompt) == BOS + tokenize(text.replace("[[", "").replace("]]", ""))
    assert scored(prompt) == expected


def test_the_space_before_an_answer_of_one_token_is_the_answers() -> None:
    """'Label: [[sports]]' had no token to score: ' sports' is one, and began outside."""
    assert scored(make("no [[no]]\n[[no]]"))[0] in (b" no", b"no")
    assert b"".join(scored(make("a: [[no.]]"))).strip() == b"no."


def test_a_letter_cut_by_tokens_keeps_its_bytes() -> None:
    prompt = make("тәт: [[ә ұ]]")  # 'ә' and 'ұ' are two tokens of one byte each
    assert b"".join(map(piece, ids(prompt)[1:])).decode() == "тәт: ә ұ"
    assert b"".join(scored(prompt)) == " ә ұ".encode()  # with the space before


def spaced(tokenizer: Callable[[str], list[int]]) -> Callable[[str], list[int]]:
    return lambda text: tokenizer(" " + text)


def test_a_tokenizer_that_adds_a_space_is_asked_part_by_part() -> None:
    prompt = text_prompt("x [[y]]", spaced(tokenize), piece, bos=BOS, spans=MARKS)
    assert ids(prompt) == BOS + tokenize(" x ") + tokenize(" y")
    assert scored(prompt) == [b" y"]


@pytest.mark.parametrize("text", ["a [[b", "a [[b]] c [[d", "[[", "a [[b]"])
def test_a_span_that_never_closes_is_refused(text: str) -> None:
    with pytest.raises(PromptError, match="never closes"):
        make(text)


@pytest.mark.parametrize("text", ["a", "a]]", ""])
def test_text_without_a_span_is_refused(text: str) -> None:
    with pytest.raises(PromptError, match="no span"):
        make(text)


def test_empty_text_is_refused() -> None:
    with pytest.raises(PromptError, match="empty"):
        make("", spans=None)
    with pytest.raises(PromptError, match="empty|nothing to score"):
        make("[[]]")


@pytest.mark.parametrize("marks", [("", ""), ("", "]]"), ("[[", "")])
def test_empty_marks_are_refused(marks: tuple[str, str]) -> None:
    """Bug: `--spans '' ''`, such as of a variable that is not set, was a traceback."""
    with pytest.raises(PromptError, match="mark"):
        make("a [[b]]", spans=marks)


def test_spans_that_hold_no_text_are_refused() -> None:
    """Only a later, unrelated message told that nothing was scored."""
    with pytest.raises(PromptError, match="nothing to score"):
        make("a: [[]]")


@pytest.mark.parametrize("n", range(1, 12))
def test_score_last_keeps_the_tokens_and_scores_the_last_n(n: int) -> None:
    prompt = Prompt(
        (
            Segment.of([1], scored=False),
            Segment.of([10, 11, 12]),
            Segment.per_role({"large_ins": [20, 21]}),
            Segment.of([], scored=True),
            Segment.of([30, 31, 32, 33]),
            Segment.of([40], scored=False),
            Segment.of([50]),
        )
    )
    cut = prompt.score_last(n)
    assert ids(cut) == ids(prompt)
    for role in ROLES:
        assert cut.n_tokens(role) == prompt.n_tokens(role)
    assert cut.n_scored == min(n, 8)
    last = [i for s in cut.segments if s.scored for i in s.ids["large_ins"]]
    assert last == [10, 11, 12, 30, 31, 32, 33, 50][-n:]
    assert [s.ids for s in cut.segments if not s.shared] == [prompt.segments[2].ids]


def test_a_segment_of_ones_own_is_never_scored() -> None:
    own = Segment.per_role({"large_ins": [1, 2], "small_cpt": [3]})
    assert own.ids == {"large_ins": (1, 2), "small_cpt": (3,), "small_base": ()}
    assert not own.scored and not own.shared
    with pytest.raises(ValueError, match="shared"):
        Segment(own.ids, shared=False, scored=True)

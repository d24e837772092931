"""A prompt is a list of segments, each shared by the roles or each role's own, scored or not."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from trimix_gguf.errors import PromptError
from trimix_gguf.roles import ROLES, Role


@dataclass(frozen=True)
class Segment:
    """Token ids for every role; `shared` ones are the same for all, and only those are scored."""

    ids: Mapping[Role, tuple[int, ...]]
    shared: bool
    scored: bool

    def __post_init__(self) -> None:
        if self.scored and not self.shared:
            raise ValueError("a scored segment must be shared by the roles")

    @classmethod
    def of(cls, ids: list[int] | tuple[int, ...], *, scored: bool = True) -> "Segment":
        """The same ids for every role."""
        return cls(dict.fromkeys(ROLES, tuple(ids)), shared=True, scored=scored)

    @classmethod
    def per_role(cls, ids: Mapping[Role, list[int]]) -> "Segment":
        """Each role's own ids, possibly none: a chat template's control tokens, say."""
        return cls({r: tuple(ids.get(r, ())) for r in ROLES}, shared=False, scored=False)

    @property
    def units(self) -> list["Unit"]:
        """What can be kept of it: each shared token, or a role's own ids all together."""
        if self.shared:
            return [(((t,),) * len(ROLES), self.scored) for t in self.ids[ROLES[0]]]
        return [(tuple(self.ids[role] for role in ROLES), False)]


Unit = tuple[tuple[tuple[int, ...], ...], bool]  # ids by role, in the order of ROLES; scored?


def is_shared(ids: tuple[tuple[int, ...], ...]) -> bool:
    """Whether a unit's ids are one token, the same for all roles."""
    return len(ids[0]) == 1 and len(set(ids)) == 1


_SURE = 8  # units that must agree for a text to count as the same


def left_out(old: Sequence[Unit], new: Sequence[Unit]) -> tuple[int, int] | None:
    """The range (first, end) of `old` without which it goes on as `new` does; None: there is none.

    Of ranges that differ only in where equal units at their ends count, it is the first. The first
    unit stays: models lean on the first token of a text (Xiao et al. 2023, arXiv 2309.17453).
    """
    start = n_same(old, new)
    common = _common_with(new[start:], old[start + 1 :])
    most = max(common, default=0)
    if not start or most < _SURE:
        return None
    end = start + 1 + common.index(most)
    while start > 1 and old[start - 1] == old[end - 1]:
        start, end = start - 1, end - 1
    return start, end


def _common_with(pattern: Sequence[Unit], text: Sequence[Unit]) -> list[int]:
    """At each place of `text`, how many of the next units are the first of `pattern`.

    The Z algorithm: in linear time, as a chat may hold thousands of equal units.
    """
    both = [*pattern, None, *text]
    lengths = [0] * len(both)
    first = end = 0  # of what agrees with the pattern and reaches farthest
    for i in range(1, len(both)):
        n = min(lengths[i - first], end - i) if i < end else 0
        while i + n < len(both) and both[n] == both[i + n]:
            n += 1
        lengths[i] = n
        if i + n > end:
            first, end = i, i + n
    return lengths[len(pattern) + 1 :]


def n_same(a: Sequence[Unit], b: Sequence[Unit]) -> int:
    """How many of their first units are the same."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (one, other) in pairs if one != other), min(len(a), len(b)))


def n_common(units: Sequence[Unit], ids: Mapping[Role, Sequence[int]]) -> int:
    """How many of the first `units` stand in `ids`, by role, at its beginning."""
    known, at = [ids[role] for role in ROLES], [0] * len(ROLES)
    for n, (own_ids, _) in enumerate(units):
        for i, of_role in enumerate(own_ids):
            if tuple(known[i][at[i] : at[i] + len(of_role)]) != of_role:
                return n
            at[i] += len(of_role)
    return len(units)


@dataclass(frozen=True)
class Prompt:
    """Segments in reading order."""

    segments: tuple[Segment, ...]

    @property
    def units(self) -> list[Unit]:
        """The units of all segments."""
        return [unit for segment in self.segments for unit in segment.units]

    def n_tokens(self, role: Role = "large_ins") -> int:
        """How many ids one role reads."""
        return sum(len(s.ids[role]) for s in self.segments)

    @property
    def n_scored(self) -> int:
        """How many tokens are scored."""
        return sum(len(s.ids["large_ins"]) for s in self.segments if s.scored)

    @property
    def is_marked(self) -> bool:
        """Whether only parts of its text are scored, such as the answers of exemplars."""
        # The first segment may be the mark of a text's beginning, which nothing predicts.
        scored = [s.scored for s in self.segments[1:] if s.shared and s.ids[ROLES[0]]]
        return len(set(scored)) > 1

    def score_last(self, n: int) -> "Prompt":
        """The same tokens with only the last `n` scored ones scored: a faster choice of weights."""
        left, kept = n, []
        for segment in reversed(self.segments):
            ids = segment.ids["large_ins"]
            take = min(left, len(ids)) if segment.scored else 0
            left -= take
            if segment.scored and take < len(ids):
                cut = len(ids) - take
                kept += [Segment.of(ids[cut:])] if take else []
                kept.append(Segment.of(ids[:cut], scored=False))
            else:
                kept.append(segment)
        return Prompt(tuple(reversed(kept)))


def text_prompt(
    text: str,
    tokenize: Callable[[str], list[int]],
    piece: Callable[[int], bytes],
    *,
    bos: list[int],
    spans: tuple[str, str] | None = None,
) -> Prompt:
    """Plain text as a prompt: BOS once, unscored, then the text, scored.

    With `spans` = (open, close), only text between those marks is scored, and the marks are
    dropped: "Text: … Label: [[sports]]" chooses weights by the answers that will be asked for.
    Raises PromptError for an empty text or marks that do not pair.
    """
    pieces = [(text, True)] if spans is None else _cut_spans(text, *spans)
    if not any(part for part, _ in pieces):
        raise PromptError("the prompt is empty; give some text")
    segments = [Segment.of(bos, scored=False)] if bos else []
    segments += [Segment.of(ids, scored=s) for ids, s in _tokenize_parts(pieces, tokenize, piece)]
    return Prompt(tuple(segments))


def _cut_spans(text: str, start: str, end: str) -> list[tuple[str, bool]]:
    """'a[[b]]c' -> [('a', False), ('b', True), ('c', False)]."""
    if not (start and end):
        raise PromptError("a mark of scored spans is empty; give two marks, such as [[ and ]]")
    parts: list[tuple[str, bool]] = []
    rest = text
    while start in rest:
        before, _, rest = rest.partition(start)
        inside, mark, rest = rest.partition(end)
        if not mark:
            raise PromptError(f"a scored span opens with {start!r} but never closes with {end!r}")
        parts += [(before, False), (inside, True)]
    if not parts:
        raise PromptError(f"no span between {start!r} and {end!r} in the prompt; nothing to score")
    if not any(inside for inside, scored in parts if scored):
        raise PromptError(f"no text between {start!r} and {end!r}; nothing to score")
    return [p for p in [*parts, (rest, False)] if p[0]]


def _tokenize_parts(
    parts: list[tuple[str, bool]],
    tokenize: Callable[[str], list[int]],
    piece: Callable[[int], bytes],
) -> list[tuple[list[int], bool]]:
    """Ids of each part, cut from one tokenization of the whole where its bytes allow it.

    Tokenizing ' sports' apart from 'Label:' could split words as the model never saw them.
    """
    if len(parts) == 1:
        return [(tokenize(parts[0][0]), parts[0][1])]
    ids = tokenize("".join(text for text, _ in parts))
    if b"".join(piece(i) for i in ids) != "".join(text for text, _ in parts).encode():
        return [(tokenize(text), scored) for text, scored in parts]  # SentencePiece adds spaces
    result, at, byte, end = [], 0, 0, 0
    for text, scored in parts:
        end += len(text.encode())
        first = at
        while at < len(ids) and byte + len(piece(ids[at])) <= end:
            byte += len(piece(ids[at]))
            at += 1
        if scored is False and at < len(ids) and piece(ids[at])[: end - byte].strip():
            byte += len(piece(ids[at]))  # a token across the border is not only the answer's,
            at += 1  # unless it only brings the space before it
        result.append((ids[first:at], scored))
    result[-1] = (result[-1][0] + ids[at:], result[-1][1])
    return [part for part in result if part[0]]

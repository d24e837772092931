"""Decoding a mix one token after another, with some drafted ahead where that pays.

A round drafts a few tokens (drafting.py), the models of the mix verify them in one batch, and the
target's sampler runs over the fused rows in order. Each fused row, and so each pick, is that of
lockstep (a round without a draft): the same seed gives the same text, except at near ties.
llama.cpp sums a batch in another order than single tokens: logits differ by about 1e-6 in float32,
and by 0.03 to 0.2 with quantized weights, depending on the processor. Source: Leviathan et al.
2023, "Fast Inference from Transformers via Speculative Decoding" (arXiv 2211.17192), with one of
the mixed models as the draft.
"""

from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trimix_gguf.answering.drafting import DRAFTER, MOST_DRAFTED, Draft, Drafting, Need, draft
from trimix_gguf.answering.lookup import Lookup
from trimix_gguf.answering.steering import Steering
from trimix_gguf.errors import NothingAllowed, PromptError
from trimix_gguf.mixing.fusion import Mix, Rows
from trimix_gguf.mixing.sampler import Sampler
from trimix_gguf.roles import Role
from trimix_gguf.trio.strand import Strand

_OTHER_TEXT = (
    "the trio has read another prompt since this answer began; finish one answer before the next, "
    "or open a second trio (Trio.load with beside=)"
)


@dataclass(frozen=True)
class Step:
    """One token of the target's choice; `rows` are the models' own, [n_vocab] each."""

    token: int
    fused: NDArray[np.float32]
    rows: Rows
    from_draft: bool


def decode_steps(
    strand: Strand,
    steering: Steering,
    sampler: Sampler,
    *,
    drafting: Drafting,
    max_tokens: int,
    also: Sequence[Role] = (),
) -> Generator[Step, None, None]:
    """Yield the target's tokens one by one, without end; `strand` is decoded by itself.

    The rules are those of drafted_steps.
    """
    steps = drafted_steps(
        strand, steering, sampler, drafting=drafting, max_tokens=max_tokens, also=also
    )
    with closing(steps):
        found = next(steps)
        while True:
            if isinstance(found, Step):
                yield found
                found = next(steps)
            else:
                found = steps.send(strand.tail_rows(*found))


def drafted_steps(
    strand: Strand,
    steering: Steering,
    sampler: Sampler,
    *,
    drafting: Drafting,
    max_tokens: int,
    also: Sequence[Role] = (),
) -> Generator[Step | Need, Rows | None, None]:
    """Yield the target's tokens one by one, without end, and between them what it needs to go on.

    A Need is answered by its rows [n, n_vocab]. So whoever reads can read for several at once:
    a round of each ends with the first Step that is not `from_draft`.

    The caller has `sampler` accept each token, and `steering` take it, before it asks for the
    next, and asks for no more than `max_tokens`. `also` are roles whose rows it wants though the
    mix does not. However it ends, the strand then holds what it held, and the tokens yielded except
    for the last. Raises PromptError where the strand was given another text meanwhile.
    """
    text, needed = strand.n_texts, _needed(strand, steering, also)
    history = _History(strand, needed, drafting)
    n_ahead, n_left = 0, max_tokens  # tokens that the strand holds beyond the one yielded last
    try:
        while True:
            yield from _settle(strand, steering)
            needed = _needed(strand, steering, also)
            drafted = yield from _next_draft(strand, sampler, drafting, history, needed, n_left)
            n_ahead = n = len(drafted.tokens)
            read = (yield _verifiers(drafted, needed), n + 1) or {}
            # The accept rule: a drafted token is kept while the target's sampler picks it too;
            # the first other pick is the target's own token, and ends the round.
            for i in range(n + 1):
                rows = yield from _rows_at(drafted, read, needed, i)
                fused, token = _pick(steering.mix, rows, strand, sampler)
                accepted = i < n and token == drafted.tokens[i]
                if n == 0:
                    drafting.watch(rows.get(DRAFTER), token)
                elif not accepted:
                    _end_round(strand, drafting, drafted, n, i)
                n_ahead, n_left = n - i if accepted else 0, n_left - 1
                history.append(token)
                yield Step(token, fused, rows, accepted)
                if strand.n_texts != text:
                    raise PromptError(_OTHER_TEXT)
                if not accepted:
                    strand.advance(token)
                    break
                if steering.n_owed:  # the rest of the draft may not be this mix's to pick
                    _end_round(strand, drafting, drafted, i + 1, i + 1)
                    n_ahead = 0
                    break
    finally:
        if strand.n_texts == text:
            strand.rewind(n_ahead)


def _pick(
    mix: Mix, rows: Rows, strand: Strand, sampler: Sampler
) -> tuple[NDArray[np.float32], int]:
    """The fused row [n_vocab] and the token picked from it.

    A grammar or a schema has to be followed. So where it allows no token that large_ins finds
    plausible, the threshold gives way.
    """
    fused = mix.fuse(rows, strand.unused)
    try:
        return fused, sampler.sample(fused)
    except NothingAllowed:
        if not mix.is_masked:
            raise
    fused = Mix(mix.weights).fuse(rows, strand.unused)
    return fused, sampler.sample(fused)


def _settle(strand: Strand, steering: Steering) -> Generator[Need, Rows, None]:
    """Have `steering` see what it has to before the next token is picked."""
    if n := steering.n_owed:
        read = yield steering.consults, n + 1  # the last row is that of the next token
        steering.see({role: rows[:-1] for role, rows in read.items()})


def _needed(strand: Strand, steering: Steering, also: Sequence[Role]) -> tuple[Role, ...]:
    """Roles whose rows the next round wants."""
    return tuple(role for role in strand.models if role in {*steering.roles, *also})


class _History:
    """The tokens so far, to find what repeats earlier text.

    Nothing is looked up where the length of drafts is fixed.
    """

    def __init__(self, strand: Strand, needed: Sequence[Role], drafting: Drafting) -> None:
        self._drafting, self._used = drafting, drafting.n_draft is None
        self.lookup = Lookup(strand.ids[needed[0]] if self._used else ())
        self.match = self.lookup.find()

    def append(self, token: int) -> None:
        """Take in the newest token, and tell `drafting` whether the match had found it."""
        if not self._used:
            return
        if self.match is not None:
            self._drafting.check(self.match, token)
        self.lookup.append(token)
        self.match = self.lookup.find()


def _next_draft(
    strand: Strand,
    sampler: Sampler,
    drafting: Drafting,
    history: _History,
    needed: Sequence[Role],
    n_left: int,
) -> Generator[Need, Rows, Draft]:
    """Append a draft to the strand, from earlier text or by small_cpt; it may be empty.

    It leaves room for the target's own token in the window, the context and `n_left`.
    """
    most = max(0, min(MOST_DRAFTED, drafting.most(strand), strand.room - 1, n_left - 1))
    plan = drafting.plan(strand, needed, most)
    n_found = drafting.n_found(plan, history.match, most)
    if history.match is None or not n_found:
        return (yield from draft(strand, sampler, drafting, plan))
    tokens = history.lookup.following(history.match, n_found)
    for token in tokens:
        strand.advance(token)
    return Draft(tokens, looked_up=True)


def _verifiers(drafted: Draft, needed: Sequence[Role]) -> tuple[Role, ...]:
    """Roles that read the draft in one batch: small_cpt has read its own already."""
    return tuple(role for role in needed if not drafted.rows or role != DRAFTER)


def _rows_at(
    drafted: Draft, read: Rows, needed: Sequence[Role], i: int
) -> Generator[Need, Rows, Rows]:
    """The models' rows [n_vocab] before drafted token `i`, or after the last one."""
    rows = {role: matrix[i] for role, matrix in read.items()}
    if DRAFTER in needed and DRAFTER not in read:
        if i < len(drafted.rows):
            rows[DRAFTER] = drafted.rows[i]
        else:
            rows[DRAFTER] = (yield (DRAFTER,), 1)[DRAFTER][0]
    return rows


def _end_round(
    strand: Strand, drafting: Drafting, drafted: Draft, n_tried: int, n_accepted: int
) -> None:
    """Forget the drafted tokens that were not accepted, and tell `drafting` of those tried."""
    strand.rewind(len(drafted.tokens) - n_accepted)
    if drafted.looked_up:
        drafting.count(n_tried, n_accepted)
    else:
        drafting.learn(drafted.confidences[:n_tried], n_accepted)

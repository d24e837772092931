"""What each model made of an answer, as a table: `/why` in a chat."""

import sys
from typing import Any

_N_CELLS = 24  # of a token's text


def print_why(conversation: Any) -> None:
    """Print the last answer's tokens with each model's probability, and the model that decided.

    Raises PromptError where there is no answer of this session.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from trimix_gguf.answering.conversation import pulls
    from trimix_gguf.errors import PromptError
    from trimix_gguf.roles import ROLES

    tokens, n_vocab = conversation.trace, conversation.trio.n_vocab
    if not tokens:
        raise PromptError("there is no answer to explain; say something first")
    # After the guard, or with weights of each token, not every model reads all of them.
    roles = [role for role in ROLES if any(role in token.probabilities for token in tokens)]
    weights, model = conversation.last.selection.weights, conversation.trio.models[ROLES[0]]
    table = Table("token", *roles, "mix", "spoke", box=None, pad_edge=False, header_style="bold")
    for column in table.columns[1:-1]:
        column.justify = "right"
    n_led, drawn = dict.fromkeys(roles, 0), dict.fromkeys(roles, 0.0)
    for token in tokens:
        pull = pulls(token.probabilities, token.mix.weights, n_vocab)
        spoke = max(pull, key=lambda role: pull[role])
        n_led[spoke] += 1
        for role, nats in pull.items():
            drawn[role] += max(nats, 0.0)
        values = (token.probabilities.get(name) for name in (*roles, "fused"))
        piece = model.piece(token.id, special=True).decode("utf-8", "replace")
        table.add_row(Text(_shown(piece)), *(_percent(p) for p in values), spoke)
    Console(file=sys.stdout, highlight=False).print(table)
    if (n := conversation.last.guard) is not None:
        print(f"guard: the mix repeated itself; after {n} tokens large_ins went on by itself")
    total = sum(drawn.values()) or 1.0
    print(f"alpha {weights.alpha:.3g}, beta {weights.beta:.3g}, {len(tokens)} tokens")
    if reason := conversation.last.selection.reason:
        print(f"auto: {reason}")
    for role in sorted(roles, key=lambda role: -drawn[role]):
        share = f"{100 * drawn[role] / total:.0f} % of the pull"
        print(f"{role}: spoke {n_led[role]} of {len(tokens)} tokens, {share}")
    print("pull: a model's coefficient times ln(its probability / chance); the highest spoke")
    sys.stdout.flush()


def _shown(piece: str) -> str:
    text = "".join(c if c.isprintable() or c in "\u200c\u200d" else repr(c)[1:-1] for c in piece)
    return (text[: _N_CELLS - 1] + "…" if len(text) > _N_CELLS else text).replace(" ", "·")


def _percent(p: float | None) -> str:
    if p is None:
        return "–"
    return f"{100 * p:.1f} %" if p >= 0.0005 else "< 0.1 %"

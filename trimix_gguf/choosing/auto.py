"""The automatic choice: weights that do not cost the best model.

Perplexity finds the mix that knows the language. For text that goes on, that is the right mix.
A question wants an answer, and a small_cpt that read little text answers worse the more it is
heard (Elhady et al. 2025, arXiv 2506.00288). So for questions a measurement decides, made once
for the trio (`trimix tune`): one of answers among choices where there are choices, one of free
answers elsewhere. Without such a measurement, the mix stays close to large_ins.
"""

from collections.abc import Callable, Sequence

from trimix_gguf.mixing.fusion import Weights
from trimix_gguf.mixing.scoring import Float64, lowest, strays
from trimix_gguf.roles import ROLES
from trimix_gguf.trio.prompt import Prompt

# Nats of likelihood that a nat of distance from large_ins must bring, where nothing was measured.
LEASH = 4.0
_ENDS_OF_QUESTIONS = (":", "：", "?", "？", "؟", "՞", "፧", "\u037e")  # the last is Greek
_TAIL = 40  # tokens that are looked at


def asks(prompt: Prompt, text_of: Callable[[Sequence[int]], str]) -> bool:
    """Whether a prompt asks for an answer; else it is a text that goes on.

    It asks where it is a chat, where some of it is marked as answers, or where its last line ends
    as a question or a label does ("…?", "Answer:"). `text_of` ids gives their text.
    """
    if prompt.is_marked or any(len(set(s.ids.values())) > 1 for s in prompt.segments):
        return True
    tail = [i for s in prompt.segments for i in s.ids[ROLES[0]]][-_TAIL:]
    lines = text_of(tail).strip().splitlines()
    return bool(lines) and lines[-1].rstrip().endswith(_ENDS_OF_QUESTIONS)


def on_a_leash(
    nll: Float64, slopes: Float64, alphas: Sequence[float], betas: Sequence[float]
) -> Weights:
    """The lowest of NLL + LEASH × KL(large_ins ‖ mix) over the mixes with alpha = 1.

    `nll` [n_alpha, n_beta] over a grid with (1, 0), and `slopes` [2], are summed over the same
    tokens. Both terms are convex, so the choice moves away from large_ins only as far as the prompt
    pays for it. With alpha = 1 all of large_ins is heard, and of small_cpt only what it learned
    since small_base: if it learned nothing, the mix is large_ins. With less, a weaker model takes
    its place in part. That often has a lower NLL, for it blurs; but free answers get worse.
    """
    strained = nll + LEASH * strays(nll, slopes, alphas, betas)
    at = list(alphas).index(1.0)
    return lowest(strained[at : at + 1], alphas[at : at + 1], betas)

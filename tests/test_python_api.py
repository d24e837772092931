"""The package from a Python program: closed trios, answers that cross, options as given."""

import subprocess
import sys
import weakref

import pytest
from conftest import KAZAKH

from trimix_gguf import Trio, Weights, generate, score, select_weights, stream_generate
from trimix_gguf.errors import ModelError, PromptError, WeightsError

GREEDY = {"weights": Weights(1, 0), "temperature": 0, "max_tokens": 5}


def test_a_closed_trio_is_refused_and_its_weights_are_free():
    """Bug: llama.cpp crashed, and the weights stayed in memory as long as the trio's name."""
    with Trio.nano(n_threads=1) as trio:
        prompt = trio.prompt(KAZAKH)
        late = stream_generate(trio, prompt, **GREEDY)
        next(late)
        weights = [weakref.ref(model._weights) for model in trio.models.values()]
    assert [known() for known in weights] == [None, None, None]
    for use in (
        lambda: next(late),
        lambda: generate(trio, prompt, **GREEDY),
        lambda: score(trio, prompt),
        lambda: trio.prompt(KAZAKH),
        lambda: trio.rows(),
        lambda: trio.sequences.fork(),
    ):
        with pytest.raises(ModelError, match="is closed; open its trio again"):
            use()
    trio.close()


def test_an_answer_that_is_left_at_the_end_of_a_program_says_nothing():
    """Bug: Python told of an ImportError in the costs that it was to keep."""
    program = (
        "from trimix_gguf import Trio, stream_generate\n"
        "events = stream_generate(Trio.nano(n_threads=1), 'Абай')\n"
        "def show():\n"  # holds the module's names past its end
        "    print(next(events).n_tokens)\n"
        "show()\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=120)
    assert (ended.returncode, ended.stdout.split(), ended.stderr) == (0, [b"1"], b"")


def test_the_perplexity_of_weights_that_were_not_scored_is_refused(trio):
    """Bug: a grid of any points was read as Chebyshev's, and gave some number."""
    prompt, known, other = trio.prompt(KAZAKH), Weights(0.3, 0.5), Weights(0.4, 0.4)
    plain = score(trio, prompt, also=[known])
    assert plain.perplexity(known) > 1
    outside = Weights(2.0, 0.4)  # of the range that a continuous score knows
    continuous = score(trio, prompt, grid="continuous")
    exact = score(trio, prompt, also=[other]).perplexity(other)
    assert continuous.perplexity(other) == pytest.approx(exact, rel=1e-3)
    for scored, weights in ((plain, other), (continuous, outside)):
        with pytest.raises(WeightsError, match="were not scored"):
            scored.perplexity(weights)


@pytest.mark.parametrize("method", ["ppl", "ent", "token"])
def test_without_a_prompt_or_a_point_nothing_is_chosen(trio, method):
    """Bug: `ent` took the first point of the grid for no prompt; no point was a ValueError."""
    with pytest.raises(PromptError, match="no prompt"):
        select_weights(trio, [], method=method)
    with pytest.raises(WeightsError, match="at least one alpha and one beta"):
        select_weights(trio, trio.prompt(KAZAKH), method=method, grid=((), (0.5,)))


@pytest.mark.parametrize("speculative", ["off", "on"])
def test_two_answers_at_once_on_one_trio_do_not_mix(trio, speculative):
    """Bug: both went on in the text of the other, and neither said so."""
    options = {**GREEDY, "weights": Weights(0, 1), "max_tokens": 12, "speculative": speculative}
    alone = generate(trio, KAZAKH, **options).text
    first = stream_generate(trio, "Абай", **options)
    next(first)
    second = stream_generate(trio, KAZAKH, **options)
    begun = next(second).text
    with pytest.raises(PromptError, match="another prompt"):
        next(first)
    assert begun + "".join(event.text for event in second) == alone
    third = stream_generate(trio, "Абай", **options)
    next(third)
    again = stream_generate(trio, KAZAKH, **options)
    begun = next(again).text
    third.close()  # left, as by a `break`
    assert begun + "".join(event.text for event in again) == alone

"""Grammars in GBNF: obeyed, and at a bounded cost."""

import re

import pytest
from conftest import KAZAKH

from trimix_gguf import Weights, generate
from trimix_gguf.errors import SamplerError
from trimix_gguf.mixing.grammar import Grammar

JSON = r"""root ::= "{" ws (string ":" ws value ("," ws string ":" ws value)*)? "}"
value ::= root | array | string | number | ("true" | "false" | "null") ws
array ::= "[" ws (value ("," ws value)*)? "]" ws
string ::= "\"" ([^"\\\x7F\x00-\x1F] | "\\" (["\\bfnrt] | "u" [0-9a-fA-F]{4}))* "\"" ws
number ::= "-"? ("0" | [1-9] [0-9]{0,15}) ("." [0-9]+)? ws
ws ::= | " " | "\n" [ \t]{0,20}
"""
FINE = ['root ::= ([а-я]+ " ")+', 'root ::= ""', "root ::= [a-z]{1,500}", JSON]
# It doubles, at each token, what may come; then what may be empty repeats itself.
COSTLY = [
    'root ::= n\nn ::= "[" n ("," n)* "]" | "[" n "]" | "[" n',
    'root ::= ("a"?){1000}',
    'root ::= (("a"?){30}){30}',
]


@pytest.mark.parametrize("text", FINE)
def test_a_usual_grammar_is_taken(trio, text):
    Grammar.parse(trio.models["large_ins"].vocab, text)


@pytest.mark.parametrize("text", COSTLY)
def test_a_costly_grammar_is_refused_before_it_costs(trio, text):
    """Bug: a step took seconds, then minutes, and Ctrl-C did not come through."""
    with pytest.raises(SamplerError, match="too costly"):
        Grammar.parse(trio.models["large_ins"].vocab, text)


@pytest.mark.parametrize("text", ["root ::= (", 'x ::= "a"', "root ::= b", 'root ::= root "a"', ""])
def test_what_is_no_grammar_is_refused(trio, text):
    with pytest.raises(SamplerError, match="cannot parse"):
        Grammar.parse(trio.models["large_ins"].vocab, text)


def test_a_grammar_is_obeyed_and_a_copy_goes_its_own_way(trio):
    model = trio.models["large_ins"]
    grammar = Grammar.parse(model.vocab, 'root ::= "ab" | "ac"')
    a, b, c = (model.tokenize(letter)[0] for letter in "abc")
    assert grammar.allows(a) and not grammar.allows(b)
    grammar.accept(a)
    twin = grammar.clone()
    twin.accept(b)
    assert grammar.allows(c) and not twin.allows(c)
    answer = generate(
        trio, KAZAKH, weights=Weights(0.5, 0.5), max_tokens=12, grammar="root ::= [а-я]+"
    )
    assert re.fullmatch("[а-я]+", answer.text)

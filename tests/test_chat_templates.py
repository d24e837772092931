"""What a chat template says of contents holds for all three, and what it costs is bounded."""

import os

import pytest
from jinja2 import TemplateError
from test_chat import THINKING, VICUNA, by_jinja, ids_of, said, spelled

from trimix_gguf.answering.chat import chat_prompt
from trimix_gguf.answering.templates import OWN, render
from trimix_gguf.errors import PromptError
from trimix_gguf.machine.worker import Worker
from trimix_gguf.roles import ROLES


def read_by(trio, role, *arguments, **options):
    return spelled(trio, ids_of(chat_prompt(trio, *arguments, **options), role))


def test_what_a_template_says_of_contents_holds_for_all_three(trio):
    """Bug: the template never saw the contents, so reasoning of the past was read again."""
    past = "<think>\nlet me add them\n</think>\n\n4"
    messages = said("2+2?", past, "3+3?", roles=("user", "assistant", "user"))
    for role in ROLES:
        text = read_by(trio, role, messages, template=THINKING)
        assert "add them" not in text and "4" in text
    assert read_by(trio, "large_ins", messages, template=THINKING).endswith(
        "<|user|>\n3+3?<|end|>\n<|assistant|>\n"
    )
    assert "Assistant:\n4\n\nUser:\n3+3?" in read_by(trio, "small_cpt", messages, template=THINKING)
    now = read_by(trio, "large_ins", messages[:2], template=THINKING)
    assert "<|assistant|>\n<think>\nlet me add them\n</think>\n\n4<|end|>" in now
    apart = [messages[0], {"role": "assistant", "content": "4", "reasoning_content": "add them"}]
    assert "<think>\nadd them\n</think>\n\n4<|end|>" in read_by(
        trio, "large_ins", apart, template=THINKING
    )
    assert "add them\n\n4\n\nAssistant:" in read_by(trio, "small_cpt", apart, template=THINKING)


def test_a_template_is_told_variables(trio):
    messages = said("2+2?", roles=("user",))
    off = read_by(
        trio, "large_ins", messages, template=THINKING, variables={"enable_thinking": False}
    )
    assert off == read_by(trio, "large_ins", messages, template=THINKING) + (
        "<think>\n\n</think>\n\n"
    )


def test_a_switch_in_a_message_is_seen(trio):
    switch = (
        "{% for m in messages %}{{ m.content }}{% if '/no_think' in m.content %}<think></think>"
        "{% endif %}{% endfor %}"
    )
    text = read_by(trio, "large_ins", said("сәлем /no_think", roles=("user",)), template=switch)
    assert text.endswith("сәлем /no_think<think></think>")


def test_an_answer_whose_reasoning_is_stripped_is_tokenized_again(trio):
    model = trio.models["large_ins"]
    past = "<think>a</think>4"
    ids = model.tokenize(past)
    messages = said("2+2?", past, "3+3?", roles=("user", "assistant", "user"))
    prompt = chat_prompt(trio, messages, template=THINKING, answers={1: ids})
    (answer,) = [s for s in prompt.segments if s.shared and not s.scored]
    assert list(answer.ids["small_cpt"]) == model.tokenize("4")


OPERATIONS = [
    "c", "c.strip()", "c.lstrip() + '|' ", "'|' + c.rstrip()", "c | trim", "c.split(' ')[-1]",
    "c.split(' ', 1)[0]", "c.rsplit(' ', 1)[-1]", "c.split()[-1]", "c.partition(' ')[2]",
    "c.rpartition(' ')[0]", "c[1:]", "c[:3]", "c[0]", "c | upper", "c | lower",
    "c | replace('a', '-')", "c.replace(' ', '  ', 1)[:4]", "[c] | join(',')", "'-'.join([c])",
    "'%s!' % c", "'{}!'.format(c)", "c ~ '!'", "'!' ~ c", "(c + ' ') | trim",
    "('x ' + c).removeprefix('x ')",
    "c.splitlines()[0]", "c | first", "c | default('x')", "c if c is string else ''",
    "c if 'a' in c else c",
    "c | string", "c.removesuffix('c')", "c | capitalize",
]  # fmt: skip


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_message_is_followed_through_what_templates_do_to_texts(operation):
    """The rendering is jinja's own; what stays of a message is known as its part."""
    template = "{% for m in messages %}{% set c = m.content %}<{{ " + operation + " }}>{% endfor %}"
    messages = said("aab bca c", " b\nac ", roles=("user", "assistant"))
    pieces = render(template=template, messages=messages, variables={})
    assert "".join(text for _, text in pieces) == by_jinja(template, messages)
    assert {i for i, _ in pieces} == {OWN, 0, 1}
    assert not any(c in text for i, text in pieces if i == OWN for c in "abcABC")


UNFOLLOWED = [
    "'{:>20}'.format(c)", "'%-20s|' % c", "c | center(30)", "(c ~ '') | length", "c | tojson",
    "c.__len__()", "c[::-1]", "c * 2", "(c ~ 'x')[3:]", "(c ~ ' ') | trim | reverse",
    "c.translate({97: 98})", "c.zfill(30)", "c.swapcase()", "c.encode()", "c | urlencode",
    "c.expandtabs()", "c.casefold()", "(c ~ c) | replace('b', 'x')", "c.ljust(20)",
]  # fmt: skip


@pytest.mark.parametrize("operation", [*UNFOLLOWED, *OPERATIONS])
def test_a_rendering_is_jinjas_own_or_refused(operation):
    """Marks are not to be counted, padded or turned round without a word."""
    template = "{% for m in messages %}{% set c = m.content %}<{{ " + operation + " }}>{% endfor %}"
    for texts in (("aab bca c", " b\nac "), ("a", "ab"), ("", " ")):
        messages = said(*texts, roles=("user", "assistant"))
        try:
            pieces = render(template=template, messages=messages, variables={})
        except TemplateError:
            continue
        assert "".join(text for _, text in pieces) == by_jinja(template, messages)


COSTLY = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "text": "{{ 'a' * 8000000000 }}",
    "macro": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "format": "{{ '%9999999999d' | format(1) }}",
    "filter": "{{ lipsum(n=100000000) }}",
    "number": "{{ 9 ** (9 ** (9 ** 9)) }}",
}


@pytest.mark.parametrize("name", COSTLY)
def test_what_a_template_costs_is_bounded(trio, name):
    """Bug: two nested loops held the server for ever; a long text was a trace."""
    messages = said("a", roles=("user",))
    with pytest.raises(PromptError, match="refuses the messages"):
        chat_prompt(trio, messages, template=COSTLY[name] + "{{ messages[0].content }}")
    assert chat_prompt(trio, messages, template=VICUNA)  # a new process serves the next one


def test_a_template_cannot_read_the_environment():
    os.environ["TRIMIX_SECRET"] = "sesame"
    try:
        worker = Worker("worker_target", most=1)
        assert "sesame" not in worker.call("environment")
        worker.close()
    finally:
        del os.environ["TRIMIX_SECRET"]


def test_more_messages_than_tokens_are_refused_first(trio, monkeypatch):
    """Bug: 30,000 messages were laid out, in two minutes, before their length was looked at."""
    monkeypatch.setattr("trimix_gguf.answering.chat._render", None)
    with pytest.raises(PromptError, match="do not fit a context"):
        chat_prompt(trio, [{"role": "user", "content": "a"}] * 30_000)


def test_a_long_chat_costs_as_much_per_message_as_a_short_one():
    """Counted in characters that are looked at, which once were those of the whole per message."""
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    messages = [{"role": "user", "content": "ab"}] * 20_000
    worker = Worker("trimix_gguf.answering.templates", most=1)  # with its limit on processor time
    answer = worker.call({"template": template, "messages": messages, "variables": {}})
    worker.close()
    assert sum(i >= 0 for i, _ in answer["pieces"]) == 20_000

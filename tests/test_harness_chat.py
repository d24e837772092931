"""The chat that the harness renders by large_ins' template."""

from pathlib import Path

import pytest
from conftest import KAZAKH

pytest.importorskip("lm_eval")

from trimix_gguf import Trio  # noqa: E402
from trimix_gguf.answering.chat import render_chat  # noqa: E402
from trimix_gguf.errors import PromptError  # noqa: E402
from trimix_gguf.evaluation.running.harness import TrimixLM  # noqa: E402

TRICKY = """{{ bos_token }}{% for m in messages %}
    {% if m.role == 'system' and strict %}{{ raise_exception('no system') }}{% endif %}
    {% if loop.index > 9 %}{% break %}{% endif %}
    {% generation %}<{{ m.role }}>{{ m.content | trim }}{{ m | tojson }}{% endgeneration %}</>
{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"""
MESSAGES = [
    {"role": "system", "content": "Сен <көмекшісің> & т.б."},
    {"role": "user", "content": KAZAKH},
    {"role": "assistant", "content": "Жауап: "},
]


@pytest.fixture(scope="module")
def trio():
    """One thread: these are many small decodes, which two on a busy machine wait for."""
    with Trio.nano(n_threads=1) as opened:
        yield opened


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("template", ["{{ messages[-1].content }}", TRICKY, None])
def test_chat_is_rendered_as_transformers_does(trio, template, add_generation_prompt):
    library = pytest.importorskip("transformers.utils.chat_template_utils")
    template = template or TrimixLM(trio).chat_template(True)
    if template == TRICKY and not add_generation_prompt:
        template = template.replace("{{ m | tojson }}", "")  # would hold the mark twice
    theirs, _ = library.render_jinja_template(
        [MESSAGES],
        chat_template=template,
        add_generation_prompt=add_generation_prompt,
        continue_final_message=not add_generation_prompt,
        bos_token="<s>",
    )
    ours = render_chat(
        template,
        MESSAGES,
        add_generation_prompt=add_generation_prompt,
        variables={"bos_token": "<s>"},
    )
    assert ours == theirs[0] and MESSAGES[-1]["content"] == "Жауап: "


def test_a_template_that_refuses_system_messages(trio, monkeypatch):
    lm, model = TrimixLM(trio), trio.models["large_ins"]
    monkeypatch.setattr(model, "chat_template", "{% set strict = 1 %}" + TRICKY)
    text = lm.apply_chat_template(MESSAGES[:2])
    bos = trio.models["large_ins"].piece(lm.prefix_token_id, special=True)
    assert text.startswith(bos.decode())
    assert KAZAKH in text and "көмекшісің" not in text
    with pytest.raises(PromptError, match="refuses the messages: no system"):
        lm.apply_chat_template(MESSAGES[:1])
    monkeypatch.setattr(model, "chat_template", None)
    with pytest.raises(PromptError, match="has no chat template"):
        lm.apply_chat_template(MESSAGES)


def test_the_template_asked_for_and_the_name_of_the_tokenizer(trio, monkeypatch):
    lm, model = TrimixLM(trio), trio.models["large_ins"]
    assert lm.chat_template(False) is None
    assert lm.chat_template(True) == model.file.metadata["tokenizer.chat_template"]
    name = lm.tokenizer_name
    assert name.startswith("large_ins-") and Path(name).name == name
    monkeypatch.setattr(model, "chat_template", TRICKY)
    assert lm.tokenizer_name != name

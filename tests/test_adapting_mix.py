"""What `trimix adapt` chooses by, the mix of the model in training; and embeddings."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

for needed in ("torch", "transformers", "peft", "accelerate", "ftfy", "datasketch"):
    pytest.importorskip(needed, reason="needs the extra: pip install -e '.[adapt]'")

import torch  # noqa: E402

from trimix_gguf.adapting import partner as partners  # noqa: E402
from trimix_gguf.adapting import questions as asking  # noqa: E402
from trimix_gguf.adapting.bases import Base, Tokenizer, load_base  # noqa: E402
from trimix_gguf.adapting.history import ENDS, best_of  # noqa: E402
from trimix_gguf.adapting.judging import Judge, Judgement, _Reader  # noqa: E402
from trimix_gguf.adapting.partner import Partner  # noqa: E402
from trimix_gguf.adapting.publishing import merged, write_adapter  # noqa: E402
from trimix_gguf.adapting.rows import Rows, measured_rows  # noqa: E402
from trimix_gguf.adapting.taught import add_adapter, head_rows, make_taught  # noqa: E402
from trimix_gguf.errors import ConversionError  # noqa: E402
from trimix_gguf.machine.loading import Loading  # noqa: E402
from trimix_gguf.mixing.fusion import Weights  # noqa: E402
from trimix_gguf.trio.model import Model  # noqa: E402
from trimix_gguf.trio.trio import NANO  # noqa: E402
from trimix_gguf.trios.store import resolve  # noqa: E402

SMALL = Base(NANO / "small_base.gguf")


@pytest.fixture(scope="module")
def nano():
    """Nano's small_base, and a few exercises of its sample of text."""
    text = (NANO / "text.txt").read_text("utf-8").splitlines()
    tokenizer = Tokenizer(SMALL)
    questions = asking.questions_of(text, tokenizer, SMALL.file.n_ctx_train, 0)
    judge = Judge(measured_rows(text, tokenizer, n_rows=1, n_block=64), None, questions[::8])
    return SimpleNamespace(model=load_base(SMALL, "float32"), judge=judge, all=questions)


def with_partner(nano, folder):
    questions = nano.judge.questions
    partner = Partner(folder, questions)
    partner.read_large_ins(NANO / "large_ins.gguf", lambda at: None)
    return Judge(nano.judge.heldout, None, questions, partner)


def test_there_are_as_many_exercises_as_said_and_others_than_tune_asks(nano):
    assert asking.N_EXERCISES <= len(nano.all) < asking.N_EXERCISES + 4
    text = (NANO / "text.txt").read_text("utf-8").splitlines()
    other = asking.questions_of(text, Tokenizer(SMALL), SMALL.file.n_ctx_train, -1)  # tune's seed 0
    assert [q.rest for q in nano.all] != [q.rest for q in other]


def test_rows_read_side_by_side_are_those_of_each_text_by_itself(nano):
    reader = _Reader(nano.model.eval())
    assert {len(choice) for q in nano.judge.questions for choice in q.choices} > {1}
    for question in nano.judge.questions:
        with torch.inference_mode():
            found = reader.rows(question)
            whole = [
                nano.model(torch.tensor([[*question.shared, *question.rest, *choice[:-1]]])).logits
                for choice in question.choices
            ]
        expected = [whole[0][0, len(question.shared) + len(question.rest) - 1][None]]
        expected += [one[0, one.shape[1] - (len(choice) - 1) :]
                     for one, choice in zip(whole, question.choices, strict=True)
                     if len(choice) > 1]  # fmt: skip
        assert found.shape == (question.n_rows, SMALL.file.n_items("tokenizer.ggml.tokens"))
        torch.testing.assert_close(found, torch.cat(expected), atol=2e-3, rtol=1e-3)


def test_each_corner_of_the_mix_is_one_model(nano, tmp_path, monkeypatch):
    corners = (Weights(1.0, 0.0), Weights(0.0, 1.0), Weights(0.0, 0.0))
    monkeypatch.setattr(partners, "PAIRS", corners)
    judge = with_partner(nano, tmp_path)
    first = judge.look(nano.model, 0, "float32")
    assert first.mixed[0] == judge.partner.alone()
    assert np.allclose(first.mixed[1], first.mixed[2], atol=0.01)  # untaught: float16's rounding
    changed = add_adapter(load_base(SMALL, "float32"), 4)
    with torch.no_grad():
        for name, numbers in changed.named_parameters():
            if "lora_B" in name:
                numbers.normal_(0, 0.05)
    later = judge.look(changed, 1, "float32")
    assert later.mixed[0] == first.mixed[0] and later.mixed[2] == first.mixed[2]
    assert not np.allclose(later.mixed[1], first.mixed[1], atol=0.01)


def test_large_ins_answers_as_it_does_text_by_text(nano, tmp_path):
    """What is kept in its caches between questions and choices changes no row."""
    judge = with_partner(nano, tmp_path)
    sure = judge.partner.alone()
    model = Model(NANO / "large_ins.gguf", Loading(n_ctx=1024))
    ids = judge.partner.ids
    columns = {int(token): at for at, token in enumerate(ids)}
    for question, found in zip(judge.questions, sure, strict=True):
        rows = []
        for choice in [[0], *(c for c in question.choices if len(c) > 1)]:
            read = [*question.shared, *question.rest, *choice[:-1]]
            model.rewind(0)
            n_last = max(len(choice) - 1, 1)
            for at in range(0, len(read) - n_last, 64):
                model.decode(read[at : min(at + 64, len(read) - n_last)])
            rows.append(model.decode(read[-n_last:], every_row=True)[:, ids])
        logits = torch.from_numpy(np.concatenate(rows))
        expected = question.probabilities(logits.log_softmax(-1), columns)[question.right]
        assert found == pytest.approx(float(expected), abs=0.01)


def test_large_ins_is_read_once_per_run(nano, tmp_path):
    first = with_partner(nano, tmp_path).partner
    again = Partner(tmp_path, nano.judge.questions)
    again.read_large_ins(tmp_path / "absent.gguf", lambda at: None)
    assert again.alone() == first.alone()
    files = sum(file.stat().st_size for file in tmp_path.iterdir())
    assert 2 * files == pytest.approx(first.n_bytes, rel=0.02)  # small_base's are to come


def looked(step, perplexity, sure, mixed):
    return Judgement(step, perplexity, None, 0.5, [sure] * 64, mixed=mixed)


def test_a_model_that_got_worse_in_the_mix_is_not_kept():
    """More tokens had made it better by itself and at the language, and worse as a partner."""
    rng = np.random.default_rng(3)
    noise = rng.uniform(0.2, 0.8, 64)
    middle = looked(1, 11.0, 0.5, [noise.tolist(), noise.tolist()])
    fallen = looked(2, 8.6, 0.6, [(noise - 0.1).tolist(), (noise - 0.02).tolist()])
    level = looked(3, 10.0, 0.5, [(noise + rng.normal(0, 0.1, 64)).tolist()] * 2)
    assert best_of([middle, fallen]) is middle
    assert fallen.falls_below(middle, ENDS)
    assert best_of([middle, fallen, level]) is level
    mean, error = middle.partner
    assert mean == pytest.approx(noise.mean()) and error == pytest.approx(noise.std() / 8)
    # Without large_ins its own answers decide.
    assert best_of([looked(1, 11.0, 0.5, []), looked(2, 8.6, 0.6, [])]).step == 2


# -- embeddings -------------------------------------------------------------------------------


def untied():
    import transformers

    torch.manual_seed(3)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=96,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            tie_word_embeddings=False,
        )  # fmt: skip
    )


@pytest.mark.parametrize("make", [lambda: load_base(SMALL, "float32"), untied], ids=["tied", "not"])
def test_embeddings_learn_and_the_merged_model_is_the_taught_one(make):
    model = add_adapter(make(), 4, embeddings=True)
    ids = np.random.default_rng(1).integers(5, 90, (2, 24)).astype(np.int32)
    taught = make_taught(model, Rows(ids, np.ones_like(ids, np.uint8)))
    tensors = torch.from_numpy(ids).long(), torch.ones(ids.shape)
    adam = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 5e-3)
    before = float(taught(*tensors).detach())
    for _ in range(3):
        adam.zero_grad()
        taught(*tensors).backward()
        adam.step()
    assert float(taught(*tensors).detach()) < before
    whole = model.get_base_model()
    table = whole.get_input_embeddings()
    assert float(table.lora_embedding_A["default"].detach().abs().max()) > 0
    with torch.inference_mode():
        loss = float(taught(*tensors))
        logits = model(tensors[0]).logits
        rows = head_rows(whole, tensors[0][0])
        alone = merged(model)
        torch.testing.assert_close(alone(tensors[0]).logits, logits, atol=2e-3, rtol=1e-3)
        torch.testing.assert_close(alone.get_output_embeddings().weight[tensors[0][0]], rows)
        one = alone(tensors[0]).logits[:, :-1][..., np.unique(ids)].log_softmax(-1)
    at = torch.from_numpy(np.searchsorted(np.unique(ids), ids[:, 1:]))
    assert loss == pytest.approx(-float(one.gather(-1, at[..., None]).mean()), rel=1e-3)


def test_tied_embeddings_need_a_whole_model_and_that_is_said_first(adapt, text_file, tmp_path):
    model = add_adapter(load_base(SMALL, "float32"), 4, embeddings=True)
    with pytest.raises(ConversionError):
        write_adapter(model, tmp_path, tmp_path / "a.gguf")
    options = ("--tokens", 4096, "--train-embeddings", "--no-tune")
    done = adapt("qazaq", text_file, *options)
    assert done.exit_code == 0, done.output
    said = done.stderr.splitlines()
    assert any("the result is a whole model" in line for line in said[:2])
    assert resolve("qazaq").models["small_cpt"].adapter_of is None
    made = json.loads((resolve("qazaq").folder / "adapted.json").read_text("utf-8"))
    assert all(len(one["mixed"]) == len(partners.PAIRS) for one in made["history"])
    assert adapt("b", text_file, "--full", "--train-embeddings").exit_code == 2

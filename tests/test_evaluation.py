"""Reading and continuing a task's prompts, on the nano trio."""

import json
from collections import Counter

import numpy as np
import pytest
from conftest import KAZAKH
from topics import EXEMPLARS, QUESTION, TOPICS, ask_here, scored

from trimix_gguf import Trio, Weights, generate, score, select_weights
from trimix_gguf.answering import steering
from trimix_gguf.answering.chat import around_message
from trimix_gguf.choosing.choices import choices_after
from trimix_gguf.errors import ContextFullError
from trimix_gguf.evaluation.names.axis import AXIS
from trimix_gguf.evaluation.names.settings import RunSettings
from trimix_gguf.evaluation.running import asking, loops
from trimix_gguf.evaluation.running.continuing import Continuation, Start, continue_all, roles_of
from trimix_gguf.evaluation.running.loops import Loop
from trimix_gguf.evaluation.running.mixes import continuations
from trimix_gguf.evaluation.running.prompts import open_task
from trimix_gguf.evaluation.running.reading import Reader, Reading
from trimix_gguf.evaluation.tasks.task import Dataset, Example, Task
from trimix_gguf.mixing.fusion import Mix
from trimix_gguf.mixing.scoring import GRID, chebyshev_nodes
from trimix_gguf.roles import ROLES
from trimix_gguf.trio.prompt import Prompt, Segment
from trimix_gguf.trio.sequences import Sequences


@pytest.fixture(scope="module")
def trio():
    with Trio.nano(n_threads=1) as loaded:
        yield loaded


@pytest.fixture
def reader(trio):
    prefix = trio.prompt(EXEMPLARS)
    return Reader(trio, prefix, [i % 3 == 0 for i in range(len(prefix.units))])


def test_a_reading_is_the_score_of_the_whole_prompt(trio, reader):
    reading = reader.read(scored(trio, QUESTION))
    whole = Prompt((*reader.prefix.segments, *scored(trio, QUESTION).segments))
    expected = score(trio, whole, grid=(AXIS, AXIS))
    rows = [expected.alphas.index(a) for a in AXIS]
    columns = [expected.betas.index(b) for b in AXIS]
    assert reading.n_tokens == whole.n_tokens()
    assert reading.nlls.sum(axis=0) == pytest.approx(
        expected.nll[0][np.ix_(rows, columns)], abs=2e-3
    )
    marked = [i % 3 == 0 for i in range(len(reader.prefix.units))]
    n_question = len(whole.units) - len(reader.prefix.units)
    assert reading.answers[-n_question:].sum() == 0
    assert reading.answers.sum() == sum(marked[-(len(reading.answers) - n_question) :])


def test_continuous_is_what_generate_calls_by_that_name(trio):
    """Bug: eval had its own continuous optimum, over other weights than `--grid continuous`."""
    prefix = trio.prompt(EXEMPLARS)
    reader = Reader(trio, prefix, [False] * len(prefix.units), continuous=True)
    reading = reader.read(scored(trio, QUESTION))
    whole = Prompt((*prefix.segments, *scored(trio, QUESTION).segments))
    trio.forget()
    shipped = select_weights(trio, whole, method="ppl", grid="continuous").weights
    made = continuations(("continuous",), reading, {}, trio, with_choices=False)
    ours = made["continuous"].mix.weights
    assert (ours.alpha, ours.beta) == pytest.approx((shipped.alpha, shipped.beta), abs=0.01)


def test_a_question_gives_the_same_numbers_whatever_was_read_before(trio, reader):
    others = ["Text: Ауа райы жылы.\nTopic:", QUESTION + " спорт"]
    first = reader.read(scored(trio, QUESTION))
    for other in others:
        reader.read(scored(trio, other))
    again = reader.read(scored(trio, QUESTION))
    trio.prefill(trio.prompt(KAZAKH))  # the exemplars are gone from the caches
    trio.rows()
    once_more = reader.read(scored(trio, QUESTION))
    trio.forget()
    anew = Reader(trio, reader.prefix, [False] * len(reader.prefix.units))
    after_a_break = anew.read(scored(trio, QUESTION))
    for reading in (again, once_more, after_a_break):
        assert np.array_equal(reading.nlls, first.nlls)
        assert np.array_equal(reading.entropy, first.entropy)


def test_exemplars_are_decoded_once(trio, reader, monkeypatch):
    reader.read(scored(trio, QUESTION))
    seen = []
    model = trio.models["large_ins"]
    decode = model.decode_entries
    monkeypatch.setattr(
        model, "decode_entries", lambda entries: (seen.append(len(entries)), decode(entries))[1]
    )
    reader.read(scored(trio, QUESTION))
    # The question, its first token's row and, for the entropy, at most one more.
    assert sum(seen) <= scored(trio, QUESTION).n_tokens() + 2


def test_choices_cost_what_their_tokens_cost(trio):
    labels = ("ғылым және технология", "спорт", "денсаулық сақтау", "ел")
    choices = [trio.models["large_ins"].tokenize(f" {label}") for label in labels]
    assert len({len(ids) for ids in choices}) > 1
    trio.prefill(trio.prompt(QUESTION))
    with trio.forks():
        start = Start.here(trio, ROLES, [])
        found = choices_after(trio, start.sequence, start.rows, choices, AXIS)
    for ids, nats in zip(choices, found, strict=True):
        prompt = trio.prompt(QUESTION)
        tail = Prompt(
            (*(Segment.of(s.ids["large_ins"], scored=False) for s in prompt.segments),)
            + (Segment.of(ids),)
        )
        expected = score(trio, tail, grid=(GRID, GRID)).on_grid() * len(ids)
        assert nats[1:, 1:] == pytest.approx(expected, abs=2e-3)


def go_on(trio, mixes, *, max_tokens):
    """Let mixes continue what the trio holds."""
    roles = roles_of(mixes)
    with trio.forks(roles):
        continue_all(trio, [Start.here(trio, roles, mixes)], max_tokens=max_tokens)


def test_prompts_together_are_continued_as_each_alone(trio, reader):
    """They share the exemplars; each goes on from its own end, whatever was read after it."""
    questions = [scored(trio, text) for text in (QUESTION, f"{KAZAKH}\nTopic:", "Text: Доп.")]
    weights = [Weights(1, 0), Weights(0.1, 0.9), Weights(0.5, 0.5)]
    alone, together = [], []
    for question in questions:
        reader.read(question)
        alone.append([Continuation(Mix(one)) for one in weights])
        go_on(trio, alone[-1], max_tokens=12)
    reader.hold_exemplars()
    with trio.forks() as sequences:
        starts = []
        for question in questions:
            reader.read(question)
            starts.append(Start.here(trio, ROLES, [Continuation(Mix(one)) for one in weights]))
        n_ids = [sum(len(s.ids[r]) for s in q.segments) for q in questions for r in ("small_cpt",)]
        # What they share is kept once, but for its last token: each read that for its row.
        n_again = len(questions) - 1
        assert sequences.n_cells("small_cpt") == reader.prefix.n_tokens() + sum(n_ids) + n_again
        continue_all(trio, starts, max_tokens=12)
        together = [start.continuations for start in starts]
    assert [[m.text for m in ms] for ms in together] == [[m.text for m in ms] for ms in alone]
    assert len({m.text for ms in alone for m in ms}) > 3


def test_how_many_questions_are_answered_at_once_changes_no_answer(trio, tmp_path, monkeypatch):
    shown = [
        Example(str(i), f"Text: {t}\nTopic:", a, (a,)) for i, (a, t) in enumerate(TOPICS.items())
    ]
    asked = [
        Example(str(i), f"Text: {t}\nTopic:", "спорт", ("спорт",), tuple(TOPICS))
        for i, t in enumerate(("Доп ойнады.", "Заң шықты.", "Балуан жеңді.", KAZAKH, "Сайлау."))
    ]
    task = Task("topics", ("kk",), "Classify.", ("accuracy",), 6, lambda *_: None, n_exemplars=2)
    lines = []
    for most in (1, 3):
        monkeypatch.setattr(asking, "_MOST_TOGETHER", most)
        out = tmp_path / f"{most}.jsonl"
        ask_here(trio, task, Dataset(asked, shown), RunSettings(("large_ins", "ppl", "token")), out)
        lines.append([json.loads(line) for line in out.read_text("utf-8").splitlines()])
    for alone, together in zip(*lines, strict=True):
        assert alone["outputs"] == together["outputs"] and alone["id"] == together["id"]
        for key in ("nll", "entropy", "choice_nll"):  # batches of other sizes round differently
            np.testing.assert_allclose(alone[key], together[key], rtol=1e-3, atol=0.1)


def test_mixes_together_write_what_each_writes_alone(trio):
    weights = [Weights(a, b) for a in (0.0, 0.1, 0.5, 1.0) for b in (0.0, 0.3, 0.9, 1.0)]
    expected = []
    for one in weights:
        answer = generate(trio, QUESTION, weights=one, max_tokens=8, temperature=0)
        expected.append(answer.text.lstrip().partition("\n")[0].rstrip())
    trio.prefill(trio.prompt(QUESTION))
    mixes = [Continuation(Mix(one)) for one in weights]
    go_on(trio, mixes, max_tokens=8)
    assert [mix.text for mix in mixes] == expected
    assert len(set(expected)) > 3


def test_an_answer_ends_where_a_model_ends_it(trio):
    trio.prefill(trio.prompt("Repeat the text.\n\nText: Yes.\nAnswer: Yes."))
    ended, goes_on = Continuation(Mix(Weights(1, 0))), Continuation(Mix(Weights(-1, 1)))
    go_on(trio, [ended, goes_on], max_tokens=5)
    assert ended.ids == [] and ended.text == ""  # for large_ins the answer is whole
    assert goes_on.ids


def test_a_long_answer_costs_what_its_tokens_cost(trio, monkeypatch):
    """Bug: each new token put the text of all tokens together again."""
    model, read = trio.models["large_ins"], []
    piece = model.piece
    monkeypatch.setattr(model, "piece", lambda token: read.append(token) or piece(token))
    trio.prefill(trio.prompt("ана мен бала, " * 8))
    mix = Continuation(Mix(Weights(0, 1)))
    go_on(trio, [mix], max_tokens=96)
    assert len(mix.ids) > 30 and read == mix.ids
    assert mix.raw == b"".join(map(piece, mix.ids))


def test_more_mixes_than_fit_at_once(trio):
    trio.prefill(trio.prompt(KAZAKH))
    weights = [Weights(a, b) for a in np.linspace(0, 1, 6) for b in np.linspace(0, 1, 6)]
    together, apart = (
        [Continuation(Mix(w)) for w in weights],
        [Continuation(Mix(w)) for w in weights],
    )
    go_on(trio, together, max_tokens=60)
    for mix in apart:
        go_on(trio, [mix], max_tokens=60)
    # Of 36 answers of 60 tokens, some come to two tokens that all but tie.
    assert sum(m.text == other.text for m, other in zip(together, apart, strict=True)) >= 30
    begun = Counter(m.ids[0] for m in together if m.ids)
    assert max(begun.values()) > trio.n_ctx // 60  # more begin alike than fit


def test_as_answers_end_others_begin(monkeypatch):
    """A few long answers cost no more steps than Graham's bound for scheduling from a list."""
    texts = ("Доп ойнады.", "Заң шықты.", "Балуан жеңді.", "Сайлау.", "Ауа райы жылы.", "Кино.")
    widths, read = [], Sequences.rows
    monkeypatch.setattr(
        Sequences,
        "rows",
        lambda self, b, roles: widths.append((roles, len(b))) or read(self, b, roles),
    )
    with Trio.nano(n_ctx=640) as trio, trio.forks() as sequences:
        starts = []
        for text in texts:
            trio.prefill(trio.prompt(EXEMPLARS + text))
            mixes = [Continuation(Mix(Weights(a, b))) for a in GRID for b in GRID]
            starts.append(Start.here(trio, ROLES, mixes))
        most = (trio.n_ctx - sequences.n_cells("large_ins")) // 48
        continue_all(trio, starts, max_tokens=48)
    answers = [(i, mix.ids) for i, start in enumerate(starts) for mix in start.continuations]
    longest = max(len(ids) for _, ids in answers)
    texts = {(i, *ids[:n]) for i, ids in answers for n in range(1, len(ids) + 1)}
    steps = [n for roles, n in widths if roles == ("large_ins",)]
    assert max(steps) <= most < len({(i, *ids) for i, ids in answers}) / 3
    assert len(steps) <= len(texts) / most + longest  # mixes that agree take one place, not many


def test_a_filled_answer_is_what_was_decoded_and_then_its_loop(trio, monkeypatch):
    monkeypatch.setattr(
        "trimix_gguf.evaluation.running.loops._LIKELY", 0.0
    )  # the nano trio is never sure
    weights = [Weights(a, b) for a in (0.0, 0.5, 1.0) for b in (0.0, 0.5, 1.0)]
    decoded = [Continuation(Mix(one)) for one in weights]
    filled = [Continuation(Mix(one), loop=Loop()) for one in weights]
    for mixes in (decoded, filled):
        trio.prefill(trio.prompt("ана мен бала, " * 8))
        go_on(trio, mixes, max_tokens=96)
    assert not any(mix.n_filled for mix in decoded) and any(mix.n_filled for mix in filled)
    for whole, mix in zip(decoded, filled, strict=True):
        n = len(mix.ids) - mix.n_filled
        assert mix.ids[:n] == whole.ids[:n] and len(mix.ids) == len(whole.ids)
        assert not mix.n_filled or any(mix.ids[n:] == mix.ids[n - p : -p] for p in range(2, 65))


def test_loops_are_filled_where_a_run_asks_for_it(trio, tmp_path, monkeypatch):
    monkeypatch.setattr(loops, "_LIKELY", 0.0)
    words = ("ана мен бала", "Астана қаласы және", "Доп.")
    asked = [Example(f"{i}", f"{w} " * 8, "x", ("x",)) for i, w in enumerate(words)]
    task = Task("loops", ("kk",), "Go on.", ("f1",), 96, lambda *_: None, n_exemplars=0)
    n_filled = []
    for fill in (False, True):
        out, methods = tmp_path / f"{fill}", ("small_cpt", "large_ins", "ppl")
        ask_here(trio, task, Dataset(asked, []), RunSettings(methods, fill_loops=fill), out)
        lines = [json.loads(line)["outputs"] for line in out.read_text("utf-8").splitlines()]
        n_filled.append(sum(o.get("n_filled", 0) for line in lines for o in line.values()))
    assert n_filled[0] == 0 < n_filled[1]


def test_models_that_no_mix_reads_are_not_run(trio, monkeypatch):
    trio.forget()
    for role in ("small_cpt", "small_base"):
        monkeypatch.setattr(trio.models[role], "_decode", None)
    trio.prefill(trio.prompt(QUESTION))
    mix = Continuation(Mix(Weights(1, 0)))
    go_on(trio, [mix], max_tokens=5)
    assert mix.ids


def test_an_answer_that_cannot_fit_is_refused():
    with Trio.nano(n_ctx=64) as small:
        small.prefill(small.prompt("а " * 20))
        with pytest.raises(ContextFullError, match="does not fit"):
            go_on(small, [Continuation(Mix(Weights(1, 0)))], max_tokens=60)


def bowl(alpha, beta, n=12):
    """nlls [n, …] whose sum is lowest at (alpha, beta)."""
    a, b = np.asarray(AXIS)[:, None], np.asarray(AXIS)[None, :]
    return np.repeat(((a - alpha) ** 2 + (b - beta) ** 2)[None], n, axis=0)


def reading_of(nlls, answers):
    entropy = np.ones((len(GRID), len(GRID)))
    entropy[2, 3] = 0
    alpha, beta = np.meshgrid(chebyshev_nodes(), chebyshev_nodes(), indexing="ij")
    nodes = (alpha + 0.25) ** 2 + (beta - 1.2) ** 2
    return Reading(len(nlls), nlls, np.asarray(answers), entropy, continuous=nodes)


def test_each_method_takes_the_lowest_of_its_own_evidence(trio):
    nlls = np.concatenate((bowl(0.1, 0.9), bowl(0.7, 0.3, n=4)))
    reading = reading_of(nlls, [False] * 12 + [True] * 4)
    names = ("ppl", "ppl-answers", "ent", "ppl-task", "large_ins", "continuous")
    made = continuations(names, reading, {"ppl-task": Weights(0.3, 0.3)}, trio, with_choices=False)
    chosen = {name: (one.mix.weights.alpha, one.mix.weights.beta) for name, one in made.items()}
    continuous = chosen.pop("continuous")
    assert chosen == {
        "ppl": (0.3, 0.7),
        "ppl-answers": (0.7, 0.3),
        "ent": (0.5, 0.7),
        "ppl-task": (0.3, 0.3),
        "large_ins": (1.0, 0.0),
    }
    assert continuous == pytest.approx((-0.25, 1.2), abs=1e-4)


def test_token_level_weights_follow_the_newest_evidence(trio, monkeypatch):
    reading = reading_of(bowl(0.1, 0.9, n=40), [False] * 40)
    there = bowl(1.0, 0.1, n=1)[0]
    monkeypatch.setattr(steering, "grid_token_nlls", lambda **_: there[None])
    one = continuations(("token",), reading, {}, trio, with_choices=False)["token"]
    assert one.mix.weights == Weights(0.1, 0.9)
    row, weights = np.zeros(1, np.float32), []
    for _ in range(200):
        one.pick(dict.fromkeys(ROLES, row), None)
        weights.append(one.mix.weights)
    assert weights[-1] == Weights(1.0, 0.1)
    assert [w.alpha for w in weights] == sorted(w.alpha for w in weights)


def test_only_exemplars_have_answers_and_those_are_all_of_them(trio):
    """Bug: without exemplars, ppl-answers chose by the instruction, as if that were an answer."""
    task = Task("topics", ("kk",), "Classify.", ("accuracy",), 4, lambda *_: None)
    shown = [Example("1", QUESTION, "саясат", ("саясат",))]
    # Bug: the first two control characters marked answers, and text out of a PDF has them.
    marks = [Example("1", "soft\x02hyphen\nTopic:", "a\x02b\x03c", ("a",)), *shown]
    for exemplars in (shown, marks, []):
        opening = open_task(trio, task, exemplars)
        ids = [unit[0][0][0] for unit in opening.prefix.units]
        answers = [i for i, is_answer in zip(ids, opening.answers, strict=True) if is_answer]
        assert trio.text(answers).split() == [one.answer for one in exemplars]


def test_in_a_chat_large_ins_alone_reads_control_tokens(trio, tmp_path):
    example = Example("1", QUESTION, "саясат", ("саясат",))
    shown = [
        Example(str(i), f"Text: {t}\nTopic:", a, (a,)) for i, (a, t) in enumerate(TOPICS.items())
    ]
    task = Task("topics", ("kk",), "Classify.", ("accuracy",), 4, lambda *_: None, n_exemplars=2)
    dataset, plain = Dataset([example], shown), {}
    for chat in (False, True):
        settings = RunSettings(("ppl", "ppl-answers"), chat=chat)
        out = tmp_path / f"{chat}.jsonl"
        ask_here(trio, task, dataset, settings, out)
        plain[chat] = trio.ids, json.loads(out.read_text("utf-8"))
    control = set(around_message(trio.models["large_ins"])[0])
    assert control and control & set(plain[True][0]["large_ins"])
    assert not control & set(plain[True][0]["small_cpt"])
    assert (
        plain[True][0]["small_base"] == plain[True][0]["small_cpt"] == plain[False][0]["large_ins"]
    )
    for key in ("n_scored", "n_answers"):
        assert plain[True][1][key] == plain[False][1][key]

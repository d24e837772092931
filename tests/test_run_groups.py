"""How `trimix run` answers: groups of lines, one engine for each, and requests that fail in it."""

import io
import json
import queue

import pytest
from served import ENDLESS, TEXTS
from test_batching import GREEDY

from trimix_gguf.answering.answer import Answer
from trimix_gguf.answering.batching import Batcher
from trimix_gguf.answering.request import Request
from trimix_gguf.cli.bars import count_bar
from trimix_gguf.errors import DataError, ModelError, SamplerError
from trimix_gguf.mixing.fusion import METHODS
from trimix_gguf.runs.answers import Answers, Settings
from trimix_gguf.runs.lines import read_lines
from trimix_gguf.runs.running import Here, Run, group_lines

GOOD = {"prompt": "The prince", "temperature": 0, "max_tokens": 8, **ENDLESS}


def test_lines_that_begin_alike_are_answered_in_one_group():
    prompts = [f"{text} {i}" for i in range(4) for text in TEXTS[:2]]
    bodies = [{"id": i, "prompt": p, "n": 1 + (i == 5)} for i, p in enumerate(prompts)]
    chats = [{"messages": [{"role": "user", "content": c}]} for c in "ab"]
    lines, _ = read_lines(json.dumps(body).encode() for body in [*bodies, *chats])
    groups = group_lines(lines, 4)
    assert [[line.id for line in group] for group in groups] == [
        [9, 10, 1, 3],
        [5, 7, 0],
        [2, 4, 6],
    ]


@pytest.mark.parametrize("n_choices", [1, 3])
def test_a_request_that_fails_on_the_way_is_wrong_too(trio, monkeypatch, n_choices):
    def take(answer, *arguments, **more):
        if answer.request.max_tokens == 5 and answer.n_tokens == 2:
            raise failure
        return taking(answer, *arguments, **more)

    taking = Answer.take
    monkeypatch.setattr(Answer, "take", take)
    failing = {**GOOD, "id": "failing", "max_tokens": 5, "n": n_choices}
    lines, _ = read_lines(json.dumps(x).encode() for x in (GOOD, failing, {**GOOD, "id": 3}))

    def answers(**options):
        out, settings = io.BytesIO(), Settings("nano", n_parallel=3, **options)
        assert (
            Run(
                Here(Answers(trio, settings, source="in")),
                lines,
                settings,
                source="in",
                bar=count_bar,
            ).to_stream(out)
            == 1
        )
        return [json.loads(line) for line in out.getvalue().splitlines()]

    failure = SamplerError("no token is allowed")
    good, wrong, good_too = answers(skip_bad=True)
    assert wrong == {"id": "failing", "error": wrong["error"]}
    assert wrong["error"]["message"] == "no token is allowed"
    assert good["response"]["choices"] == good_too["response"]["choices"]
    with pytest.raises(DataError, match="in, line 2: no token is allowed"):
        answers()
    failure = ModelError("the device is gone")  # not the line's fault: nothing is written of it
    with pytest.raises(ModelError, match="in, line 2: the device is gone"):
        answers(skip_bad=True)


def test_where_all_requests_are_known_only_what_another_begins_with_is_kept(trio):
    prefix = (
        "Қазақстан Республикасының Үкіметі бүгін жаңа заң жобасын қарады, содан кейін шешім шықты"
    )
    texts = [*TEXTS, f"{prefix} ертең", *TEXTS, f"{prefix} кеше"]
    requests = [
        Request(text, METHODS["large_ins"], max_tokens=3, sampling=GREEDY) for text in texts
    ]
    answers, cells = [], []
    for all_known in (False, True):
        batcher = Batcher(trio, n_parallel=1, n_queue=32, all_known=all_known)
        events, used, ended = [[] for _ in texts], [], queue.Queue()

        def take(i, event, events=events, used=used, ended=ended):
            events[i].append(event)
            used.append(trio.sequences.n_cells("large_ins"))
            if event.finish_reason is not None:
                ended.put(i)

        batcher.submit_all(requests, take)
        for _ in texts:
            ended.get(timeout=120)
        batcher.close()
        answers.append(["".join(event.text for event in e) for e in events])
        cells.append(max(used))
        n_prefix = trio.prompt(prefix).n_tokens("large_ins")
        assert n_prefix > 16 and events[-1][-1].n_cached >= n_prefix  # read once either way
    longest = max(trio.prompt(text).n_tokens("large_ins") for text in texts)
    assert answers[0] == answers[1] and cells[1] <= 2 * longest + 6 < cells[0]

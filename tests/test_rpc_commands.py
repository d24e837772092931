"""Commands over workers: what they measure and answer is what one machine does."""

import json

import numpy as np
from languages import CODES, QUESTIONS, ask, options, text_of
from served import serving
from topics import arguments
from workers import HAVE_WORKERS

from trimix_gguf.trio.trio import NANO
from trimix_gguf.trios.triofile import ModelEntry, TrioFile

pytestmark = HAVE_WORKERS
CLOSE = 1e-3  # nats: rounding


def test_an_evaluation_over_workers_has_the_answers_of_one_machine(
    trimix, two, task_file, tmp_path
):
    found = {}
    for name, more in {"here": (), "over": ("--rpc", two)}.items():
        out = tmp_path / name
        done = trimix(*arguments(task_file, out, "large_ins,ppl,ppl-task,token"), *more)
        assert done.returncode == 0, done.stderr.decode()
        lines = (out / "topics.jsonl").read_text("utf-8").splitlines()
        found[name] = [json.loads(line) for line in lines]
    assert len(found["here"]) == 6
    for here, over in zip(found["here"], found["over"], strict=True):
        assert here["id"] == over["id"] and here["outputs"] == over["outputs"]
        assert np.abs(np.subtract(here["nll"], over["nll"])).max() < CLOSE * here["n_scored"]


def test_a_tuning_over_workers_has_the_answers_of_one_machine(
    trimix, two, nano_files, tmp_path, monkeypatch
):
    """As far as both came: a tuning has so many minutes."""
    models = {role: ModelEntry(path=str(path)) for role, path in nano_files.items()}
    TrioFile(tmp_path, "own", models, languages=("kk",)).write()
    asked = ("tune", "--trio", tmp_path, "--text", NANO / "text.txt", "--minutes", "0.4")
    for name, more in {"here": (), "over": ("--rpc", two)}.items():
        monkeypatch.setenv("TRIMIX_CACHE", str(tmp_path / name))
        done = trimix(*asked, *more)
        assert done.returncode == 0, done.stderr.decode()
    here, over = (answers_of(tmp_path / name) for name in ("here", "over"))
    both = here.keys() & over.keys()
    assert both
    for exercise in both:
        mine, theirs = here[exercise], over[exercise]
        assert mine["right"] == theirs["right"]
        assert np.abs(np.subtract(mine["nll"], theirs["nll"])).max() < CLOSE


def answers_of(cache):
    [file] = (cache / "tune").glob("*.jsonl")
    lines = map(json.loads, file.read_text("utf-8").splitlines())
    return {(line["kind"], line["id"]): line for line in lines}


def test_trios_of_a_server_share_weights_over_the_same_workers(two, languages):
    said = {}
    for more in ((), ("--rpc", two)):
        with serving(*options(languages.values()), "--threads", 1, *more) as served:
            said[more] = [text_of(ask(served, code, QUESTIONS["kk"])) for code in CODES]
    here, over = said.values()
    assert over == here and len(set(here)) == len(CODES)


def test_trios_that_share_no_weights_need_a_server_each(trimix, two, strangers):
    done = trimix("serve", "--rpc", two, "--port", "0", *options(strangers.values()))
    assert done.returncode == 2
    assert b"share large_ins and small_base" in done.stderr and b"another server" in done.stderr

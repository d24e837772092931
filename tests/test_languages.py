"""Several trios in one process: what they share, and that each answers as if it were by itself."""

import json
import shutil
import weakref

import click
import pytest
from conftest import KAZAKH
from languages import CODES, options

from trimix_gguf import Trio, Weights, generate
from trimix_gguf.answering.conversation import Conversation, Exchange
from trimix_gguf.cli.chat import chat
from trimix_gguf.cli.chat_trio import ChatTrio
from trimix_gguf.errors import MemoryNeededError
from trimix_gguf.machine.gguf_file import read_gguf
from trimix_gguf.machine.hashes import same_content
from trimix_gguf.trio import model
from trimix_gguf.trios.triofile import TrioFile

BIAS = {0: -100, 3: -100, 202: -100}  # one line of as many tokens as are asked for
GREEDY = {
    "temperature": 0.0,
    "max_tokens": 32,
    "weights": Weights(0.2, 0.8),
    "logit_bias": BIAS,
}


@pytest.fixture
def loaded(monkeypatch):
    """The weights that were loaded within a test."""
    seen = []
    load = model._Weights.__init__

    def noted(self, *arguments):
        seen.append(weakref.ref(self))
        load(self, *arguments)

    monkeypatch.setattr(model._Weights, "__init__", noted)
    return lambda: [one for one in seen if one() is not None]


def arguments(folder, **more):
    return {**TrioFile.read(folder / "trio.toml").load_arguments(), "n_threads": 1, **more}


def text(trio):
    return generate(trio, KAZAKH, **GREEDY).text


# -- weights ----------------------------------------------------------------------------------


def test_trios_beside_each_other_load_their_weights_once_and_answer_as_by_themselves(
    languages, loaded
):
    alone = {}
    for code in CODES:
        with Trio.load(**arguments(languages[code])) as trio:
            alone[code] = text(trio)
        del trio
    assert len(set(alone.values())) == len(CODES) and loaded() == []
    first = Trio.load(**arguments(languages["kk"]))
    others = [Trio.load(**arguments(languages[c]), beside=first) for c in CODES[1:]]
    assert len(loaded()) == 2  # large_ins and small_base
    together = dict(zip(CODES, map(text, (first, *others)), strict=True))
    assert together == alone
    first.close()
    del first
    assert len(loaded()) == 2 and text(others[0]) == alone["ug"]  # the others still read them
    for trio in others:
        trio.close()
    del trio, others
    assert loaded() == []


def test_a_copy_of_a_file_is_the_same_weights_and_another_setting_is_not(
    languages, nano_files, tmp_path, loaded
):
    copy = shutil.copy(nano_files["large_ins"], tmp_path / "copy.gguf")
    assert same_content(copy, nano_files["large_ins"])
    assert not same_content(nano_files["small_cpt"], nano_files["small_base"])  # of one size
    with Trio.load(**arguments(languages["kk"])) as first:
        copied = arguments(languages["ug"], large_ins=copy)
        with Trio.load(**copied, beside=first):
            assert len(loaded()) == 2
        with Trio.load(**copied, mmap=True, beside=first):
            assert len(loaded()) == 4
        with Trio.load(**arguments(languages["ug"], n_ctx=64), beside=first) as short:
            assert len(loaded()) == 2 and short.n_ctx == 64  # of a context, not of weights


def test_weights_that_are_shared_stay_where_the_planner_put_them(languages, loaded):
    auto = {"n_gpu_layers": "auto"}
    with (
        Trio.load(**arguments(languages["kk"], **auto)) as first,
        Trio.load(**arguments(languages["ug"], **auto), beside=first) as second,
    ):
        assert len(loaded()) == 2
        places = [[m.device for m in trio.models.values()] for trio in (first, second)]
        assert places[0] == places[1]


# -- trimix plan ------------------------------------------------------------------------------


def test_a_plan_of_several_adds_up_and_counts_shared_weights_once(trimix, languages, strangers):
    def report(*folders, **more):
        done = trimix("plan", "--json", "--assume-ram", 8, *options(folders))
        assert done.returncode == 0, done.stderr.decode()
        return json.loads(done.stdout)

    one, other = report(languages["kk"]), report(strangers["one"])
    both = report(languages["kk"], languages["ug"])
    assert "models" in one and list(both["trios"]) == ["nano-kk", "nano-ug"]
    assert both["trios"]["nano-kk"] == one and both["fits"]
    second = both["trios"]["nano-ug"]
    adapter = read_gguf(languages["ug"] / "lora.gguf").weight_bytes
    weights = {role: need["in_ram"]["weights"] for role, need in second["models"].items()}
    assert weights == {"large_ins": 0, "small_cpt": adapter, "small_base": 0}
    kv = [[m["in_ram"]["kv"] for m in part["models"].values()] for part in (one, second)]
    assert kv[0] == kv[1] and second["program"] == 0
    assert both["ram_needed"] == one["ram_needed"] + second["ram_needed"]
    apart = report(languages["kk"], strangers["one"])  # only small_base is the same
    assert apart["ram_needed"] == one["ram_needed"] + other["ram_needed"]


def test_a_plan_of_several_says_where_it_ends_to_fit(trimix, languages, strangers):
    some = options([languages["kk"], strangers["one"]])
    done = trimix("plan", *some, "--assume-ram", 8)
    assert done.returncode == 0, done.stderr.decode()
    table = done.stdout.decode()
    assert "nano-kk\n" in table and "\none\n" in table and "together" in table
    need = json.loads(trimix("plan", "--json", *some, "--assume-ram", 8).stdout)
    first = need["trios"]["nano-kk"]["ram_needed"]
    enough_for_one = f"{(first + 1000) / (1 << 30):.6f}"
    done = trimix("plan", "--json", *some, "--assume-ram", enough_for_one)
    assert done.returncode == 1 and done.stderr.startswith(b"trimix: one: this trio needs")
    fits = {name: part["fits"] for name, part in json.loads(done.stdout)["trios"].items()}
    assert fits == {"nano-kk": True, "one": False}
    absent = trimix("plan", *options([languages["kk"], "qwen2.5-1.5b-3b-ug"]))
    assert absent.returncode == 1 and b"trimix pull qwen2.5-1.5b-3b-ug" in absent.stderr
    twice = trimix("plan", *options([languages["kk"], languages["kk"]]))
    assert twice.returncode == 2 and b"two trios are called nano-kk" in twice.stderr


# -- trimix chat ------------------------------------------------------------------------------


def said(*texts):
    return "".join(f"{line}\n" for line in texts).encode()


CHAT = ("-n", 12, "--temperature", 0, "--weights", "0.2,0.8")
CHAT += tuple(word for i, bias in BIAS.items() for word in ("--logit-bias", f"{i}={bias}"))


@pytest.mark.parametrize("other", ["ug", "one"])
def test_a_chat_goes_on_with_another_trio(trimix, languages, strangers, other):
    folder = {**languages, **strangers}[other]
    done = trimix(
        "chat", "--trio", languages["kk"], *CHAT, "--threads", 1,
        stdin=said("Сәлем", f"/trio {folder}", "/trio", KAZAKH),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    first, names, second = done.stdout.decode().splitlines()
    name = TrioFile.read(folder / "trio.toml").name
    assert names == f"trio: {name}; others here: nano"
    with Trio.load(**arguments(folder)) as trio:
        talk = Conversation(trio, **{**GREEDY, "max_tokens": 12})
        talk.exchanges = [Exchange("Сәлем", first)]
        assert "".join(e.text for e in talk.say(KAZAKH)).strip() == second
    assert f"{folder} answers from here on" in done.stderr.decode()


def test_weights_that_another_trio_does_not_get_are_told(trimix, languages):
    """Bug: `/weights` was forgotten at `/trio` without a word."""
    lines = ["/weights 0.7,0.1", f"/trio {languages['ug']}", "/weights"]
    done = trimix("chat", "--trio", languages["kk"], *CHAT, stdin=said(*lines))
    assert done.stdout.decode().splitlines()[-1] == "weights: alpha 0.2, beta 0.8, held"
    told = done.stderr.decode().splitlines()
    assert "weights alpha 0.7, beta 0.1 were of the trio before; /weights sets others" in told[-1]


def test_a_trio_that_cannot_be_opened_leaves_the_chat_as_it_is(
    trimix, languages, nano_files, tmp_path
):
    broken = tmp_path / "broken"
    shutil.copytree(languages["ug"], broken)
    shutil.copy(nano_files["small_cpt"], broken / "lora.gguf")  # which is read, and not opened
    apart = tmp_path / "apart"
    shutil.copytree(broken, apart)
    text = (apart / "trio.toml").read_text(encoding="utf-8")
    (apart / "trio.toml").write_text(text.replace("large_ins.gguf", "small_cpt.gguf", 1), "utf-8")
    lines = ["/weights 0.7,0.1", "Сәлем"]
    lines += [f"/trio {broken}", "/trio nowhere", f"/trio {apart}", "/undo", "Сәлем", "/weights"]
    done = trimix("chat", "--trio", languages["kk"], *CHAT, stdin=said(*lines))
    assert done.returncode == 1  # as after every bad line of a pipe
    set_to, first, second, last = done.stdout.decode().splitlines()
    assert first == second
    assert set_to == last and "alpha 0.7, beta 0.1, held" in last  # not those of the command
    told = [line for line in done.stderr.decode().splitlines() if line.startswith("trimix: ")]
    assert len(told) == 3 and "lora.gguf" in told[0] and "nowhere" in told[1]


def test_a_switch_keeps_weights_that_both_have_and_frees_others(languages, strangers, loaded):
    given = chat.make_context("chat", ["--trio", str(languages["kk"]), "--threads", "1"]).params
    del given["system"], given["load"]
    opened = ChatTrio(given)
    first = loaded()
    opened.switch(str(languages["ug"]))
    assert loaded() == first and len(first) == 2
    opened.switch(str(strangers["one"]))
    assert all(one() is None for one in first)
    opened.close()


def test_a_trio_that_was_removed_still_answers_and_is_named(languages, tmp_path):
    """Bug: `/trio` and the next chat's greeting said that there is no such trio."""
    folder = shutil.copytree(languages["kk"], tmp_path / "kk")
    given = chat.make_context("chat", ["--trio", str(folder), "--threads", "1"]).params
    del given["system"], given["load"]
    opened = ChatTrio(given)
    name, about = TrioFile.read(folder / "trio.toml").name, opened.about
    shutil.rmtree(folder)
    assert opened.names().startswith(f"trio: {name}; ") and opened.about == about
    assert text(opened.trio)
    opened.close()


@pytest.mark.parametrize("written", ["lora.gguf", "large_ins.gguf"])
def test_a_chat_takes_a_file_that_was_written_again(languages, nano_files, tmp_path, written):
    """Bug: after the adapter was taught again, /trio NAME still answered by the old one."""
    new = {"lora.gguf": languages["ug"] / "lora.gguf", "large_ins.gguf": nano_files["small_cpt"]}
    folder = shutil.copytree(languages["kk"], tmp_path / "kk")
    shutil.copy(nano_files["large_ins"], folder)
    trio_file = TrioFile.read(folder / "trio.toml").with_model("large_ins", path="large_ins.gguf")
    trio_file.write()
    given = chat.make_context("chat", ["--trio", str(folder), "--threads", "1"]).params
    del given["system"], given["load"]
    opened = ChatTrio(given)
    old = text(opened.trio)
    shutil.copy(new[written], tmp_path / "new")
    (tmp_path / "new").replace(folder / written)
    opened.switch(str(folder))
    again = text(opened.trio)
    opened.close()
    with Trio.load(**arguments(folder)) as fresh:
        assert again == text(fresh) != old


def test_where_no_trio_can_be_opened_the_chat_ends(languages, strangers, monkeypatch):
    """It went on with the trio that was closed, and llama.cpp crashed at the next message."""
    given = chat.make_context("chat", ["--trio", str(languages["kk"]), "--threads", "1"]).params
    del given["system"], given["load"]
    opened = ChatTrio(given)

    def full(*_, **__):
        raise MemoryNeededError("this trio needs 9 GiB and 1 GiB is free")

    monkeypatch.setattr(Trio, "load", full)
    with pytest.raises(click.ClickException, match="old trio cannot be opened again: this"):
        opened.switch(str(strangers["one"]))

"""What trimix pull cannot do: one line with the mend, and nothing half."""

import shutil
from pathlib import Path

import pytest
from hub_server import Fault
from person import NOWHERE, REPO
from test_cli import one_line_error

from trimix_gguf.machine.gguf_file import read_gguf
from trimix_gguf.trios.hub import N_TRIES


def test_a_hub_that_refuses_is_explained_with_the_mend(person, hub, ready, refusal):
    hub.add(REPO, ready)
    file = person.write()
    soon = {"Retry-After": "0"}
    for piece, fault, words in [
        ("/api/models", Fault(status=429, headers={"Retry-After": "3000"}), "again in 50 min"),
        ("/api/models", Fault(status=503, headers=soon, forever=True), "HTTP 503"),
        ("/api/models", Fault(body=b"<html>log in</html>"), "login page"),
        ("/file/", Fault(status=429, headers=soon, forever=True), "what came is kept"),
        ("/file/", Fault(flip=9, forever=True), "was removed; pull again later"),
        ("/resolve/", Fault(status=403, forever=True), "hf auth login"),
        ("/resolve/", Fault(status=401, forever=True), "hf auth login"),
    ]:
        hub.faults = {piece: [fault]}
        assert words in refusal(file)
        assert sum(path.stat().st_size for path in person.trio.rglob("*.gguf*")) == 0


def test_a_hub_that_sends_the_same_beginning_for_ever_is_given_up(person, hub, ready, refusal):
    """Bytes that were there before are no progress."""
    hub.add(REPO, ready)
    hub.faults["/file/"] = [Fault(cut_after=9, whole=True, forever=True)]
    words = refusal(person.write())
    assert "the connection fails" in words and "what came is kept" in words
    assert sum("/file/" in one.path for one in hub.asked) == N_TRIES
    assert sum(path.stat().st_size for path in person.trio.rglob("*.part")) == 9


def test_a_page_in_place_of_a_file_is_not_fetched_for_ever(person, hub, ready, refusal):
    """A page of no declared length, longer than the file, was fetched again without a pause."""
    hub.add(REPO, ready)
    page = b"<html>log in</html>".ljust(max(path.stat().st_size for path in ready.iterdir()) + 1)
    hub.faults["/file/"] = [Fault(body=page, sized=False, forever=True)]
    assert "was removed; pull again later" in refusal(person.write())
    assert sum("/file/" in one.path for one in hub.asked) == 2


def test_a_source_that_is_not_there_is_named(person, hub, ready, refusal):
    hub.add(REPO, ready)
    for entry, words in [
        ('repo = "kk/nobody"\nfile = "small_cpt.gguf"', "no such repository, or it is private"),
        (f'repo = "{REPO}"\nfile = "small_ctp.gguf"', "it has small_cpt.gguf"),
        (f'repo = "{REPO}"\nfile = "a.gguf"\nrevision = "v9"', "no such revision"),
        (f'repo = "{REPO}"', "set file to one of large_ins.gguf"),
        (f'repo = "{REPO}"\nfile = "a-00001-of-00002.gguf"', "one part of several"),
        (f'repo = "{REPO}"\nquantization = "q3"', "quantization 'q3' is unknown"),
        (f'repo = "{REPO}"\nfile = "small_cpt.gguf"\nsha256 = "{"0" * 64}"', "set revision to"),
        ('path = ".pull/a.gguf"', "the pull's own folder"),
        ('path = "trio.toml"', "is the trio file"),
        ('path = "./LARGE_INS.gguf"', "that of models.large_ins already"),
    ]:
        assert words in refusal(person.write(small_cpt=entry))


def test_no_consent_and_no_network_are_one_line(person, hub, ready):
    hub.add(REPO, ready, token="hf_secret")
    file = person.write()
    unasked = one_line_error(person.trimix("pull", file))
    assert f"accept it at https://huggingface.co/{REPO}" in unasked
    assert "connect to a network" in person.refused(file, **NOWHERE)
    assert "HF_HUB_OFFLINE is set" in person.refused(file, HF_HUB_OFFLINE="1")


def test_what_cannot_be_pulled_is_said_before_anything_is_fetched(person, hub, ready):
    hub.add(REPO, ready, declared={"small_base.gguf": 1 << 50})
    file = person.write()
    assert "--force" in person.refused(file)
    assert "on the disk" in person.refused(file, "--force")
    assert hub.n_sent("/file/") == 0
    assert "did you mean qwen2.5-1.5b-3b-kk" in person.refused("qwen2.5-1.5b-3b-kz")
    assert "trimix convert hf" in person.refused("qwen2.5-1.5b-3b-bn")
    assert "ships in the package" in person.refused("nano")
    assert "nothing is converted" in person.refused(file, "--quantization", "q4_0")


def test_models_that_do_not_speak_the_same_tokens_are_not_made_a_trio(person, hub, ready, tmp_path):
    folder = shutil.copytree(ready, tmp_path / "changed")
    data = (folder / "small_cpt.gguf").read_bytes()
    tokens = read_gguf(folder / "small_cpt.gguf").array("tokenizer.ggml.tokens")
    word = max(tokens, key=len)
    (folder / "small_cpt.gguf").write_bytes(data.replace(word, b"#" * len(word)))
    hub.add(REPO, folder)
    file = person.write(small_cpt=f'repo = "{REPO}"\nfile = "small_cpt.gguf"')
    assert "convert both with one tokenizer" in person.refused(file)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a disk that is always full")
def test_a_full_disk_is_told_and_what_came_before_is_kept(person, hub, ready):
    hub.add(REPO, ready)
    hub.faults["/file/"] = [Fault(status=404)]
    file = person.write()
    person.refused(file)
    (part,) = person.trio.rglob("*.gguf.part")
    part.unlink()
    part.symlink_to("/dev/full")
    size = (ready / "small_cpt.gguf").stat().st_size
    assert f"free {size / 1e6:.1f} MB and pull again" in person.refused(file)
    part.unlink()
    assert person.pull(file).returncode == 0
    person.pulled()

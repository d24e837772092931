"""A new file is loaded first in a child: what ends llama.cpp there is one line here."""

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter
from gguf.constants import GGMLQuantizationType, GGUFValueType

from trimix_gguf import Trio
from trimix_gguf.convert.check import check_trio
from trimix_gguf.errors import ModelFileError
from trimix_gguf.machine import file_trial, self_test
from trimix_gguf.machine.file_trial import FileTrial
from trimix_gguf.machine.gguf_file import read_gguf
from trimix_gguf.machine.loading import Loading
from trimix_gguf.trio.model import Model


def changed(source, path, *, keys=(), tensors=(), leave=()):
    """A copy of a GGUF with other metadata (key -> type, value) or tensors (name -> array)."""
    reader = GGUFReader(source)
    writer = GGUFWriter(None, "")
    writer.kv_data[0].clear()
    keys, tensors = dict(keys), dict(tensors)
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name not in {*keys, *leave}:
            sub = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub)
    for name, (kind, value, *sub) in keys.items():
        writer.add_key_value(name, value, kind, *sub)
    for tensor in reader.tensors:
        if tensor.name in leave:
            continue
        data, kind = tensors.get(tensor.name, (tensor.data, tensor.tensor_type))
        writer.add_tensor(tensor.name, data, raw_dtype=kind)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


U32, F32, STRING, ARRAY = (GGUFValueType[n] for n in ("UINT32", "FLOAT32", "STRING", "ARRAY"))
EPS, TOKENS = "llama.attention.layer_norm_rms_epsilon", "tokenizer.ggml.tokens"
DEADLY = {  # what ends llama.cpp by a signal -> the stage at which it does
    "no tokenizer": ({"tokenizer.ggml.model": (STRING, "no_vocab")}, "reading its tokenizer"),
    "pieces without bytes": ({"tokenizer.ggml.model": (STRING, "llama")}, "reading its tokenizer"),
    "no layer": ({"llama.block_count": (U32, 0)}, "loading it"),
    "experts of none": ({"llama.expert_used_count": (U32, 2)}, "loading it"),
    "a scaling of none": ({"llama.rope.scaling.type": (STRING, "bogus")}, "loading it"),
    "negative epsilon": ({EPS: (F32, -1.0)}, "decoding 32 tokens"),
}


@pytest.fixture
def one_role(nano_files):
    return lambda path: {**nano_files, "small_base": path}


@pytest.mark.parametrize("name", DEADLY)
def test_what_ends_llama_cpp_is_one_line(name, trimix, nano_files, tmp_path):
    keys, stage = DEADLY[name]
    path = changed(nano_files["small_base"], tmp_path / "x.gguf", keys=keys)
    roles = ("large-ins", "small-base", "small-cpt")
    options = [word for role in roles for word in (f"--{role}", path)]
    for command in (["generate", "a", *options], ["check", path, path, path]):
        done = trimix(*command)
        assert done.returncode == 1 and done.stderr.count(b"\n") == 1, done.stderr
        assert b"x.gguf: tried first in another process, llama.cpp died of SIGABRT" in done.stderr
        assert f"while {stage};".encode() in done.stderr and b"/vendor/" not in done.stderr


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({TOKENS: (U32, 5)}, "expected an array of strings"),
        ({TOKENS: (ARRAY, [1, 2], U32)}, "expected an array of strings"),
        ({"tokenizer.ggml.eot_token_id": (STRING, "abc")}, "expected a whole number"),
        ({"llama.context_length": (F32, 1.5)}, "expected a whole number"),
        ({"general.architecture": (STRING, "a" * 200)}, "unknown architecture"),
    ],
)
def test_keys_of_another_type_are_refused_without_loading(keys, words, nano_files, tmp_path):
    path = changed(nano_files["small_base"], tmp_path / "x.gguf", keys=keys)
    with pytest.raises(ModelFileError, match=words):
        read_gguf(path)


def test_tensor_types_of_no_weights_are_refused(nano_files, tmp_path):
    zeros = np.zeros((320, 320), np.int16), GGMLQuantizationType.I16
    path = changed(
        nano_files["small_base"], tmp_path / "x.gguf", tensors={"blk.0.attn_q.weight": zeros}
    )
    with pytest.raises(ModelFileError, match="'blk.0.attn_q.weight' is I16"):
        read_gguf(path)


def test_ids_that_no_token_has_are_none(nano_files, tmp_path):
    """A chat template's pad_token ended the server: the id was taken from the file as it stood."""
    key = "tokenizer.ggml.padding_token_id"
    path = changed(nano_files["small_base"], tmp_path / "x.gguf", keys={key: (U32, 99_999)})
    model = Model(path, Loading(n_ctx=64))
    assert "pad" not in model.special_tokens() and "eos" in model.special_tokens()
    assert max(model.end_of_generation()) < model.n_vocab
    model.close()


def test_numbers_that_are_none_are_refused(nano_files, tmp_path, one_role):
    reader = GGUFReader(nano_files["small_base"])
    norm = next(t for t in reader.tensors if t.name == "output_norm.weight")
    nan = np.full_like(norm.data, np.nan), norm.tensor_type
    path = changed(
        nano_files["small_base"], tmp_path / "x.gguf", tensors={"output_norm.weight": nan}
    )
    with pytest.raises(ModelFileError, match="no numbers, but NaN or infinity"):
        Trio.load(**one_role(path), n_ctx=64)


def test_llama_cpps_own_reason_is_told(nano_files, tmp_path, one_role):
    """The last line of its log says only that it failed; the one before says why."""
    path = changed(nano_files["small_base"], tmp_path / "x.gguf", leave=["blk.0.attn_q.weight"])
    with pytest.raises(ModelFileError, match="tensor 'blk.0.attn_q.weight' not found"):
        Trio.load(**one_role(path), n_ctx=64)
    with pytest.raises(ModelFileError, match="tensor 'blk.0.attn_q.weight' not found"):
        check_trio(**one_role(path))


@pytest.fixture
def runs(monkeypatch, tmp_path):
    """How many children were started; nothing passed before."""
    monkeypatch.setenv("TRIMIX_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("TRIMIX_SELF_TEST", raising=False)
    monkeypatch.setattr(file_trial, "_passed", set())
    started = []
    real = self_test.try_in_child

    def counted(*arguments, **options):
        started.append(arguments)
        return real(*arguments, **options)

    monkeypatch.setattr(self_test, "try_in_child", counted)
    return started


def test_a_file_is_tried_once_until_it_or_the_library_is_another(
    runs, monkeypatch, nano_files, tmp_path
):
    path = changed(nano_files["small_base"], tmp_path / "x.gguf")
    trial = FileTrial(path, Loading(n_ctx=64))
    file_trial.require([trial])
    file_trial.require([trial])
    monkeypatch.setattr(file_trial, "_passed", set())  # as in another process
    file_trial.require([trial])
    assert len(runs) == 1
    content = path.read_bytes()
    path.write_bytes(content)
    file_trial.require([trial])
    assert len(runs) == 2
    monkeypatch.setattr(file_trial, "_passed", set())
    monkeypatch.setattr(self_test, "fingerprint", lambda: "another library")
    file_trial.require([trial])
    assert len(runs) == 3


def test_a_bad_file_is_tried_again(runs, nano_files, tmp_path):
    path = changed(nano_files["small_base"], tmp_path / "x.gguf", keys={EPS: (F32, -1.0)})
    for n in (1, 2):
        with pytest.raises(ModelFileError, match="negative|eps >= 0"):
            file_trial.require([FileTrial(path)])
        assert len(runs) == n


@pytest.mark.parametrize("kept", [b"", b"\xff\xfe", b"x" * 10_000])
def test_a_damaged_list_is_written_again(runs, nano_files, tmp_path, kept):
    path = changed(nano_files["small_base"], tmp_path / "x.gguf")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "tried.txt").write_bytes(kept)
    file_trial.require([FileTrial(path, decode=False)])
    text = (tmp_path / "cache" / "tried.txt").read_text(encoding="utf-8")
    assert len(runs) == 1 and len(text.split()) == 2


def test_one_child_tries_all_files_of_a_trio_and_none_for_the_shipped_one(
    runs, nano_files, tmp_path
):
    Trio.load(**nano_files, n_ctx=64).close()
    assert runs == []
    copies = {r: changed(p, tmp_path / p.name) for r, p in nano_files.items()}
    for _ in range(2):
        Trio.load(**copies, n_ctx=64).close()
    assert len(runs) == 1


def test_zero_skips_it(runs, monkeypatch, nano_files, tmp_path):
    monkeypatch.setenv("TRIMIX_SELF_TEST", "0")
    path = changed(nano_files["small_base"], tmp_path / "x.gguf", keys={EPS: (F32, -1.0)})
    file_trial.require([FileTrial(path)])
    assert runs == []


@pytest.mark.parametrize("n_ctx", [2, 32, 33])
def test_a_new_file_is_tried_in_a_context_of_any_size(n_ctx, nano_files, tmp_path):
    """Bug: 33 tokens were decoded whatever the context held."""
    copy = changed(nano_files["small_base"], tmp_path / "new.gguf", keys={"a.b": (U32, n_ctx)})
    with Trio.load(**{**nano_files, "small_base": copy}, n_ctx=n_ctx) as trio:
        assert trio.n_ctx == n_ctx

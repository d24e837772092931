"""Importance matrices: measured, written, read and quantized with, on nano, as a user would."""

import gzip
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter, LlamaFileType
from test_cli import one_line_error

from trimix_gguf.convert.calibration import _blocks, _chunks, calibrate
from trimix_gguf.convert.hf import convert_hf
from trimix_gguf.convert.imatrix import (
    ImportanceMatrix,
    layer_matrices,
    read_imatrix,
    write_imatrix,
)
from trimix_gguf.convert.lora import convert_lora, merge_lora
from trimix_gguf.convert.quantize import quantize_gguf
from trimix_gguf.errors import ConversionError, ModelError, TrimixError
from trimix_gguf.machine import native, products
from trimix_gguf.machine.gguf_file import read_gguf
from trimix_gguf.machine.loading import Loading
from trimix_gguf.machine.quantization import CALIBRATED
from trimix_gguf.trio.model import Model
from trimix_gguf.trio.trio import NANO

TEXT = NANO / "text.txt"
N_TOKENS, N_CTX = 1000, 128
N_READ = N_TOKENS // N_CTX * N_CTX
MODEL = NANO / "small_cpt.gguf"


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The importance matrix of nano's small_cpt, made by the command."""
    out = tmp_path_factory.mktemp("measured") / "kk.imatrix.gguf"
    options = ["--tokens", str(N_TOKENS), "--ctx", str(N_CTX)]
    command = [*CONVERT, "imatrix", str(MODEL), str(TEXT), "-o", str(out), *options]
    done = subprocess.run(command, capture_output=True, check=True)
    assert done.stdout.decode().strip() == str(out)
    assert f"Tokens: {N_READ}/{N_READ}" in done.stderr.decode()
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    return out


CONVERT = [sys.executable, "-m", "trimix_gguf.cli", "convert"]


def changed(measured, path, change):
    """`measured` with a change made to it, as another file."""
    imatrix = read_imatrix(measured)
    change(imatrix)
    write_imatrix(imatrix, path)
    return path


def contents(path):
    """A file's keys, and its tensors as they are stored."""
    reader = GGUFReader(path)
    keys = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    return keys, {tensor.name: np.array(tensor.data) for tensor in reader.tensors}


def write(path, keys, tensors):
    """A GGUF of these, whatever comes of it."""
    writer = GGUFWriter(path, "")
    writer.kv_data[0].clear()
    kinds = {str: "string", bool: "bool", int: "uint32", float: "float32", list: "array"}
    for key, value in keys.items():
        getattr(writer, f"add_{kinds[type(value)]}")(key, value)
    for name, data in tensors.items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def rewritten(measured, path, change):
    """`measured` with `change` made to its keys and tensors."""
    keys, tensors = contents(measured)
    change(keys, tensors)
    return write(path, keys, tensors)


def wide_model(path):
    """A layer of random float32 with rows of 256, the blocks of the smallest types."""
    keys, _ = contents(MODEL)
    sizes = {"embedding_length": 256, "feed_forward_length": 256, "block_count": 1}
    keys |= {f"llama.{key}": n for key, n in sizes.items()} | {"general.file_type": 0}
    keys["llama.attention.head_count"] = keys["llama.attention.head_count_kv"] = 8
    shapes = {
        t.name: tuple(256 if n != 6144 else n for n in t.shape) for t in read_gguf(MODEL).tensors
    }
    rng = np.random.default_rng(0)
    tensors = {
        name: (np.ones(shape) if len(shape) == 1 else rng.normal(0, 0.1, shape[::-1])).astype("f4")
        for name, shape in shapes.items()
        if not name.startswith("blk.") or name.startswith("blk.0.")
    }
    return write(path, keys, tensors)


# -- the file -------------------------------------------------------------------------------


def test_the_file_has_llama_cpps_form_and_every_matrix_saw_every_token(measured):
    """Bug: where only the last row's logits are wanted, the last layer's FFN sees one row."""
    reader = GGUFReader(measured)
    keys = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    assert keys == {
        "general.type": "imatrix",
        "imatrix.datasets": ["text.txt"],
        "imatrix.chunk_count": N_READ // N_CTX,
        "imatrix.chunk_size": N_CTX,
    }
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    model = read_gguf(MODEL)
    matrices = {t.name: t.shape[0] for t in model.tensors if t.name.startswith("blk.")}
    matrices = {name: n for name, n in matrices.items() if "norm" not in name}
    assert len(matrices) == 7 * model.n_layer
    assert tensors.keys() == {f"{n}.{part}" for n in matrices for part in ("in_sum2", "counts")}
    for name, n_columns in matrices.items():
        sums, counts = (tensors[f"{name}.{part}"].data for part in ("in_sum2", "counts"))
        assert sums.size == n_columns and (sums > 0).all()
        assert counts.ravel().tolist() == [N_READ], name


def test_matrices_with_one_input_have_the_same_sums_and_others_do_not(measured):
    sums = read_imatrix(measured).sums
    for i in range(read_gguf(MODEL).n_layer):
        q, k, v, o, gate, up = (
            sums[f"blk.{i}.{n}.weight"]
            for n in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up")
        )
        assert (q == k).all() and (k == v).all() and (gate == up).all()
        assert not np.allclose(q, gate, rtol=0.1) and not np.allclose(q, o, rtol=0.1)


def test_what_is_written_is_read_back(measured, tmp_path):
    one = read_imatrix(measured)
    other = read_imatrix(changed(measured, tmp_path / "again.gguf", lambda imatrix: None))
    assert (tmp_path / "again.gguf").read_bytes() == measured.read_bytes()
    assert (one.datasets, one.n_chunks, one.chunk_size) == (["text.txt"], 7, N_CTX)
    for name in one.sums:
        assert (one.sums[name] == other.sums[name]).all()


def test_chunks_are_cut_as_llama_cpp_cuts_them():
    """BOS comes before the first; in later ones it takes the place of a token."""
    assert _chunks([1, 2, 3, 4, 5, 6, 7], 3, [9]) == [[9, 1, 2], [9, 4, 5]]
    assert _chunks([1, 2, 3, 4, 5, 6, 7], 3, []) == [[1, 2, 3], [4, 5, 6]]
    with pytest.raises(ConversionError, match="the text has 1 tokens, fewer than the 3"):
        _chunks([1], 3, [9])


@pytest.mark.parametrize("name", ["text.txt", "text.txt.gz"])
def test_a_text_is_read_in_blocks_as_it_stands(tmp_path, monkeypatch, name):
    """Bug: line ends of Windows became others, and the tokens were not those of llama.cpp."""
    monkeypatch.setattr("trimix_gguf.convert.calibration._BLOCK", 8)
    text = "бір\r\nекі\n\n\r\nүш\u2028төрт\r" + "бес " * 20 + "\nалты"
    raw = ("\ufeff" + text).encode()
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith("gz") else raw)
    blocks = list(_blocks(tmp_path / name))
    assert "".join(blocks) == text and len(blocks) > 2


def test_sums_of_chunks_do_not_depend_on_the_parts_they_are_read_in(tmp_path, monkeypatch):
    """A chunk of 128 in parts of 128 or 32; the texts of two files are read in equal parts."""
    half = tmp_path / "half.txt"
    half.write_text(TEXT.read_text("utf-8")[5000:], "utf-8")
    results = []
    for n_batch in (128, 32):
        monkeypatch.setattr("trimix_gguf.convert.calibration.N_BATCH", n_batch)
        results.append(
            calibrate(MODEL, [TEXT, half], tmp_path / "i.gguf", n_tokens=256, n_ctx=128, force=True)
        )
    one, other = results
    assert one.datasets == ["text.txt", "half.txt"] and one.n_chunks == other.n_chunks == 2
    for name, sums in one.sums.items():
        np.testing.assert_allclose(sums, other.sums[name], rtol=0.02, err_msg=name)
    first = calibrate(MODEL, [TEXT], tmp_path / "i.gguf", n_tokens=256, n_ctx=128, force=True)
    assert not np.allclose(first.sums["blk.0.attn_q.weight"], one.sums["blk.0.attn_q.weight"])


def test_an_adapter_beside_its_base_gives_what_the_merged_model_gives(
    checkpoint, adapter, tmp_path
):
    base, lora, merged = (tmp_path / f"{name}.gguf" for name in ("base", "lora", "merged"))
    convert_hf(checkpoint, base, type="f32")
    convert_lora(adapter, checkpoint, lora, type="f32")
    merge_lora(adapter, checkpoint, merged, type="f32")
    options = {"n_tokens": 512, "n_ctx": 128, "force": True}
    plain, beside, whole = (
        calibrate(path, [TEXT], tmp_path / "i.gguf", lora=with_, **options)
        for path, with_ in ((base, None), (base, lora), (merged, None))
    )
    assert plain.sums.keys() == beside.sums.keys() == whole.sums.keys()
    for name, sums in whole.sums.items():
        np.testing.assert_allclose(beside.sums[name], sums, rtol=0.02, err_msg=name)
    after = "blk.1.attn_output.weight"
    assert not np.allclose(beside.sums[after], plain.sums[after], rtol=0.1)


# -- quantizing -----------------------------------------------------------------------------


def perplexity(path):
    """Of a model on another part of the text than the one that was read."""
    with_ids = Model(path, Loading(n_ctx=512, n_window=256, n_batch=256))
    ids = with_ids.tokenize(TEXT.read_text("utf-8"))[4000:4256]
    rows = with_ids.decode(ids, every_row=True)[:-1].astype(np.float64)
    with_ids.close()
    rows -= rows.max(axis=1, keepdims=True)
    nll = np.log(np.exp(rows).sum(axis=1)) - rows[np.arange(255), ids[1:]]
    return float(np.exp(nll.mean()))


@pytest.mark.parametrize("type", ["q4_0", "q4_k_m"])
def test_a_model_is_quantized_by_it(trimix, measured, tmp_path, type):
    plain, weighted = tmp_path / "plain.gguf", tmp_path / "weighted.gguf"
    how = ("--type", type, "--requantize")
    assert trimix("convert", "quantize", MODEL, plain, *how).returncode == 0
    done = trimix("convert", "quantize", MODEL, weighted, *how, "--imatrix", measured)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode().strip() == str(weighted)
    assert "importance matrix: 35 of 35 matrices in the layers" in done.stderr.decode()
    known = read_gguf(weighted).metadata
    assert {k: v for k, v in known.items() if k.startswith("quantize.")} == {
        "quantize.imatrix.file": measured.name,
        "quantize.imatrix.dataset": "text.txt",
        "quantize.imatrix.entries_count": 35,
        "quantize.imatrix.chunks_count": N_READ // N_CTX,
    }
    assert not any(key.startswith("quantize.") for key in read_gguf(plain).metadata)
    data = [{t.name: bytes(t.data) for t in GGUFReader(p).tensors} for p in (plain, weighted)]
    differ = {name for name in data[0] if data[0][name] != data[1][name]}
    assert differ and all(name.startswith("blk.") for name in differ)
    assert 1 < perplexity(weighted) < 2 * perplexity(MODEL)
    assert perplexity(weighted) != perplexity(plain)


def test_the_types_that_need_one_are_made_with_it_only(tmp_path):
    """The table is llama.cpp's: without a matrix its quantizer refuses each of them."""
    model, measured = wide_model(tmp_path / "wide.gguf"), tmp_path / "imatrix.gguf"
    calibrate(model, [TEXT], measured, n_tokens=128, n_ctx=128)
    for name, file_type in CALIBRATED.items():
        out = tmp_path / f"{name}.gguf"
        assert LlamaFileType[f"MOSTLY_{name.upper()}"] == file_type
        with pytest.raises(ConversionError, match=f"^{name} needs an importance matrix"):
            quantize_gguf(model, out, type=name)
        assert native.quantize(str(model), str(out), file_type, requantize=False) != 0
        assert "requires an imatrix" in native.last_error()
    for name, mostly in (("q2_k_s", "Q2_K"), ("iq2_xxs", "IQ2_XXS")):  # others take much longer
        out = tmp_path / f"{name}.gguf"
        quantize_gguf(model, out, type=name, imatrix=measured, force=True)
        assert {t.name: t.type for t in read_gguf(out).tensors}["blk.0.ffn_up.weight"] == mostly
        assert np.isfinite(perplexity(out))


def test_what_a_matrix_does_not_cover_is_said(trimix, measured, tmp_path):
    def without_one(imatrix):
        del imatrix.sums["blk.3.ffn_down.weight"], imatrix.counts["blk.3.ffn_down.weight"]

    part = changed(measured, tmp_path / "part.gguf", without_one)
    command = ("convert", "quantize", MODEL, tmp_path / "q.gguf", "--requantize", "--imatrix", part)
    done = trimix(*command, "--type", "q4_0")
    assert "34 of 35 matrices in the layers; 1 are quantized without" in done.stderr.decode()
    refused = one_line_error(trimix(*command, "--type", "iq2_xxs", "--force"))
    assert "Missing importance matrix for tensor blk.3.ffn_down.weight" in refused


def test_infinite_sums_are_not_written_and_endless_counts_are_read(measured, tmp_path):
    name = "blk.0.attn_q.weight"
    with pytest.raises(ConversionError, match=f"inputs of {name} are not finite"):
        changed(measured, tmp_path / "i.gguf", lambda imatrix: imatrix.sums[name].fill(np.inf))

    def endless(keys, tensors):
        tensors[f"{name}.counts"].fill(1e30)

    means = read_imatrix(rewritten(measured, tmp_path / "j.gguf", endless)).means()
    assert (means[name] > 0).all() and (means[name] < 1e-9).all()


def test_a_stack_of_experts_has_a_mean_each_and_1_where_no_token_came(measured, tmp_path):
    def stacked(imatrix):
        imatrix.sums["blk.0.ffn_up_exps.weight"] = np.array([[8.0, 4.0], [0.0, 0.0]])
        imatrix.counts["blk.0.ffn_up_exps.weight"] = np.array([4, 0])

    path = changed(measured, tmp_path / "stack.gguf", stacked)
    means = read_imatrix(path).means()["blk.0.ffn_up_exps.weight"]
    assert means.tolist() == [[2.0, 1.0], [1.0, 1.0]]


# -- refusals -------------------------------------------------------------------------------


def refused(imatrix, words, tmp_path, **options):
    """Quantizing with it is refused in one line, and nothing is left."""
    model = options.pop("model", MODEL)
    out = tmp_path / "refused.gguf"
    with pytest.raises(TrimixError) as caught:
        quantize_gguf(
            model, out, **{"type": "q4_0", "requantize": True, **options}, imatrix=imatrix
        )
    assert words in str(caught.value) and "\n" not in str(caught.value), str(caught.value)
    assert not out.exists()


def test_a_matrix_of_another_model_is_refused(trimix, measured, tmp_path):
    large = NANO / "large_ins.gguf"
    refused(
        measured, "blk.0.attn_k.weight has 320 columns, and the entry 192", tmp_path, model=large
    )

    def longer(imatrix):
        for part in (imatrix.sums, imatrix.counts):
            part["blk.9.attn_q.weight"] = part["blk.0.attn_q.weight"]

    longer = changed(measured, tmp_path / "longer.gguf", longer)
    refused(longer, "it has no blk.9.attn_q.weight", tmp_path)
    command = ("convert", "quantize", large, tmp_path / "o.gguf", "--type", "q4_0", "--requantize")
    assert "another model" in one_line_error(trimix(*command, "--imatrix", measured))
    refused(measured, "q8_0 makes no use", tmp_path, type="q8_0")


def test_damaged_files_are_refused(measured, tmp_path):
    cut = tmp_path / "cut.gguf"
    for n in (0, 10, 200, measured.stat().st_size - 1000):
        cut.write_bytes(measured.read_bytes()[:n])
        refused(cut, str(cut), tmp_path)
    refused(tmp_path / "absent.gguf", "no such file", tmp_path)
    refused(MODEL, "is a model, expected an importance matrix", tmp_path)
    refused(tmp_path / "old.dat", "llama-imatrix --in-file old.dat", tmp_path)
    name = "blk.0.attn_q.weight"
    changes = {
        "imatrix.chunk_size": lambda keys, tensors: keys.pop("imatrix.chunk_size"),
        f"{name}.counts is nothing": lambda keys, tensors: tensors.pop(f"{name}.counts"),
        "has no entries": lambda keys, tensors: tensors.clear(),
        "is F16, expected F32": lambda keys, tensors: tensors.update(
            {f"{name}.in_sum2": tensors[f"{name}.in_sum2"].astype(np.float16)}
        ),
        "no sum of squares": lambda keys, tensors: tensors[f"{name}.in_sum2"].fill(np.nan),
        "no sum of squares is": lambda keys, tensors: tensors[f"{name}.counts"].fill(-1),
        "192 sums and 5 counts": lambda keys, tensors: tensors.update(
            {f"{name}.counts": np.ones((5, 1), np.float32)}
        ),
        "expected a whole number": lambda keys, tensors: keys.update({"imatrix.chunk_count": "7"}),
    }
    for words, change in changes.items():
        refused(rewritten(measured, tmp_path / "bad.gguf", change), words, tmp_path)
    same = rewritten(measured, tmp_path / "same.gguf", lambda keys, tensors: None)
    assert (read_imatrix(same).sums[name] == read_imatrix(measured).sums[name]).all()


def test_texts_and_models_that_cannot_be_measured_are_refused(trimix, nano_files, tmp_path):
    short, latin, out = (tmp_path / n for n in ("short.txt", "latin.txt", "out.gguf"))
    short.write_text("Қазақстан Республикасы", "utf-8")
    latin.write_bytes("caf\xe9".encode("latin-1"))
    for model, text, options, words in (
        (MODEL, short, (), "fewer than the 512 of one chunk"),
        (MODEL, TEXT, ("--tokens", "100"), "the text has 100 tokens"),
        (MODEL, TEXT, ("--ctx", "1024"), "trained on texts of 512 tokens"),
        (MODEL, latin, (), "is not UTF-8"),
        (MODEL, tmp_path / "absent.txt", (), "absent.txt"),
        (MODEL, TEXT, ("--lora", MODEL), "not an adapter"),
        (short, TEXT, (), "is not a GGUF file"),
    ):
        command = ("convert", "imatrix", model, text, "-o", out, *options)
        assert words in one_line_error(trimix(*command))
    out.write_bytes(b"mine")
    assert "--force" in one_line_error(trimix("convert", "imatrix", MODEL, TEXT, "-o", out))
    assert out.read_bytes() == b"mine"
    assert {path.name for path in tmp_path.iterdir()} == {"short.txt", "latin.txt", "out.gguf"}
    assert trimix("convert", "imatrix", MODEL, TEXT, "-o", out, "--ctx", "8").returncode == 2


# -- stops ----------------------------------------------------------------------------------


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT")
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stop_keeps_what_was_read_and_a_kill_leaves_nothing(sent, tmp_path):
    long, out = tmp_path / "long.txt", tmp_path / "out.gguf"
    long.write_text(60 * TEXT.read_text("utf-8"), "utf-8")
    command = [*CONVERT, "imatrix", str(MODEL), str(long), "-o", str(out), "--tokens", "600000"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, encoding="utf-8") as running:
        first = running.stderr.readline()  # after the first chunk
        running.send_signal(sent)
        rest = running.stderr.read()
    assert first.startswith("Tokens: 512/"), first + rest
    if sent == signal.SIGKILL:
        assert not out.exists()
        calibrate(MODEL, [TEXT], out, n_tokens=512)  # clears what the killed one left
    else:
        assert running.returncode == 130 and f"stopped: {out} holds " in rest, rest
        assert "Traceback" not in rest and "Exception ignored" not in rest
        found = read_imatrix(out)
        assert 1 <= found.n_chunks < 600000 // 512
        counts = {int(n) for counts in found.counts.values() for n in counts}
        assert len(counts) == 1  # every matrix saw the same rows
        assert 0 <= counts.pop() - 512 * found.n_chunks < 512
    assert {path.name for path in tmp_path.iterdir()} == {"long.txt", "out.gguf"}


# -- llama.cpp's callback -------------------------------------------------------------------


def test_what_a_watch_raises_comes_out_of_the_decode():
    def fails(name, rows, which):
        raise ValueError(name)

    watch = products.Watch(layer_matrices(read_gguf(MODEL)), fails)
    model = Model(MODEL, Loading(n_ctx=64), watch=watch)
    model.decode([1, 2, 3])
    with pytest.raises(ValueError, match=r"^blk\.0\.attn_"):
        watch.check()
    watch.check()
    model.close()


def test_what_fails_while_it_is_measured_ends_the_measurement(tmp_path, monkeypatch):
    def fails(imatrix, name, rows, which):
        raise MemoryError(name)

    monkeypatch.setattr(ImportanceMatrix, "add", fails)
    with pytest.raises(MemoryError, match="blk"):
        calibrate(MODEL, [TEXT], tmp_path / "out.gguf", n_tokens=512)
    assert not list(tmp_path.iterdir())


def test_a_long_name_is_cut_between_two_letters():
    """llama.cpp takes 127 bytes; half a letter would be no UTF-8."""
    overrides = native._overrides({"quantize.imatrix.file": 100 * "ә", "n": 3})
    assert overrides[0].value.val_str.decode() == 63 * "ә"
    assert (overrides[1].value.val_i64, overrides[2].key) == (3, b"")


def test_the_output_layer_is_not_computed():
    seen = []
    watched = ["token_embd.weight", "blk.4.ffn_down.weight"]  # nano's output is its embedding
    watch = products.Watch(watched, lambda name, rows, which: seen.append((name, rows.shape)))
    model = Model(MODEL, Loading(n_ctx=64), watch=watch)
    model.decode([1, 2, 3], every_row=True)
    model.decode([4, 5], every_row=True)
    model.close()
    assert seen == [("blk.4.ffn_down.weight", (n, 512)) for n in (3, 2)]


def test_another_form_of_llama_cpps_tensors_is_refused(monkeypatch):
    monkeypatch.setattr(products, "_OBJECT_BYTES", 24)
    with pytest.raises(ModelError, match="tensors of 344 bytes, expected 336"):
        products.Watch([], lambda *_: None)


def test_rows_of_one_decode_are_those_that_a_matrix_is_multiplied_with():
    """In the first layer they are the normalised embeddings, which can be computed here."""
    from gguf.quants import dequantize

    seen = {}
    watch = products.Watch(
        ["blk.0.attn_q.weight"], lambda name, rows, which: seen.update({name: rows})
    )
    model = Model(MODEL, Loading(n_ctx=64), watch=watch)
    ids = [5, 60, 600]
    model.decode(ids)
    model.close()
    tensors = {tensor.name: tensor for tensor in GGUFReader(MODEL).tensors}
    embedding = tensors["token_embd.weight"]
    rows = dequantize(embedding.data[ids], embedding.tensor_type)
    rows = rows / np.sqrt((rows**2).mean(axis=1, keepdims=True) + 1e-5)
    expected = rows * tensors["blk.0.attn_norm.weight"].data
    np.testing.assert_allclose(seen["blk.0.attn_q.weight"], expected, rtol=1e-4, atol=1e-5)

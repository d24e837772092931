"""Importance matrices: measured, written, read and quantized with, on nano, as a user would."""

import gzip
import os
import signal
import subprocess

import numpy as np
import pytest
from gguf import GGUFReader
from measured_matrix import (
    CONVERT,
    MODEL,
    N_CTX,
    N_READ,
    TEXT,
    changed,
)

from trimix_gguf.convert.calibration import _blocks, _chunks, calibrate
from trimix_gguf.convert.hf import convert_hf
from trimix_gguf.convert.imatrix import (
    ImportanceMatrix,
    layer_matrices,
    read_imatrix,
)
from trimix_gguf.convert.lora import convert_lora, merge_lora
from trimix_gguf.errors import ConversionError, ModelError
from trimix_gguf.machine import native, products
from trimix_gguf.machine.gguf_file import read_gguf
from trimix_gguf.machine.loading import Loading
from trimix_gguf.trio.model import Model

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
    n_ff = read_gguf(MODEL).metadata["llama.feed_forward_length"]
    assert seen == [("blk.4.ffn_down.weight", (n, n_ff)) for n in (3, 2)]


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

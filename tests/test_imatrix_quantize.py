"""Quantization by an importance matrix, and which matrices are refused."""

import numpy as np
import pytest
from gguf import GGUFReader, LlamaFileType
from measured_matrix import MODEL, N_CTX, N_MATRICES, N_READ, TEXT, changed, rewritten, wide_model
from test_cli import one_line_error

from trimix_gguf.convert.calibration import calibrate
from trimix_gguf.convert.imatrix import (
    read_imatrix,
)
from trimix_gguf.convert.quantize import quantize_gguf
from trimix_gguf.errors import ConversionError, TrimixError
from trimix_gguf.machine import native
from trimix_gguf.machine.gguf_file import read_gguf
from trimix_gguf.machine.loading import Loading
from trimix_gguf.machine.quantization import CALIBRATED
from trimix_gguf.trio.model import Model
from trimix_gguf.trio.trio import NANO

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
    assert (
        f"importance matrix: {N_MATRICES} of {N_MATRICES} matrices in the layers"
        in done.stderr.decode()
    )
    known = read_gguf(weighted).metadata
    assert {k: v for k, v in known.items() if k.startswith("quantize.")} == {
        "quantize.imatrix.file": measured.name,
        "quantize.imatrix.dataset": "text.txt",
        "quantize.imatrix.entries_count": N_MATRICES,
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
        del imatrix.sums["blk.3.ffn_up.weight"], imatrix.counts["blk.3.ffn_up.weight"]

    part = changed(measured, tmp_path / "part.gguf", without_one)
    command = ("convert", "quantize", MODEL, tmp_path / "q.gguf", "--requantize", "--imatrix", part)
    done = trimix(*command, "--type", "q4_0")
    covered = f"{N_MATRICES - 1} of {N_MATRICES} matrices in the layers; 1 are quantized without"
    assert covered in done.stderr.decode()
    refused = one_line_error(trimix(*command, "--type", "iq2_xxs", "--force"))
    assert "Missing importance matrix for tensor blk.3.ffn_up.weight" in refused


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
    n_large, n = read_gguf(large).n_embd, read_gguf(MODEL).n_embd
    words = f"blk.0.attn_k.weight has {n_large} columns, and the entry {n}"
    refused(measured, words, tmp_path, model=large)

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
        f"{read_gguf(MODEL).n_embd} sums and 5 counts": lambda keys, tensors: tensors.update(
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

"""`trimix adapt --instruct`: what an instruct model has over its base comes on top."""

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter

for needed in ("torch", "transformers", "peft", "accelerate", "ftfy", "datasketch", "fontTools"):
    pytest.importorskip(needed, reason="needs the extra: pip install -e '.[adapt]'")

from raw_text import kazakh  # noqa: E402

from trimix_gguf.adapting.bases import Base, load_base  # noqa: E402
from trimix_gguf.adapting.chat_vector import add_chat_vector  # noqa: E402
from trimix_gguf.trio.trio import NANO  # noqa: E402

BASE = NANO / "small_base.gguf"
LITTLE = ("--full", "--tokens", 2048, "--exercises", 0, "--no-tune")


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "kazakh.txt"
    file.write_text("\n\n".join(kazakh(30)), encoding="utf-8")
    return file


def changed(path, change, head=False):
    """A copy of nano's small_base, with `change(name, array)` for each tensor of weights.

    With `head` the embeddings are stored a second time, as the output layer.
    """
    reader = GGUFReader(BASE)
    writer = GGUFWriter(path, "")
    for field in reader.fields.values():
        if not field.name.startswith(("GGUF.", "general.architecture")):
            writer.add_key_value(
                field.name, field.contents(), field.types[0], *(field.types[1:2] or [None])
            )
    writer.kv_data[0].pop("general.architecture", None)
    writer.add_string("general.architecture", reader.fields["general.architecture"].contents())
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, change(tensor.name, weights_of(tensor)))
        if head and tensor.name == "token_embd.weight":
            writer.add_tensor("output.weight", change(tensor.name, weights_of(tensor)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def weights_of(tensor):
    from gguf.quants import dequantize

    return dequantize(tensor.data, tensor.tensor_type)


def read(path):
    return {t.name: weights_of(t) for t in GGUFReader(path).tensors}


def test_the_difference_is_added_and_measured(adapt, text_file, tmp_path):  # noqa: F811
    plain = adapt("a", text_file, *LITTLE, "-o", tmp_path / "plain.gguf")
    assert plain.exit_code == 0, plain.output
    rng = np.random.default_rng(0)
    shift = {n: rng.normal(0, 0.05, a.shape).astype("f4") for n, a in read(BASE).items()}
    instruct = changed(tmp_path / "instruct.gguf", lambda name, a: a + shift[name])
    options = ("--instruct", instruct, "-o", tmp_path / "added.gguf")
    done = adapt("b", text_file, *LITTLE, *options)
    assert done.exit_code == 0, done.output
    assert "with the chat vector: held-out perplexity" in done.stderr
    before, after = read(tmp_path / "plain.gguf"), read(tmp_path / "added.gguf")
    for name, array in before.items():
        step = np.abs(array).max() / 127 + np.abs(after[name]).max() / 127  # of q8_0
        np.testing.assert_allclose(after[name], array + shift[name], atol=2 * step + 1e-3)
        assert np.abs(after[name] - array).max() > 0.05


def test_a_model_of_another_size_is_refused_before_anything_is_read(adapt, text_file, tmp_path):  # noqa: F811
    wrong = adapt("c", text_file, *LITTLE, "--instruct", NANO / "large_ins.gguf")
    assert wrong.exit_code == 1
    assert "no instruct model of small_base.gguf: " in str(wrong.exception)
    assert "\n" not in str(wrong.exception)
    absent = adapt("d", text_file, *LITTLE, "--instruct", tmp_path / "absent.gguf")
    assert absent.exit_code == 1 and "absent.gguf" in str(absent.exception)


def test_a_head_of_its_own_gets_the_difference_of_embeddings_that_are_the_head(tmp_path):
    """Bug: KeyError at the end of training, where the instruct model has no head of its own."""
    base = Base(changed(tmp_path / "base.gguf", lambda name, a: a, head=True))
    taught = load_base(base, "float32")
    before = taught.lm_head.weight.detach().clone()
    instruct = Base(changed(tmp_path / "instruct.gguf", lambda name, a: a + np.float32(0.25)))
    add_chat_vector(taught, instruct, base, lambda _: None)
    change = taught.lm_head.weight.detach() - before
    assert float(change.min()) == pytest.approx(0.25, abs=1e-4) == float(change.max())

"""The model that `trimix adapt` teaches: which files it may be in, and what is refused."""

import pytest
from split_gguf import split_gguf

for needed in ("torch", "transformers", "peft", "accelerate", "ftfy", "datasketch", "fontTools"):
    pytest.importorskip(needed, reason="needs the extra: pip install -e '.[adapt]'")

from tiny_checkpoints import save_model, save_tokenizer  # noqa: E402

from trimix_gguf.adapting.bases import Base, Tokenizer, check_alike, load_base  # noqa: E402
from trimix_gguf.adapting.publishing import try_out  # noqa: E402
from trimix_gguf.adapting.taught import add_adapter  # noqa: E402
from trimix_gguf.convert.hf import convert_hf  # noqa: E402
from trimix_gguf.convert.tokenizer_bpe import QWEN2_SPLIT  # noqa: E402
from trimix_gguf.errors import ConversionError  # noqa: E402
from trimix_gguf.trio.trio import NANO  # noqa: E402


def test_a_base_in_several_files_is_refused_before_the_text_is_read(adapt, text_file, tmp_path):
    """Bug: transformers read the first file, and made up the weights of all others."""
    split_gguf(NANO / "small_base.gguf", tmp_path / "base", 3, empty_first=True)
    first = tmp_path / "base-00001-of-00003.gguf"
    done = adapt("kk", text_file, "--base", first, "--tokens", 2048)
    assert isinstance(done.exception, ConversionError), done.output
    assert "one of 3 files" in str(done.exception) and "read" not in done.stderr
    with pytest.raises(ConversionError, match=r"lacks \d+ tensors .* --base"):
        load_base(Base(first), "float32")


@pytest.fixture
def made(tmp_path):
    """A tiny model of a family, by its name in tiny_checkpoints: its folder and its GGUF."""

    def make(family):
        folder = tmp_path / "checkpoint"
        folder.mkdir()
        save_model(folder, family)
        save_tokenizer(folder, QWEN2_SPLIT, full=True)
        convert_hf(folder, tmp_path / "model.gguf", type="f32")
        return folder, tmp_path / "model.gguf"

    return make


@pytest.mark.parametrize("family", ["llama llama3 rope", "llama biased", "qwen2 yarn"])
def test_a_model_that_transformers_reads_otherwise_is_refused(made, family):
    """Bug: a model without its scaling of RoPE was taught, and llama.cpp ran one with it."""
    folder, gguf = made(family)
    tokenizer = Tokenizer(Base(gguf))
    check_alike(load_base(Base(gguf, folder), "float32"), Base(gguf, folder), tokenizer, "float32")
    with pytest.raises(ConversionError, match="leaves out a part .* --base the folder"):
        check_alike(load_base(Base(gguf), "float32"), Base(gguf), tokenizer, "float32")


@pytest.mark.parametrize("family", ["gemma3 multimodal", "qwen3moe", "qwen3"])
def test_what_cannot_be_taught_or_written_is_refused_before_the_training(made, tmp_path, family):
    """Bug: it was found out at the end, or with a traceback."""
    folder, gguf = made(family)
    base = Base(gguf) if family == "qwen3" else Base(gguf, folder)  # heads of an unusual size
    with pytest.raises(ConversionError):
        try_out(add_adapter(load_base(base, "float32"), 4), tmp_path, whole=False)

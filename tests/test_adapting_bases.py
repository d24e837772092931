"""The model that `trimix adapt` teaches: which files it may be in, and what is refused."""

import pytest
from split_gguf import split_gguf

pytest.importorskip("ftfy", reason="needs the extra: pip install -e '.[adapt]'")

from trimix_gguf.adapting.bases import Base, load_base  # noqa: E402
from trimix_gguf.errors import ConversionError  # noqa: E402
from trimix_gguf.trio.trio import NANO  # noqa: E402


def test_a_base_in_several_files_is_refused_before_the_text_is_read(
    adapt, text_file, tmp_path, with_torch
):
    """Bug: transformers read the first file, and made up the weights of all others."""
    split_gguf(NANO / "small_base.gguf", tmp_path / "base", 3, empty_first=True)
    first = tmp_path / "base-00001-of-00003.gguf"
    done = adapt("kk", text_file, "--base", first, "--tokens", 2048)
    assert isinstance(done.exception, ConversionError), done.output
    assert "one of 3 files" in str(done.exception) and "read" not in done.stderr
    with pytest.raises(ConversionError, match=r"lacks \d+ tensors .* --base"):
        load_base(Base(first), "float32")

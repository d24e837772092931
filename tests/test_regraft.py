"""A GGUF with other weights: as if the checkpoint had brought its tokenizer along."""

import numpy as np
import pytest
from gguf import GGUFReader
from hf_checkpoint import checkpoint_folder

from trimix_gguf.convert.checkpoint import Checkpoint, write_safetensors
from trimix_gguf.convert.hf import convert_hf
from trimix_gguf.convert.regraft import regraft
from trimix_gguf.errors import ConversionError


@pytest.fixture
def doubled(nano_files, tmp_path):
    """nano's small_base as a checkpoint folder, each number twice as large."""
    folder = tmp_path / "doubled"
    checkpoint_folder(nano_files["small_base"], folder, "F32")
    stored = Checkpoint(folder)
    numbers = {name: 2 * stored.read(name) for name in stored.tensors}
    write_safetensors(folder / "new", stored.tensors, numbers.__getitem__)
    (folder / "new").replace(folder / "model.safetensors")
    return folder


def test_it_is_what_a_conversion_gives(doubled, nano_files, tmp_path):
    convert_hf(doubled, tmp_path / "converted.gguf", name="a")
    (doubled / "tokenizer.json").unlink()
    (doubled / "tokenizer_config.json").unlink()
    regraft(nano_files["small_base"], doubled, tmp_path / "regrafted.gguf", name="a")
    one, other = (GGUFReader(tmp_path / f"{name}.gguf") for name in ("converted", "regrafted"))
    metadata = [
        {k: f.contents() for k, f in r.fields.items() if not k.startswith("GGUF.")}
        for r in (one, other)
    ]
    assert metadata[0] == metadata[1]
    for a, b in zip(one.tensors, other.tensors, strict=True):
        assert a.name == b.name and a.tensor_type == b.tensor_type
        assert np.array_equal(a.data, b.data)


def test_a_type_that_needs_the_quantizer_is_refused(doubled, nano_files, tmp_path):
    with pytest.raises(ConversionError, match="q4_k_m"):
        regraft(nano_files["small_base"], doubled, tmp_path / "a.gguf", type="q4_k_m")
    assert not (tmp_path / "a.gguf").exists()

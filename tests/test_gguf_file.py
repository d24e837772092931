"""Laws of the GGUF check: it agrees with gguf.GGUFReader; damage is only ever ModelFileError."""

import os
import random
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from gguf.quants import quantize

from trimix_gguf.errors import ModelFileError
from trimix_gguf.machine.gguf_file import MAX_LISTED, GGUFArray, GGUFFile, read_gguf

MODELS = Path(os.environ.get("TRIMIX_MODELS", "~/.cache/trimix-models")).expanduser()
SMOLLM = MODELS / "smollm2-135m-instruct-q4_1.gguf"
U16, U32 = int(GGUFValueType.UINT16), int(GGUFValueType.UINT32)
STRING, ARRAY = int(GGUFValueType.STRING), int(GGUFValueType.ARRAY)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Two layers: two key-value heads of 8 in the first, one in the second."""
    path = tmp_path / "model.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_head_count(4)
    writer.add_head_count_kv([2, 1])
    writer.add_rope_freq_base(1e4)
    writer.add_bool("test.flag", True)
    writer.add_int8("test.int8", -7)
    writer.add_uint64("test.uint64", 2**63)
    writer.add_float64("test.float64", 0.1)
    writer.add_string("test.text", "é\nä")
    writer.add_array("test.words", ["a", "", "ccc"])
    writer.add_token_list([f"t{i}" for i in range(MAX_LISTED + 1)])
    writer.add_array("test.scores", bytes(MAX_LISTED + 1))
    weights = np.arange(3 * 32, dtype=np.float32).reshape(3, 32)
    writer.add_tensor("f32.weight", weights[:, :3].copy())
    writer.add_tensor("f16.weight", weights.astype(np.float16))
    q8_0 = GGMLQuantizationType.Q8_0
    writer.add_tensor("q8_0.weight", quantize(weights, q8_0), raw_dtype=q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def refusal(path: Path) -> str:
    """The message a file is refused with, checked to be one line that names the file."""
    with pytest.raises(ModelFileError) as caught:
        read_gguf(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and len(message.splitlines()) == 1
    return message


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def key(name: str, value_type: int, value: bytes) -> bytes:
    return string(name) + struct.pack("<I", value_type) + value


def tensor(name: str, shape: tuple[int, ...], type_id: int, offset: int) -> bytes:
    row = struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, type_id, offset)
    return string(name) + row


LLAMA = key("general.architecture", STRING, string("llama"))


def by_hand(path: Path, keys: list[bytes], tensors: Sequence[bytes] = (), version: int = 3) -> Path:
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(keys))
    body = head + b"".join(keys) + b"".join(tensors)
    path.write_bytes(body + b"\0" * (-len(body) % 32) + b"\0" * 256)
    return path


def assert_agrees_with_oracle(path: Path) -> GGUFFile:
    ours, oracle = read_gguf(path), GGUFReader(path)
    fields = {name: f for name, f in oracle.fields.items() if not name.startswith("GGUF.")}
    assert list(ours.metadata) == list(fields)
    for name, value in ours.metadata.items():
        if isinstance(value, GGUFArray):
            assert value.value_type == fields[name].types[1].name
            assert value.length == len(fields[name].data)
            parts = (fields[name].parts[i] for i in fields[name].data)
            strings = value.value_type == "STRING"
            items = [bytes(part) if strings else part[0] for part in parts]
            assert ours.array(name) == items
        else:
            assert value == fields[name].contents(), name
            assert type(value) is type(fields[name].contents()), name
    assert [(t.name, t.shape, t.type, t.offset, t.n_bytes) for t in ours.tensors] == [
        (t.name, tuple(t.shape.tolist()), t.tensor_type.name, t.data_offset, t.n_bytes)
        for t in oracle.tensors
    ]
    assert ours.file_size == path.stat().st_size
    return ours


def test_agrees_with_gguf_reader(model: Path) -> None:
    file = assert_agrees_with_oracle(model)
    assert len(file.tensors) == 3 and (file.version, file.architecture) == (3, "llama")
    assert isinstance(file.metadata["test.scores"], GGUFArray)
    assert (file.n_ctx_train, file.n_embd, file.n_layer, file.n_head_kv) == (128, 32, 2, (2, 1))
    assert file.weight_bytes == 3 * 3 * 4 + 3 * 32 * 2 + 3 * 34


@pytest.mark.skipif(not SMOLLM.exists(), reason=f"{SMOLLM} is not there")
def test_agrees_with_gguf_reader_on_a_real_model() -> None:
    assert_agrees_with_oracle(SMOLLM)


def test_a_cut_at_any_byte_is_refused(model: Path) -> None:
    last = read_gguf(model).tensors[-1]
    end = last.offset + last.n_bytes
    assert end < model.stat().st_size  # so that a cut in the final padding is tried too
    for size in reversed(range(model.stat().st_size)):
        os.truncate(model, size)
        if size < end:
            message = refusal(model)
            assert message.endswith(f"has {size}; download it again") or not size
        else:
            assert read_gguf(model).tensors[-1] == last


def test_a_changed_byte_gives_a_file_or_a_refusal(model: Path) -> None:
    whole, random_ = model.read_bytes(), random.Random(0)
    n_head = read_gguf(model).tensors[0].offset
    n_refused = 0
    for trial in range(600):
        damaged = bytearray(whole)
        # Each of the first 300 bytes once, for they hold the counts, lengths and types.
        at = trial if trial < 300 else random_.randrange(n_head)
        damaged[at] ^= random_.randrange(1, 256)
        model.write_bytes(damaged)
        try:
            file = read_gguf(model)
            file.kv_bytes(16)
            assert file.n_ctx_train >= 0
        except ModelFileError as error:
            assert len(str(error).splitlines()) == 1
            n_refused += 1
    assert 0 < n_refused < 600


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "is empty"),
        (b"PK\x03\x04" + b"\0" * 60, "zip"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"\n<!DOCTYPE html><html></html>", "web page"),
        (struct.pack("<Q", 64) + b'{"__metadata__":{}}', "safetensors"),
        (b'{"error":"not found"}', "JSON"),
        (b"\0" * 64, "all zeros"),
        (b"\nabc\n", r"it starts with b'\nabc\n'"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 0x1, expected 2 or 3"),
        (b"GGUF" + struct.pack("<IQQ", 4, 0, 0), "version 0x4, expected 2 or 3"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**64 - 1, 0), "cut off"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**64 - 1), "cut off"),
    ],
)
def test_what_is_not_gguf_is_refused(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    assert expected in refusal(path)


@pytest.mark.skipif(os.name == "nt", reason="signals, limits or pipes as POSIX has them")
def test_no_file_a_directory_and_a_pipe_are_refused(tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "absent.gguf")
    (tmp_path / "link.gguf").symlink_to("absent.gguf")
    assert "no such file" in refusal(tmp_path / "link.gguf")
    assert "is a directory" in refusal(tmp_path)
    os.mkfifo(tmp_path / "pipe.gguf")
    assert "is not a file" in refusal(tmp_path / "pipe.gguf")


def numbers(item_type: int, length: int) -> bytes:
    return struct.pack("<IQ", item_type, length)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ([], "no general.architecture"),
        ([key("general.architecture", U32, b"\0" * 4)], "no general.architecture"),
        ([key("split.no", U32, b"\1\0\0\0")], "first file of this split"),
        ([LLAMA, LLAMA], "'general.architecture' is there twice"),
        ([LLAMA, key("a\nb", 13, b"")], r"'a\nb' has the unknown value type 13"),
        ([LLAMA, key("a", STRING, struct.pack("<Q", 2**63))], "cut off"),
        ([LLAMA, key("a", ARRAY, numbers(U32, 2**62))], "cut off"),
        ([LLAMA, key("a", ARRAY, numbers(STRING, 2**60))], "cut off"),
        ([LLAMA, key("a", ARRAY, numbers(99, 1))], "unknown value type 99"),
        ([LLAMA, key("a", ARRAY, numbers(ARRAY, 1) + numbers(U32, 0))], "array of arrays"),
        ([LLAMA, struct.pack("<Q", 1) + b"\xff" + b"\0" * 5], "not UTF-8"),
        ([LLAMA, key("general.alignment", U32, struct.pack("<I", 0))], "a power of two"),
        ([LLAMA, key("general.alignment", U32, struct.pack("<I", 48))], "a power of two"),
        ([LLAMA, key("general.alignment", STRING, string("32"))], "a power of two"),
    ],
)
def test_unsound_metadata_is_refused(tmp_path: Path, keys: list[bytes], expected: str) -> None:
    assert expected in refusal(by_hand(tmp_path / "model.gguf", keys))


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        ([tensor("a", (8,), 0, 0), tensor("a", (8,), 0, 32)], "'a' is there twice"),
        ([tensor("a", (8,), 0, 4)], "misaligned"),
        ([tensor("a", (16,), 0, 0), tensor("b", (8,), 0, 32)], "'b' overlaps"),
        ([tensor("a", (8,), 0, 0), tensor("b", (8,), 0, 64)], "'b' follows a gap"),
        ([tensor("a", (8,), 4, 0)], "unknown type 4"),
        ([tensor("a", (33,), 8, 0)], "Q8_0 wants rows of 32s"),
        ([tensor("a", (1,) * 5, 0, 0)], "5 dimensions"),
        ([tensor("a" * 64, (8,), 0, 0)], "a name of 63 bytes"),
        ([tensor("a", (2**63,) * 4, 0, 0)], "cut off or damaged in the weights"),
        ([tensor("a", (65,), 0, 0)], "cut off or damaged in the weights"),
    ],
)
def test_unsound_tensors_are_refused(tmp_path: Path, tensors: list[bytes], expected: str) -> None:
    assert expected in refusal(by_hand(tmp_path / "model.gguf", [LLAMA], tensors))


def test_version_2_is_read(tmp_path: Path) -> None:
    tensors = [tensor("a", (8, 1), 0, 0), tensor("b", (64,), 8, 32)]
    file = read_gguf(by_hand(tmp_path / "model.gguf", [LLAMA], tensors, version=2))
    assert (file.version, file.weight_bytes) == (2, 32 + 68)


def sized(**hparams: object) -> GGUFFile:
    metadata = {"general.architecture": "x"}
    metadata |= {f"x.{name.replace('__', '.')}": value for name, value in hparams.items()}
    return GGUFFile(Path("x.gguf"), 3, metadata, (), 0)


def test_kv_bytes_equals_hand_computed_sizes(model: Path) -> None:
    # 10 positions x (2 + 1) heads of 8, keys and values, 2 bytes each.
    assert read_gguf(model).kv_bytes(10) == 10 * 3 * (8 + 8) * 2
    hparams = {"embedding_length": 256, "block_count": 3, "attention__head_count": 4}
    # As many key-value heads as heads; q8_0 is 34 bytes and q4_0 18 bytes for 32 elements.
    assert sized(**hparams).kv_bytes(5, "q8_0", "q4_0") == 5 * 3 * 4 * (2 * 34 + 2 * 18)
    hparams |= {"attention__head_count_kv": 1}
    hparams |= {"attention__key_length": 96, "attention__value_length": 32}
    assert sized(**hparams).kv_bytes(7, "f32", "f16") == 7 * 3 * 1 * (96 * 4 + 32 * 2)


def test_kv_bytes_refuses_what_it_cannot_size(model: Path) -> None:
    file = read_gguf(model)
    with pytest.raises(ValueError, match="unknown cache type 'q9'"):
        file.kv_bytes(1, "q9")
    with pytest.raises(ValueError, match="not whole blocks of 32"):
        file.kv_bytes(1, "f16", "q8_0")
    with pytest.raises(ModelFileError, match=r"x\.gguf: expected a size in 'x\.block_count'"):
        sized(embedding_length=8, attention__head_count=1).kv_bytes(1)
    with pytest.raises(ModelFileError, match="at most 512"):
        assert sized(block_count=2**32 - 1).n_layer
    with pytest.raises(ModelFileError, match="expected 2 sizes"):
        assert sized(block_count=2, attention__head_count_kv=[1]).n_head_kv

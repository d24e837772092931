"""A GGUF in several files, as llama.cpp's gguf-split writes it."""

from pathlib import Path

from gguf import GGUFReader, GGUFWriter
from gguf.constants import GGUFValueType

from trimix_gguf.machine.parts import part_names


def split_gguf(source: Path, stem: Path, n: int, *, empty_first: bool = False) -> list[Path]:
    """Write `source` as `n` files called after `stem`; all metadata is in the first."""
    reader = GGUFReader(source)
    tensors = list(reader.tensors)
    n_filled = n - empty_first
    bounds = [len(tensors) * i // n_filled for i in range(n_filled + 1)]
    groups = [tensors[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]
    groups = [[]] * empty_first + groups
    paths = [stem.with_name(name) for name in part_names(stem.name, n)]
    for i, (path, group) in enumerate(zip(paths, groups, strict=True)):
        writer = GGUFWriter(None, "")
        writer.kv_data[0].clear()
        for field in reader.fields.values() if i == 0 else ():
            if not field.name.startswith("GGUF."):
                sub = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
                writer.add_key_value(field.name, field.contents(), field.types[0], sub)
        writer.add_uint16("split.no", i)
        writer.add_uint16("split.count", n)
        writer.add_int32("split.tensors.count", len(tensors))
        for tensor in group:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return paths

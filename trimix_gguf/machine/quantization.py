"""The types that a model's weights can have: one table for all who convert, plan or fetch."""

from typing import NamedTuple


class WeightType(NamedTuple):
    """A type of the matrices in a GGUF file; vectors are float32 in each."""

    file_type: int  # llama.cpp's LLAMA_FTYPE
    bits: tuple[float, float]  # of a weight: in rows of whole 256s, and in other rows
    bytes_in_file: float  # of a weight, about: llama.cpp keeps some tensors in wider types


FLOATS = ("f32", "f16", "bf16")
WEIGHT_TYPES = {  # from the largest to the smallest
    "f32": WeightType(0, (32, 32), 4.0),
    "f16": WeightType(1, (16, 16), 2.0),
    "bf16": WeightType(32, (16, 16), 2.0),
    "q8_0": WeightType(7, (8.5, 8.5), 1.07),
    "q6_k": WeightType(18, (6.5625, 8.5), 0.83),
    "q5_k_m": WeightType(17, (5.67, 6.0), 0.73),
    "q4_k_m": WeightType(15, (4.8, 5.5), 0.63),
    "q4_0": WeightType(2, (4.5, 4.5), 0.58),
    "q3_k_m": WeightType(12, (3.82, 4.75), 0.5),
}
QUANTIZED = tuple(name for name in WEIGHT_TYPES if name not in FLOATS)
# What the converter writes itself; llama.cpp's quantizer makes the others from a whole file.
DIRECT = (*FLOATS, "q8_0")
# llama.cpp's quantizer makes these only with an importance matrix: type -> LLAMA_FTYPE.
CALIBRATED = {
    "iq3_xxs": 23,
    "iq2_m": 29,
    "q2_k_s": 21,
    "iq2_s": 28,
    "iq2_xs": 20,
    "iq2_xxs": 19,
    "iq1_m": 31,
    "iq1_s": 24,
}

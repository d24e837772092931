"""Merging: the arithmetic against naive loops, and folders that are whole or not there."""

import json
import os
from collections import namedtuple

import numpy as np
import pytest

from trimix_gguf.convert import merge
from trimix_gguf.convert.checkpoint import Checkpoint, StoredTensor, write_safetensors
from trimix_gguf.convert.merge import merge_checkpoints, ties, trim
from trimix_gguf.errors import ConversionError

SHAPES = {"model.embed_tokens.weight": (12, 8), "model.norm.weight": (8,), "q.weight": (8, 8)}


def save(folder, seed, *, dtype="F32", shapes=SHAPES, **config):
    """Save a random checkpoint folder; two seeds differ a little around the same numbers."""
    folder.mkdir()
    common, own = np.random.default_rng(0), np.random.default_rng(seed)
    values = {
        name: (common.normal(size=shape) + 0.1 * own.normal(size=shape)).astype(np.float32)
        for name, shape in shapes.items()
    }
    tensors = {n: StoredTensor(folder, 0, shape, dtype) for n, shape in shapes.items()}
    write_safetensors(folder / "model.safetensors", tensors, values.__getitem__)
    config = {"architectures": ["X"], "num_attention_heads": 2, "torch_dtype": "float32"} | config
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = {"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": []}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


@pytest.fixture
def models(tmp_path):
    """[base, a, b, c], of float32 tensors."""
    return [save(tmp_path / name, i) for i, name in enumerate(["base", "a", "b", "c"])]


def naive_ties(base, models, weights, lambda_, density):
    """TIES number by number, in float64, as section 3.2 of the paper puts it."""
    changes = []
    for model, weight in zip(models, weights, strict=True):
        change = (model.astype(np.float64) - base).ravel()
        n_kept = max(1, int(density * change.size))
        kept = sorted(range(change.size), key=lambda i: -abs(change[i]))[:n_kept]
        changes.append([weight * change[i] if i in kept else 0.0 for i in range(change.size)])
    merged = []
    for i, start in enumerate(base.ravel().tolist()):
        sign = 1 if sum(change[i] for change in changes) >= 0 else -1
        agreeing = [(c[i], w) for c, w in zip(changes, weights, strict=True) if c[i] * sign > 0]
        mean = sum(c for c, _ in agreeing) / sum(w for _, w in agreeing) if agreeing else 0.0
        merged.append(start + lambda_ * mean)
    return np.reshape(merged, base.shape)


def merged(models, out, method, **options):
    base = None if method == "linear" else models[0]
    merge_checkpoints(models[1:], out, method=method, base=base, **options)
    base, *each = (Checkpoint(folder) for folder in models)
    for name, array in Checkpoint(out):
        yield array, base.read(name), [model.read(name) for model in each]


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.5, 2.0, 0.25]])
@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_ties_equals_loops(models, tmp_path, weights, density):
    options = {"weights": weights, "density": density, "lambda_": 0.7}
    for got, base, each in merged(models, tmp_path / "out", "ties", **options):
        expected = naive_ties(base, each, weights, 0.7, density)
        np.testing.assert_allclose(got, expected, atol=1e-6)


def test_ties_by_hand():
    base = np.zeros(4, np.float32)
    one, two = np.array([3, -2, 1, 0.1], "f4"), np.array([-1, -4, 0.1, 2], "f4")
    # Trimmed to two each: [3 -2 0 0] and [0 -4 0 2]; only -2 and -4 are averaged.
    np.testing.assert_allclose(ties(base, [one, two], [1, 1], 1.0, 0.5), [3, -3, 0, 2])
    # Untrimmed, the first elects plus (3 > 1) and drops the -1.
    np.testing.assert_allclose(ties(base, [one, two], [1, 1], 2.0, 1.0), [6, -6, 1.1, 2.1])
    # A sum of zero elects plus.
    np.testing.assert_allclose(ties(base, [one, -one], [1, 1], 1.0, 1.0), [3, 2, 1, 0.1])


def test_trim_keeps_exactly_so_many():
    equal = np.array([[1, -1, 1], [2, 1, -1]], np.float32)
    np.testing.assert_array_equal(trim(equal.copy(), 0.5), [[1, -1, 0], [2, 0, 0]])
    np.testing.assert_array_equal(trim(np.array([1, 3, 2], "f4"), 0.01), [0, 3, 0])
    np.testing.assert_array_equal(trim(np.zeros(5, "f4"), 0.4), np.zeros(5))


@pytest.mark.parametrize("weights", [None, [0.5, 2.0, 0.25]])
def test_linear_and_task_arithmetic_equal_their_formulas(models, tmp_path, weights):
    w = weights or [1, 1, 1]
    for got, _, each in merged(models, tmp_path / "linear", "linear", weights=weights):
        expected = sum(wi * m.astype("f8") for wi, m in zip(w, each, strict=True)) / sum(w)
        np.testing.assert_allclose(got, expected, atol=1e-6)
    options = {"weights": weights, "lambda_": 0.3}
    for got, base, each in merged(models, tmp_path / "task", "task-arithmetic", **options):
        expected = base + 0.3 * sum(wi * (m - base) for wi, m in zip(w, each, strict=True))
        np.testing.assert_allclose(got, expected, atol=1e-6)


def test_a_model_merged_with_itself_is_itself(models, tmp_path):
    base, a = models[:2]
    merge_checkpoints([a, a], tmp_path / "linear", method="linear", weights=[1, 3])
    settings = {"base": base, "density": 1.0}
    merge_checkpoints([a, a], tmp_path / "ties", method="ties", **settings)
    merge_checkpoints([a], tmp_path / "task", method="task-arithmetic", base=base)
    for out in ("linear", "ties", "task"):
        for name, array in Checkpoint(tmp_path / out):
            np.testing.assert_allclose(array, Checkpoint(a).read(name), atol=1e-6)


def test_dtype_is_the_base_s_unless_told(tmp_path):
    base = save(tmp_path / "base", 0, dtype="BF16")
    model = save(tmp_path / "a", 1, dtype="F16")
    out = tmp_path / "out"
    merge_checkpoints([model], out, method="ties", base=base)
    assert {t.dtype for t in Checkpoint(out).tensors.values()} == {"BF16"}
    assert (out / "config.json").read_bytes() == (base / "config.json").read_bytes()
    assert (out / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    merge_checkpoints([model], out, method="ties", base=base, dtype="f16", force=True)
    assert {t.dtype for t in Checkpoint(out).tensors.values()} == {"F16"}
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "float16"


def test_bfloat16_rounds_to_nearest_even(tmp_path):
    # bfloat16 near 1 has steps of 2**-7: ties at odd halves go to the even neighbour.
    step = 2.0**-7
    values = np.array([1 + step / 2, 1 + 1.5 * step, 1 + 0.51 * step, -1 - step / 2, 0], "f4")
    tensors = {"a": StoredTensor(tmp_path, 0, (5,), "BF16")}
    write_safetensors(tmp_path / "model.safetensors", tensors, lambda _: values)
    rounded = Checkpoint(tmp_path).read("a")
    np.testing.assert_array_equal(rounded, [1, 1 + 2 * step, 1 + step, -1, 0])


def test_what_is_written_safetensors_reads(tmp_path):
    numpy_api = pytest.importorskip("safetensors.numpy", reason="the oracle is safetensors itself")
    shapes = {"odd": ((3,), "F16"), "wide": ((2, 2), "F32"), "none": ((0, 4), "F32")}
    tensors = {n: StoredTensor(tmp_path, 0, *what) for n, what in shapes.items()}
    values = {n: np.arange(np.prod(s), dtype="f4").reshape(s) for n, (s, _) in shapes.items()}
    write_safetensors(tmp_path / "model.safetensors", tensors, values.__getitem__)
    stored = Checkpoint(tmp_path).tensors.values()
    assert all(tensor.offset % (4 if tensor.dtype == "F32" else 2) == 0 for tensor in stored)
    read = numpy_api.load_file(tmp_path / "model.safetensors")
    assert {n: a.dtype.name for n, a in read.items()} == {
        "odd": "float16",
        "wide": "float32",
        "none": "float32",
    }
    for name, array in values.items():
        np.testing.assert_array_equal(read[name], array)


def test_shards_and_index(models, tmp_path, monkeypatch):
    merge_checkpoints(models[1:], tmp_path / "one", method="linear")
    monkeypatch.setattr(merge, "MAX_SHARD_BYTES", 300)
    calls = []
    out = tmp_path / "sharded"
    merge_checkpoints(models[1:], out, method="linear", progress=lambda *c: calls.append(c))
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert sorted(p.name for p in out.glob("*.safetensors")) == names
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * (12 * 8 + 8 + 8 * 8)
    assert set(index["weight_map"].values()) == set(names)
    total = index["metadata"]["total_size"]
    sizes = [4 * Checkpoint(out).read(name).size for name, *_ in calls]
    assert len(sizes) == 3 and sum(sizes) == total
    assert [call[1:] for call in calls] == [(sum(sizes[:i]), total) for i in (1, 2, 3)]
    whole = Checkpoint(tmp_path / "one")
    for name, array in Checkpoint(out):
        np.testing.assert_array_equal(array, whole.read(name))


REFUSALS = {
    "unknown method": lambda b, a: ([a, b], {"method": "slerp"}),
    "takes no base": lambda b, a: ([a], {"method": "linear", "base": b}),
    "needs a base": lambda b, a: ([a, b], {"method": "ties"}),
    "expected at least two": lambda b, a: ([a], {"method": "linear"}),
    "1 model to merge": lambda b, a: ([], {"method": "ties", "base": b}),
    "1 weights for 2": lambda b, a: ([a, b], {"method": "linear", "weights": [1]}),
    "finite": lambda b, a: ([a, b], {"method": "linear", "weights": [1, float("nan")]}),
    "add up to 0": lambda b, a: ([a, b], {"method": "linear", "weights": [1, -1]}),
    "density is 0": lambda b, a: ([a], {"method": "ties", "base": b, "density": 0}),
    "density is 1.5": lambda b, a: ([a], {"method": "ties", "base": b, "density": 1.5}),
    "unknown dtype": lambda b, a: ([a, b], {"method": "linear", "dtype": "q8_0"}),
}


@pytest.mark.parametrize("message", REFUSALS)
def test_bad_settings_are_refused(models, tmp_path, message):
    folders, options = REFUSALS[message](*models[:2])
    with pytest.raises(ConversionError, match=message) as caught:
        merge_checkpoints(folders, tmp_path / "out", **options)
    assert "\n" not in str(caught.value)
    assert set(tmp_path.iterdir()) == set(models)


def retokenize(folder, **changes):
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


DIFFERENCES = {
    r"q.weight is \[8, 4\] in .*, but \[8, 8\]": {"shapes": SHAPES | {"q.weight": (8, 4)}},
    "a lacks q.weight": {"shapes": {n: s for n, s in SHAPES.items() if n != "q.weight"}},
    "base lacks z": {"shapes": SHAPES | {"z": (1,)}},
    "num_attention_heads = 4": {"num_attention_heads": 4},
    "architectures = ": {"architectures": ["Y"]},
}


@pytest.mark.parametrize("message", DIFFERENCES)
def test_models_that_differ_are_refused(tmp_path, message):
    base, a = save(tmp_path / "base", 0), save(tmp_path / "a", 1, **DIFFERENCES[message])
    with pytest.raises(ConversionError, match=message):
        merge_checkpoints([base, a], tmp_path / "out", method="linear")
    assert set(tmp_path.iterdir()) == {base, a}


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {"vocab": {"a": 0, "c": 1}}},
        {"added_tokens": [{"id": 1, "content": "c"}]},
        {"model": {"vocab": [["a", -1.0], ["c", -2.0]]}},
    ],
)
def test_other_tokens_are_refused(models, tmp_path, changes):
    retokenize(models[1], **changes)
    with pytest.raises(ConversionError, match=r"token 1 is 'c' in .*a, but 'b' in .*base"):
        merge_checkpoints(models[:2], tmp_path / "out", method="linear")


def test_values_out_of_range_leave_nothing(tmp_path):
    base, a = save(tmp_path / "base", 0), save(tmp_path / "a", 1)
    settings = {"method": "task-arithmetic", "base": base}
    with pytest.raises(ConversionError, match="more than F16's 65504"):
        merge_checkpoints([a], tmp_path / "out", **settings, lambda_=1e6, dtype="f16")
    with (
        np.errstate(over="ignore", invalid="ignore"),
        pytest.raises(ConversionError, match="holds NaN"),
    ):
        merge_checkpoints([a], tmp_path / "out", **settings, weights=[1e30], lambda_=1e30)
    assert set(tmp_path.iterdir()) == {base, a}


def test_interruption_keeps_what_was_there(models, tmp_path):
    out = tmp_path / "out"

    names = []

    def interrupt(name, *_):
        (partial,) = tmp_path.glob(".out.*.part")
        assert partial.is_dir()
        names.append(name)
        if len(names) % 2 == 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_checkpoints(models, out, method="linear", progress=interrupt)
    assert set(tmp_path.iterdir()) == set(models)
    merge_checkpoints(models, out, method="linear")
    before = (out / "model.safetensors").read_bytes()
    with pytest.raises(KeyboardInterrupt):
        merge_checkpoints(models[:2], out, method="linear", force=True, progress=interrupt)
    assert (out / "model.safetensors").read_bytes() == before
    merge_checkpoints(models[:2], out, method="linear", force=True)
    assert (out / "model.safetensors").read_bytes() != before
    assert set(tmp_path.iterdir()) == {*models, out}


def test_a_failed_replacement_keeps_the_old_folder(models, tmp_path, monkeypatch):
    out = tmp_path / "out"
    merge_checkpoints(models, out, method="linear")
    before = (out / "model.safetensors").read_bytes()
    replace = os.replace

    def refuse_new(source, target):
        if source.suffix == ".part":
            raise PermissionError("no")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse_new)
    with pytest.raises(ConversionError, match="cannot write"):
        merge_checkpoints(models[:2], out, method="linear", force=True)
    assert (out / "model.safetensors").read_bytes() == before
    assert set(tmp_path.iterdir()) == {*models, out}


def test_force_replaces_checkpoints_only(models, tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("kept")
    with pytest.raises(ConversionError, match="exists"):
        merge_checkpoints(models, out, method="linear")
    with pytest.raises(ConversionError, match="thesis.tex"):
        merge_checkpoints(models, out, method="linear", force=True)
    assert [p.name for p in out.iterdir()] == ["thesis.tex"]
    with pytest.raises(ConversionError, match="folder to be read"):
        merge_checkpoints(models, models[1], method="linear", force=True)
    (tmp_path / "link").symlink_to(models[1])
    with pytest.raises(ConversionError, match="folder to be read"):
        merge_checkpoints(models, tmp_path / "link", method="linear", force=True)
    with pytest.raises(ConversionError, match="does not exist"):
        merge_checkpoints(models, tmp_path / "no" / "out", method="linear")
    monkeypatch.setattr("shutil.disk_usage", lambda _: namedtuple("usage", "free")(free=100))
    with pytest.raises(ConversionError, match="MB free"):
        merge_checkpoints(models, tmp_path / "new", method="linear")
    assert not (tmp_path / "new").exists()

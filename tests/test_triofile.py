"""trio.toml: what is written is read, and what is wrong is one line that names file and key."""

import os
import random
import tomllib

import pytest

from trimix_gguf import Weights
from trimix_gguf.choosing.methods import runtime_methods
from trimix_gguf.errors import TrioFileError
from trimix_gguf.mixing.fusion import METHODS, Mix
from trimix_gguf.roles import ROLES
from trimix_gguf.trios.names import check_name
from trimix_gguf.trios.triofile import ModelEntry, TrioFile, parse_trio

TOP = 'version = 1\nname = "a"\n'
MODELS = "[models.large_ins]\n[models.small_base]\n[models.small_cpt]\n"


def text_of(top="", models=""):
    return TOP + top + MODELS + models


def read(tmp_path, text, **options):
    file = tmp_path / "trio.toml"
    file.write_text(text, encoding="utf-8")
    return TrioFile.read(file, **options)


def random_trio(draw, folder):
    """Values of every kind, or not set."""
    line = ["kk", "Ескі ноутбук", "ئۇيغۇر", 'a "quote" \\ and # more', "བོད་སྐད", "x = [1]"]

    def some(*values):
        return draw.choice([None, *values])

    def entry(role):
        adapter = "small_base" if role == "small_cpt" and draw.random() < 0.5 else None
        repo = some("Qwen/Qwen2.5-1.5B", "a.b/c_d-e")
        return ModelEntry(
            path=draw.choice([f"{role}.gguf", "/elsewhere/ü.gguf", "deep/er.gguf"]),
            repo=repo,
            revision=draw.choice(["main", "v1.0", "a" * 40]) if repo else "main",
            file=some("x.gguf", "sub/x.gguf") if repo else None,
            quantization=some("q8_0", "q4_k_m"),
            licence=some(*line),
            adapter_of=adapter,
            sha256=some("0f" * 32),
            n_bytes=some(0, 1 << 40),
            gpu_layers=some("auto", -1, 0, 33),
            device=some("CUDA0"),
            threads=some(0, 8),
            kv_type=some("q8_0"),
        )

    method = some(*runtime_methods())
    return TrioFile(
        folder=folder,
        name=draw.choice(
            ["a", "console", "com", "com10", "nul-1", "qwen2.5-1.5b-3b-kk", "үштік", "བོད"]
        ),
        models={role: entry(role) for role in (*ROLES, *(["large_base"] * draw.randrange(2)))},
        languages=tuple(draw.sample(line, draw.randrange(4))),
        description=draw.choice(["", *line]),
        method=method,
        weights=None if method else some(Weights(0.1, 0.9), Weights(-1e-7, 1e5), Weights(1, 0)),
        n_ctx=some(8, 4096),
        gpu_layers=some("auto", -1),
        chat_template=some("{{ x }}\n\t{%- if y %}\x1b\x7f\u2028'''\"\"\"", *line),
    )


def test_what_is_written_is_read(tmp_path):
    for seed in range(200):
        trio = random_trio(random.Random(seed), tmp_path)
        trio.write()
        assert TrioFile.read(trio.file) == trio
    assert [p.name for p in tmp_path.iterdir()] == ["trio.toml"]


def test_a_written_file_has_the_documented_keys(tmp_path):
    models = {role: ModelEntry(path=f"{role}.gguf") for role in ROLES}
    models["small_cpt"] = ModelEntry(path="l.gguf", repo="a/b", adapter_of="small_base")
    trio = TrioFile(tmp_path, "a", models, languages=("kk",), weights=Weights(0.1, 0.9))
    trio.write()
    table = tomllib.loads(trio.file.read_text(encoding="utf-8"))
    assert table["version"] == 1 and table["language"] == "kk" and table["weights"] == [0.1, 0.9]
    assert table["models"]["large_ins"] == {"path": "large_ins.gguf"}
    expected = {"path": "l.gguf", "repo": "a/b", "revision": "main", "adapter_of": "small_base"}
    assert table["models"]["small_cpt"] == expected


def test_paths_are_those_of_trio_load(tmp_path):
    trio = read(tmp_path, text_of())
    assert trio.paths() == {role: tmp_path / f"{role}.gguf" for role in ROLES}
    text = text_of(models='adapter_of = "small_base"\n[models.large_base]\n')
    paths = read(tmp_path, text).paths()
    assert paths.keys() == {"large_ins", "small_base", "small_cpt_lora"}
    assert paths["small_cpt_lora"] == tmp_path / "small_cpt_lora.gguf"


def test_settings_of_a_model_go_before_those_of_the_trio(tmp_path):
    text = text_of(
        "n_ctx = 99\ngpu_layers = 7\nchat_template = 'x'\n",
        'gpu_layers = 0\nthreads = 3\nkv_type = "q8_0"\n',
    )
    arguments = read(tmp_path, text).load_arguments()
    assert (arguments["n_ctx"], arguments["chat_template"]) == (99, "x")
    assert arguments["per_role"]["large_ins"] == {"n_gpu_layers": 7}
    own = {"n_gpu_layers": 0, "n_threads": 3, "type_k": "q8_0", "type_v": "q8_0"}
    assert arguments["per_role"]["small_cpt"] == own


def test_a_fixed_mix_is_the_files_or_that_of_its_method(tmp_path):
    """Bug: a method's plausibility threshold was lost, and so masked nothing."""
    pair = read(tmp_path, text_of("weights = [0.2, 0.5]\n"))
    assert pair.fixed_mix == Mix(Weights(0.2, 0.5))
    for name, mix in METHODS.items():
        assert read(tmp_path, text_of(f'method = "{name}"\n')).fixed_mix == mix
    for top in ("", *(f'method = "{n}"\n' for n in runtime_methods() if n not in METHODS)):
        assert read(tmp_path, text_of(top)).fixed_mix is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["version", "nothing"]),
        ("version = 2\nfuture = 1\n", ["version 2", "update trimix-gguf"]),
        ("version = true\n", ["version", "True"]),
        ("version = 0\n", ["version", "0"]),
        ('version = 1\n[models.large_ins]\n', ["name is missing"]),
        ('version = 1\nname = "a"\n', ["models is missing"]),
        (text_of("colour = 1\n"), ["colour", "unknown"]),
        (text_of('langauge = "kk"\n'), ["langauge", "did you mean language"]),
        (text_of("description = 1\n"), ["description", "got 1"]),
        (text_of('description = "a\\u001bb"\n'), ["description"]),
        (text_of('language = ["kk", 1]\n'), ["language"]),
        (text_of('method = "pll"\n'), ["method", "ppl, ent", "'pll'"]),
        (text_of("method = []\n"), ["method"]),
        (text_of("weights = [1]\n"), ["weights", "[0.1, 0.9]"]),
        (text_of("weights = [1, true]\n"), ["weights"]),
        (text_of("weights = [nan, 1]\n"), ["alpha", "finite"]),
        (text_of(f"weights = [{'9' * 400}, 1]\n"), ["weights"]),
        (text_of('method = "ppl"\nweights = [1, 0]\n'), ["method and weights"]),
        (text_of("n_ctx = 7\n"), ["n_ctx", "from 8", "7"]),
        (text_of("gpu_layers = -2\n"), ["gpu_layers", "auto"]),
        (text_of('gpu_layers = "all"\n'), ["gpu_layers", "'all'"]),
        (TOP + "models = 3\n", ["models", "table"]),
        (text_of(models="[models.small_bass]\n"), ["models.small_bass", "small_base"]),
        (TOP + "[models]\nlarge_ins = 3\nsmall_base = 3\nsmall_cpt = 3\n",
         ["models.large_ins", "table", "3"]),
        (TOP + "[models.large_ins]\n[models.small_base]\n", ["models.small_cpt is missing"]),
        (text_of(models="sha = 1\n"), ["models.small_cpt.sha", "sha256"]),
        (text_of(models='sha256 = "ABC"\n'), ["models.small_cpt.sha256", "64"]),
        (text_of(models="n_bytes = -1\n"), ["models.small_cpt.n_bytes"]),
        (text_of(models="threads = 1.5\n"), ["models.small_cpt.threads", "1.5"]),
        (text_of(models='repo = "no-owner"\n'), ["models.small_cpt.repo", "OWNER/NAME"]),
        (text_of(models='repo = "../.."\n'), ["models.small_cpt.repo"]),
        (text_of(models='repo = "a/b"\nfile = "../x"\n'), ["models.small_cpt.file"]),
        (text_of(models='file = "x.gguf"\n'), ["models.small_cpt.file", "repo"]),
        (text_of(models='path = ""\n'), ["models.small_cpt.path"]),
        (text_of(models='adapter_of = "large_ins"\n'), ["models.small_cpt.adapter_of"]),
        (text_of(models='[models.large_base]\nadapter_of = "small_base"\n'),
         ["models.large_base.adapter_of", "only small_cpt"]),
        ("version = ", ["not TOML"]),
        ("version = " + "9" * 5000, ["thousands of digits"]),
        ("a = " + "[" * 100_000, ["nested"]),
        ("#" * (1 << 20) + "\n", ["larger"]),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line_that_names_file_and_key(tmp_path, text, words):
    with pytest.raises(TrioFileError) as caught:
        read(tmp_path, text)
    message = str(caught.value)
    assert message.startswith(str(tmp_path / "trio.toml")) and "\n" not in message
    for word in words:
        assert word in message


def test_what_is_no_text_or_no_file_is_one_line(tmp_path, nano_files):
    for path in (tmp_path / "nowhere.toml", tmp_path, nano_files["small_cpt"]):
        with pytest.raises(TrioFileError) as caught:
            TrioFile.read(path)
        assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "path",
    [
        "../x.gguf",
        "a/../../x",
        "/etc/passwd",
        "C:\\x.gguf",
        "c:x.gguf",
        "..\\x",
        "\\\\host\\x",
        ".",
    ],
)
def test_a_model_of_a_bundle_lies_in_its_folder(tmp_path, path):
    text = text_of(models=f"path = '{path}'\n")
    assert read(tmp_path, text).models["small_cpt"].path == path  # one's own may lie anywhere
    with pytest.raises(TrioFileError, match="leads out"):
        read(tmp_path, text, inside=True)


def test_models_inside_the_folder_are_read(tmp_path):
    text = text_of(models='path = "deep/x..gguf"\n')
    assert read(tmp_path, text, inside=True).path("small_cpt") == tmp_path / "deep" / "x..gguf"


@pytest.mark.parametrize("name", ["a", "qwen2.5-1.5b-kk", "үш үлгі", "བོད", "a" * 100])
def test_a_name_may_be_in_any_script(name):
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name",
    ["", "..", ".a", "-a", "a.", " a", "a ", "a/b", "a\\b", "c:", "a\0b", "a\nb", "a*", "a\u202eb",
     "\ud800", "ү" * 51, "CON", "nul", "com1", "LPT².x", "aux.tar.gz", "prn ", "conin$"],
)  # fmt: skip
def test_a_name_that_is_no_folder_everywhere_is_refused(name):
    with pytest.raises(TrioFileError) as caught:
        check_name(name)
    assert "\n" not in str(caught.value)


def test_writing_leaves_the_old_file_or_the_new(tmp_path, monkeypatch):
    old = read(tmp_path, text_of())
    before = old.file.read_bytes()

    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(TrioFileError, match="No space left"):
        old.with_model("large_ins", n_bytes=5).write()
    assert old.file.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["trio.toml"]


def test_what_could_not_be_read_is_not_written(tmp_path):
    trio = parse_trio(text_of(), tmp_path / "trio.toml")
    with pytest.raises(TrioFileError, match="sha256"):
        trio.with_model("large_ins", sha256="none").write()
    assert not trio.file.exists()

"""Damaged files of each kind, one command each: dead processes, tracebacks, hangs, half results.

A good file of each kind is made from the nano trio. Each mutant of it has a few bytes flipped,
removed, put in or repeated, or a value replaced by an extreme one, and is given to the command
that reads such files. Mutants of templates and schemas also hold pieces that mean something, and
may cost much. A command runs as `trimix` does, in a child process that imported the package
once. It may end well or say one line and exit with 1 or 2; all else is counted and shown.
"""

import argparse
import json
import os
import random
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from common import cpu_name
from fuzz_pieces import SCHEMA_PIECES, TEMPLATE_PIECES

from trimix_gguf.machine.gguf_file import read_gguf
from trimix_gguf.trio.trio import NANO
from trimix_gguf.trios.bundle import export_trio
from trimix_gguf.trios.triofile import ModelEntry, TrioFile

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "helpers"))
PATIENCE_S = 30.0  # a hang; below it the slowest is told
EXTREMES = [b"0", b"-1", b"1e999", b"99999999999999999999", b"null", b"[]", b"{}", b'""', b"NaN"]
EXTREME_BYTES = [b"\xff" * 8, b"\0" * 8, b"\xff\xff\xff\x7f", b"\0\0\0\x80", b"\1" + b"\0" * 7]
# Reads one command a line, runs it as the entry point does, writes one line about it: with the most
# memory of this process or one below it. Seen from above, it would be at least that of fuzz.py.
CHILD = """
import contextlib, io, json, resource, sys, traceback
from trimix_gguf.cli import _run
from trimix_gguf.machine.memory import peak_rss
for line in sys.stdin:
    sys.argv = ["trimix", *json.loads(line)]
    out, err = io.TextIOWrapper(io.BytesIO()), io.TextIOWrapper(io.BytesIO())
    said, code = "", None
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = _run()
    except BaseException:
        said = traceback.format_exc()
    err.flush()
    said += err.buffer.getvalue().decode("utf-8", "replace")
    below = 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    print(json.dumps([code, said, max(below, peak_rss())]), file=sys.__stdout__, flush=True)
"""


class Kind:
    """A kind of file: its good bytes, where it lies, and the command that reads it."""

    def __init__(self, good: bytes, path: Path, command: list[object], most: int = 0) -> None:
        self.good, self.path, self.most = good, path, most or len(good)
        self.pieces: list[str] = []  # that may stand where one of `places` is
        self.places: tuple[str, ...] = ()
        self.command = [str(word) for word in command]
        self.copies: dict[Path, bytes] = {}  # what a command that ends well writes, if it does
        path.write_bytes(good)


def main() -> None:
    """Run, and print; the last line is JSON."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--n", type=int, default=1000, help="mutants of each kind")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--kinds", help="only these, separated by commas")
    options = options.parse_args()
    result: dict[str, Any] = {"cpu": cpu_name(), "n": options.n, "seed": options.seed}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRIMIX_HOME"], os.environ["TRIMIX_CACHE"] = f"{folder}/home", f"{folder}/cache"
        kinds = make_kinds(Path(folder))
        for name in options.kinds.split(",") if options.kinds else kinds:
            result[name] = tried(kinds[name], random.Random(f"{options.seed}{name}"), options.n)
            print(f"{name}: {result[name]}", flush=True)
    print(json.dumps(result))


def make_kinds(folder: Path) -> dict[str, Kind]:
    """A good file of each kind."""
    trio_folder = folder / "trio"
    shutil.copytree(NANO, trio_folder)
    own = trio_folder / "trio.toml"
    model = trio_folder / "small_cpt.gguf"
    answer = ["generate", "а", "-n", "1", "--weights", "0.5,0.5", "--n-ctx", 32]
    header = model.stat().st_size - read_gguf(model).weight_bytes
    kinds = {
        "gguf": Kind(model.read_bytes(), model, [*answer, "--trio", trio_folder], header),
        "trio.toml": Kind(own.read_bytes(), own, ["show", trio_folder]),
    }
    bundle = folder / "bundle.tar"
    tiny = folder / "tiny"
    tiny.mkdir()
    files = {role: ModelEntry(path=f"{role}.gguf") for role in ("large_ins", "small_base")}
    for role in files:
        (tiny / f"{role}.gguf").write_bytes(b"GGUF" + bytes(300))
    files["small_cpt"] = ModelEntry(path="small_base.gguf")
    trio = TrioFile(tiny, "tiny", files)
    trio.write()
    export_trio(trio, bundle)
    kinds["tar"] = Kind(bundle.read_bytes(), bundle, ["import", bundle])
    kinds["tar"].copies = {
        folder / "home" / "trios" / "tiny" / file.name: file.read_bytes()
        for file in tiny.glob("*.gguf")
    }
    lines = b"".join(
        json.dumps(line, ensure_ascii=False).encode() + b"\n"
        for line in (
            {"id": "a", "prompt": "Қазақстан", "max_tokens": 1, "temperature": 0},
            {"custom_id": "b", "method": "POST", "url": "/v1/chat/completions",
             "body": {"messages": [{"role": "user", "content": "а"}], "max_tokens": 1}},
        )
    )  # fmt: skip
    asked = folder / "asked.jsonl"
    run = ["run", asked, "-o", folder / "answers.jsonl", "--force", "--n-ctx", 256]
    kinds["JSON lines"] = Kind(lines, asked, run)
    schema = folder / "schema.json"
    good = {
        "$defs": {"name": {"type": "string", "maxLength": 4, "pattern": "^[a-z]+$"}},
        "type": "object",
        "properties": {"a": {"$ref": "#/$defs/name"}, "b": {"enum": [1, None, "x"]}},
        "required": ["a"],
        "additionalProperties": False,
    }
    under = ["generate", "а", "-n", "8", "--json-schema", schema, "--n-ctx", 64]
    kinds["schema"] = Kind(json.dumps(good).encode(), schema, under)
    kinds["schema"].pieces, kinds["schema"].places = SCHEMA_PIECES, (", ", "{")
    kinds["template"] = template_kind(folder)
    kinds |= checkpoint_kinds(folder)
    return kinds


def template_kind(folder: Path) -> Kind:
    """A trio whose chat template is told in its trio.toml, and one chat that it renders."""
    own = folder / "templated"
    shutil.copytree(NANO, own)
    template = read_gguf(NANO / "large_ins.gguf").metadata["tokenizer.chat_template"]
    assert "'''" not in template
    file = own / "trio.toml"
    good = f"chat_template = '''{template}'''\n{file.read_text(encoding='utf-8')}"
    asked = folder / "chat.jsonl"
    asked.write_text('{"messages": [{"role": "user", "content": "а"}], "max_tokens": 1}\n')
    run = ["run", asked, "-o", folder / "chats.jsonl", "--force", "--n-ctx", 256, "--trio", own]
    kind = Kind(good.encode(), file, run, len("chat_template = '''" + template))
    kind.pieces, kind.places = TEMPLATE_PIECES, ("}}", "%}")
    return kind


def checkpoint_kinds(folder: Path) -> dict[str, Kind]:
    """The files of a Hugging Face checkpoint; none where transformers is not installed."""
    try:
        from tiny_checkpoints import save_model, save_tokenizer
    except ImportError:
        return {}
    checkpoint = folder / "checkpoint"
    save_model(checkpoint, "qwen2")
    save_tokenizer(checkpoint, None)
    command = ["convert", "hf", checkpoint, "-o", folder / "out.gguf", "--force", "--type", "f32"]
    found = {}
    for name, most in (("model.safetensors", 4000), ("tokenizer.json", 0), ("config.json", 0)):
        path = checkpoint / name
        found[name] = Kind(path.read_bytes(), path, command, most)
    return found


def mutant(rng: random.Random, good: bytes, most: int) -> bytes:
    """A few changes in the first `most` bytes."""
    raw = bytearray(good)
    for _ in range(rng.randint(1, 4)):
        at, n = rng.randrange(most), rng.choice((1, 1, 2, 4, 8, 64))
        change = rng.randrange(7)
        if change == 0:
            raw[at : at + 1] = bytes([rng.randrange(256)])
        elif change == 1:
            del raw[at : at + n]
        elif change == 2:
            raw[at:at] = rng.randbytes(n)
        elif change == 3:
            raw[at:at] = raw[at : at + n] * rng.choice((1, 2, 50))
        elif change == 4:
            raw[at : at + 8] = rng.choice(EXTREME_BYTES)
        elif change == 5:
            del raw[at + rng.randrange(100) :]
        else:
            raw = with_extreme(rng, raw, most)
    return bytes(raw)


def with_pieces(rng: random.Random, kind: Kind) -> bytes:
    """One or two pieces put in, each after a place for them."""
    text = kind.good.decode()
    for _ in range(rng.randint(1, 2)):
        ends = [
            at + len(place)
            for place in kind.places
            for at in range(min(kind.most, len(text)))
            if text.startswith(place, at)
        ]
        at, piece = rng.choice(ends), rng.choice(kind.pieces)
        comma = ", " if piece.startswith('"') else ""
        text = text[:at] + piece + comma + text[at:]
    return text.encode()


def with_extreme(rng: random.Random, raw: bytearray, most: int) -> bytearray:
    """A number in it replaced by an extreme value, where it has one as text."""
    places = [i for i in range(min(most, len(raw))) if raw[i : i + 1].isdigit()]
    if places:
        at = rng.choice(places)
        raw[at : at + 1] = rng.choice(EXTREMES)
    return raw


def tried(kind: Kind, rng: random.Random, n: int) -> dict[str, Any]:
    """How `n` mutants ended; faults are shown on standard error."""
    ends: Counter[str] = Counter()
    slowest, child = 0.0, start()
    end, said, memory = asked(child, kind.command)  # it imports, too
    if end != "well":
        raise SystemExit(f"{kind.path.name} is refused as it is: {said}")
    for i in range(n):
        shutil.rmtree(os.environ["TRIMIX_HOME"], ignore_errors=True)  # what was imported
        meant = bool(kind.pieces) and rng.random() < 0.7
        changed = with_pieces(rng, kind) if meant else mutant(rng, kind.good, kind.most)
        kind.path.write_bytes(changed)
        began = time.perf_counter()
        end, said, most = asked(child, kind.command)
        slowest, memory = max(slowest, time.perf_counter() - began), max(memory, most)
        copies = kind.copies.items() if end == "well" else ()
        if any(file.exists() and file.read_bytes() != good for file, good in copies):
            end = "wrong bytes"
        if end in ("dead", "hang"):
            child.kill()
            child = start()
        if end not in ("well", "refused"):
            keep = Path(tempfile.gettempdir()) / f"fuzz-{kind.path.name}-{i}"
            shutil.copy(kind.path, keep)
            print(f"{end}: {keep}\n{said[-2000:]}", file=sys.stderr, flush=True)
        ends[end] += 1
    kind.path.write_bytes(kind.good)
    child.kill()
    child.wait()
    return {**ends, "slowest_s": round(slowest, 2), "most_memory_mib": memory >> 20}


def start() -> subprocess.Popen[str]:
    """A child that waits for commands."""
    return subprocess.Popen(
        [sys.executable, "-c", CHILD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def asked(child: subprocess.Popen[str], command: list[str]) -> tuple[str, str, int]:
    """How a command ended, what it said, and the most bytes of the child so far; 0: not known."""
    assert child.stdin is not None and child.stdout is not None
    child.stdin.write(json.dumps(command) + "\n")
    child.stdin.flush()
    if not select.select([child.stdout], [], [], PATIENCE_S)[0]:
        return "hang", "", 0
    line = child.stdout.readline()
    if not line:
        return "dead", f"exit {child.wait()}", 0
    code, said, memory = json.loads(line)
    if "Traceback" in said:
        return "traceback", said, memory
    if code == 0:
        return "well", said, memory
    is_one_line = code in (1, 2) and said.strip().splitlines()[-1:] != []
    return ("refused" if is_one_line else "odd"), f"code {code}: {said}", memory


if __name__ == "__main__":
    main()

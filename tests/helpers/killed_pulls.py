"""Pulls killed at random places, and what must hold after each kill.

The trio is two GGUF files and a checkpoint that is converted. Where a
kill falls is drawn as a number of bytes that the hub has sent, and some time beyond that.
"""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from hf_checkpoint import checkpoint_folder
from hub_server import Asked, Hub

from trimix_gguf.convert.hf import convert_hf
from trimix_gguf.machine.hashes import sha256_of
from trimix_gguf.trio.trio import NANO
from trimix_gguf.trios.triofile import FILENAME, TrioFile

TRIO = """version = 1
name = "kk"
[models.large_ins]
repo = "kk/nano-GGUF"
file = "large_ins.gguf"
[models.small_cpt]
repo = "kk/nano-GGUF"
file = "small_cpt.gguf"
[models.small_base]
repo = "kk/small-base"
"""


class Pulls:
    """A hub with that trio, a home for it in `folder`, and the pulls into it."""

    def __init__(self, folder: Path, hub: Hub, *, seed: int, type: str) -> None:
        self.hub, self.random = hub, random.Random(seed)
        self.counts: Counter[str] = Counter()
        checkpoint = folder / "repos" / "small-base"
        checkpoint_folder(NANO / "small_base.gguf", checkpoint, "F16")
        ready = folder / "repos" / "nano-GGUF"
        ready.mkdir()
        for role in ("large_ins", "small_cpt"):
            shutil.copyfile(NANO / f"{role}.gguf", ready / f"{role}.gguf")
        hub.add("kk/nano-GGUF", ready)
        hub.add("kk/small-base", checkpoint)
        self.files = {
            name: file
            for repo in hub.repos.values()
            for name, file in next(iter(repo.commits.values())).items()
        }
        self.expected = {
            role: sha256_of(NANO / f"{role}.gguf") for role in ("large_ins", "small_cpt")
        }
        convert_hf(checkpoint, folder / "small_base.gguf", type=type)
        self.expected["small_base"] = sha256_of(folder / "small_base.gguf")
        self.manifest = folder / "kk.toml"
        self.manifest.write_text(f'{TRIO}quantization = "{type}"\n', encoding="utf-8")
        self.home = folder / "home"
        self.trio = self.home / "trios" / "kk"
        self.environment = {
            **os.environ,
            **hub.environment(),
            "HF_HOME": str(folder / "hf"),
            "TRIMIX_HOME": str(self.home),
        }

    def pull(self, *, kill: bool = True) -> bool:
        """One pull, and a kill; then what must hold. Returns whether the trio is whole."""
        parts, finished = on_disk(self.trio)
        was_whole = (self.trio / FILENAME).is_file()
        n_before = len(self.hub.asked)
        to_come = sum(
            f.n_bytes - parts.get(n, 0) for n, f in self.files.items() if n not in finished
        )
        share = self.random.uniform(-0.1, 1.4)  # of those bytes; beyond 1, of some seconds more
        pause = self.random.uniform(0, 3) if to_come == 0 else 3 * max(share - 1, 0)
        pull = subprocess.Popen(
            [sys.executable, "-m", "trimix_gguf.cli", "pull", str(self.manifest), "--yes"],
            env=self.environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip
        if kill:
            if share < 0:
                time.sleep(-6 * share)
            while pull.poll() is None and self.n_sent(n_before) < to_come * min(share, 1):
                time.sleep(0.002)
            time.sleep(pause)
            pull.kill()
        _, error = pull.communicate()
        assert pull.returncode in (0, -signal.SIGKILL), error.decode()
        self.check_asked(self.hub.asked[n_before:], parts, finished)
        if was_whole:
            assert len(self.hub.asked) == n_before, "a whole trio was asked for again"
        killed = pull.returncode != 0
        self.counts["killed" if killed else "completed"] += 1
        if killed:
            self.counts[where_killed(self.trio)] += 1
        whole = self.check_trio()
        assert whole or killed
        return whole

    def n_sent(self, since: int) -> int:
        return sum(asked.n_sent for asked in self.hub.asked[since:])

    def check_asked(self, asked: list[Asked], parts: dict[str, int], finished: set[str]) -> None:
        """No finished file is fetched again; a part is gone on from at its very end."""
        first: dict[str, Asked] = {}
        for one in asked:
            if one.n_sent or "/file/" in one.path:
                first.setdefault(one.path.rsplit("/", 1)[1], one)
        for name, one in first.items():
            assert name not in finished, f"{name} was there, and was fetched again"
            n_bytes = parts.get(name, 0)
            assert one.range == (f"bytes={n_bytes}-" if n_bytes else None), (name, n_bytes, one)
            self.counts["resumed"] += n_bytes > 0

    def check_trio(self) -> bool:
        """Whether there is a trio.toml; then every file is the one it should be."""
        if not (self.trio / FILENAME).is_file():
            return False
        trio = TrioFile.read(self.trio / FILENAME)
        for role, sha256 in self.expected.items():
            assert trio.models[role].sha256 == sha256, role
            assert sha256_of(trio.path(role)) == sha256, role
        return True


def on_disk(trio: Path) -> tuple[dict[str, int], set[str]]:
    """Of the hub's files: the bytes that are there of some, and which are whole."""
    parts: dict[str, int] = {}
    finished: set[str] = set()
    if not (trio / ".pull").is_dir():
        return parts, finished
    for path in (trio / ".pull").iterdir():
        if staged := re.fullmatch(r"(\w+)-[0-9a-f]{16}\.gguf(\.part)?", path.name):
            if staged[2]:
                parts[f"{staged[1]}.gguf"] = path.stat().st_size
            elif staged[1] == "small_base":
                finished |= {"config.json", "model.safetensors", "tokenizer.json"}
            else:
                finished.add(f"{staged[1]}.gguf")
        elif re.fullmatch(r"\w+-[0-9a-f]{16}", path.name):
            for file in path.glob("*/*"):
                if file.suffix == ".part":
                    parts[file.stem] = file.stat().st_size
                else:
                    finished.add(file.name)
    return parts, finished


def where_killed(trio: Path) -> str:
    """In words, what a killed pull left."""
    if (trio / FILENAME).is_file():
        return "left it whole"
    work = trio / ".pull"
    if not work.is_dir():
        return "left nothing"
    if any(work.glob("convert-*")):
        return "left a conversion"
    if any(work.rglob("*.gguf.part")) or any(work.rglob("*.safetensors.part")):
        return "left a part of a file"
    return "left whole files"

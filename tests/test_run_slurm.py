"""The job file of the page on many prompts, as Slurm starts it: a shell for each of its parts."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from served import PATIENCE_S
from test_help import blocks
from test_run import many, place, write  # noqa: F401  # a fixture

PAGE = Path(__file__).parent.parent / "trimix_gguf/help/many-prompts.md"
JOB = next(text for _, _, text in blocks(PAGE) if text.startswith("#!/bin/bash"))
JOIN = next(text for _, _, text in blocks(PAGE) if text.startswith("cat answers-{"))


@pytest.fixture
def started(place, monkeypatch):  # noqa: F811
    """Where `trimix` is on the PATH, and `srun` runs one process, as it does for one task."""
    folder = place / "bin"
    folder.mkdir()
    programs = {"srun": 'exec "$@"', "trimix": f'exec "{sys.executable}" -m trimix_gguf.cli "$@"'}
    for name, body in programs.items():
        (folder / name).write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    (place / "job.sh").write_text(JOB, encoding="utf-8")
    return place


def bash(*words, **environment):
    done = subprocess.run(
        ["bash", *words], env={**os.environ, **environment}, capture_output=True, timeout=PATIENCE_S
    )
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.skipif(os.name == "nt", reason="a shell as Slurm has it")
def test_the_parts_of_the_job_file_are_the_whole(trimix, started):
    write(started / "prompts.jsonl", many(10))
    assert trimix("run", "prompts.jsonl", "-o", "whole").returncode == 0
    first, last = map(int, re.search(r"--array=(\d+)-(\d+)", JOB).groups())
    for i in range(first, last + 1):
        bash("job.sh", SLURM_ARRAY_TASK_ID=str(i))
    bash("-c", JOIN)
    assert (started / "answers.jsonl").read_bytes() == (started / "whole").read_bytes()

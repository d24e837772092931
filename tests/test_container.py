"""The container: what the Dockerfile promises, as far as it can be seen without an engine.

benchmarks/container.py runs its steps.
"""

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import dockerfile
import pytest
from dockerfile import Instruction
from served import serving

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def stages():
    return dockerfile.read_stages(ROOT / "Dockerfile")


@pytest.fixture(scope="module")
def image(stages):
    return stages[-1]


def test_it_runs_as_a_fixed_user_that_is_not_root(image):
    # By number: an engine that must not start root cannot tell from a name.
    uid, gid = image.last("USER").rest.split(":")
    assert int(uid) > 0 and int(gid) > 0
    made = "\n".join(i.value for i in image.instructions if i.name == "RUN")
    assert f"--uid {uid}" in made and f"--gid {gid}" in made


def test_the_server_gets_the_signals_and_ends_before_it_is_killed(image):
    entry, command = image.last("ENTRYPOINT").words(), image.last("CMD").words()
    assert entry == ["trimix"] and command is not None, "a shell would keep SIGTERM to itself"
    drain_s = float(command[command.index("--drain") + 1])
    assert drain_s + 1 < 10  # `docker stop` kills after 10 seconds; one is for last words


def test_its_options_are_those_of_serve_and_open_nothing_without_a_key(image, trimix):
    serve, *options = image.last("CMD").words()
    text = trimix(serve, "--help").stdout.decode()
    assert all(o in re.findall(r"--[a-z-]+", text) for o in options if o.startswith("--"))
    assert "--new-key" in options and "--no-auth" not in options


def test_trios_and_the_cache_are_in_the_volume(image):
    known = {"PATH": dockerfile.PATH}
    for instruction in image.instructions:
        if instruction.name == "ENV":
            known |= dockerfile.environment(instruction.rest, known)
    (volume,) = image.last("VOLUME").words()
    assert known["PATH"].endswith(dockerfile.PATH)
    for name in ("HOME", "TRIMIX_HOME", "TRIMIX_CACHE"):
        assert Path(volume) in (Path(known[name]), *Path(known[name]).parents), name


def test_what_is_copied_is_there_and_is_all_that_goes_in(stages):
    files = dockerfile.context_files(ROOT)
    copied = set()
    for instruction in (i for s in stages for i in s.instructions if i.name == "COPY"):
        if source := instruction.options.get("from"):
            assert source in [s.name for s in stages]
            continue
        for name, found in dockerfile.sources_of(instruction, files).items():
            assert found, f"COPY {name}: no such file, or .dockerignore leaves it out"
            copied.update(found)
    assert set(files) == copied
    for needed in ("trimix_gguf/nano/large_ins.gguf", "convert/hf.py", "LICENSE"):
        assert Path(needed) in copied


def test_what_a_checkout_gathers_stays_out(tmp_path):
    shutil.copy(ROOT / ".dockerignore", tmp_path)
    for name in ("trimix_gguf/a.py", "trimix_gguf/b/__pycache__/c.pyc", "nano-work/d", ".env"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert dockerfile.context_files(tmp_path) == [Path("trimix_gguf/a.py")]


def test_healthy_is_a_server_that_answers(image):
    def is_healthy(port):
        program, *arguments = image.health_command()
        assert program == "python" and any(":8080/health" in a for a in arguments)
        arguments = [a.replace(":8080/", f":{port}/") for a in arguments]
        proxy = {"http_proxy": "http://127.0.0.1:9"}  # an engine may hand its own proxy in
        done = subprocess.run(
            [sys.executable, *arguments], env={**os.environ, **proxy}, capture_output=True
        )
        return done.returncode == 0

    with serving("--trio", "nano", "--api-key", "sesame") as served:
        assert is_healthy(served.port)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        free = listener.getsockname()[1]
    assert not is_healthy(free)


def test_the_reader_takes_the_last_rule_that_fits(tmp_path):
    for name in ("a.py", "b/c.py", "b/d/e.py", "b/d/e.pyc"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / ".dockerignore").write_text("# all but b\n*\n!b\nb/d/*.py\n**/*.pyc\n")
    assert dockerfile.context_files(tmp_path) == [Path("b/c.py")]


def test_the_reader_refuses_what_it_does_not_know(tmp_path):
    path = tmp_path / "Dockerfile"
    path.write_text("FROM a AS b\n# no\nRUN one \\\n  two\nCOPY --from=b /x /y\n")
    (stage,) = dockerfile.read_stages(path)
    assert stage.instructions == [
        Instruction("RUN", "one   two"),
        Instruction("COPY", "--from=b /x /y"),
    ]
    assert stage.instructions[1].options == {"from": "b"}
    for line in ("ADD a b", "RUN <<EOF"):
        path.write_text(f"FROM a\n{line}\n")
        with pytest.raises(ValueError, match="not understood"):
            dockerfile.read_stages(path)


def test_what_builds_llama_cpp_is_all_there_when_it_is_built(stages, tmp_path):
    """The build runs before the rest of the package is copied, so that an engine caches it."""
    build = stages[0].instructions
    runs = [i.name == "RUN" and "build.py wheel" in i.value for i in build]
    for instruction in build[: runs.index(True)]:
        if instruction.name == "COPY":
            *names, folder = instruction.rest.split()
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
            for name in names:
                shutil.copy(ROOT / name, tmp_path / folder)
    script = tmp_path / "trimix_gguf" / "machine" / "build.py"
    done = subprocess.run(
        [sys.executable, script, "flags", "--portable"], capture_output=True, text=True, check=True
    )
    used = re.findall(rf"{re.escape(str(script.parent))}/[\w.]+", done.stdout)
    assert len(used) >= 2 and all(Path(path).is_file() for path in used)
    assert (script.parent / "probe.cpp").is_file()

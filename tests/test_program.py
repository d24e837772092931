"""The program on the stick: exported whole, and installed from there without a network."""

import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from small_trio import snapshot

from trimix_gguf.errors import ProgramError
from trimix_gguf.trios import wheels
from trimix_gguf.trios.program import system
from trimix_gguf.trios.wheel_folder import WheelFolder

HERE = "{}.{}".format(*sys.version_info)
UNREACHABLE = "the package index cannot be reached"
NAME = "demo"  # nano under another name, for nano is in the program itself

pytestmark = pytest.mark.skipif(os.name == "nt", reason="install.sh is for a POSIX shell")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """llama.cpp as it is installed here: a real wheel, and no build of minutes."""
    folder = tmp_path_factory.mktemp("llama")
    return wheels.repack(metadata.distribution("llama-cpp-python"), folder)


def lay_llama(stick, llama):
    """As an export that was stopped leaves it: one wheel, and its hash."""
    folder = stick / "program" / "wheels"
    folder.mkdir(parents=True)
    shutil.copy(llama, folder)
    digest = hashlib.sha256(llama.read_bytes()).hexdigest()
    (folder / "SHA256SUMS").write_text(f"{digest}  {llama.name}\n")


def command(*arguments, python=sys.executable):
    return [str(python), "-m", "trimix_gguf.cli", *map(str, arguments)]


def export(stick, *options, **how):
    """trimix export of the trio and the program, as a user gives it; skips without an index."""
    arguments = command("export", NAME, stick / NAME, "--with-program", stick, *options)
    done = subprocess.run([*how.pop("before", ()), *arguments], capture_output=True, text=True)
    if UNREACHABLE in done.stderr and not how.get("offline"):
        pytest.skip(f"pip reaches no index: {done.stderr.splitlines()[-1]}")
    return done


@pytest.fixture(scope="module")
def exported(tmp_path_factory, llama, own_cache):
    folder = tmp_path_factory.mktemp("exported")
    for arguments in (("export", "nano", folder / "x.tar"),
                      ("import", folder / "x.tar", "--name", NAME)):  # fmt: skip
        subprocess.run(command(*arguments), check=True, capture_output=True)
    stick = folder / "a stick, ұшқын"
    lay_llama(stick, llama)
    done = export(stick)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(stick / NAME)
    return stick


@pytest.fixture
def stick(exported, tmp_path):
    return Path(shutil.copytree(exported, tmp_path / "a stick, ұшқын"))


@pytest.fixture
def no_network():
    """What goes before a command so that it has no network; skips where that is not allowed."""
    before = ["unshare", "-rn"]
    if shutil.which("unshare") is None or subprocess.run([*before, "true"]).returncode:
        pytest.skip("no network namespace can be made here")
    return before


def install(stick, home, *arguments, before=(), path=None):
    """sh install.sh of a person with a clean home and nothing else."""
    home.mkdir(parents=True, exist_ok=True)
    path = path or f"{Path(sys.executable).resolve().parent}:/usr/bin:/bin"
    clean = ["env", "-i", f"PATH={path}", f"HOME={home}"]
    run = [*before, *clean, "sh", stick / "install.sh", *arguments]
    return subprocess.run(run, capture_output=True, text=True, timeout=240, cwd="/")


def refused(done, *words):
    assert done.returncode == 1, done.stderr
    assert len(done.stderr.splitlines()) == 1 and done.stdout == "", done.stderr
    assert all(word in done.stderr for word in words), done.stderr


# -- as people do -----------------------------------------------------------------------------


def test_a_clean_home_without_a_network_installs_and_answers(stick, tmp_path, no_network):
    home = tmp_path / "Үй иесі" / "home"
    stop_an_install(stick, home)
    done = install(stick, home, before=no_network)
    assert done.returncode == 0, done.stderr
    program = home / ".local/share/trimix/program"
    assert re.search("[а-я]{4}", done.stdout) and f"{NAME} answers:" in done.stderr
    assert f'"{program}/bin/trimix" chat --trio {NAME}' in done.stderr
    assert (home / ".local/share/trimix/trios" / NAME / "trio.toml").is_file()

    # What was installed makes the next stick, without a network too.
    again = Path(shutil.copytree(stick, tmp_path / "again"))
    for name in ("trimix_gguf", "h11", "psutil"):
        next(again.rglob(f"{name}-*.whl")).unlink()
    clean = ["env", "-i", "PATH=/usr/bin:/bin", f"HOME={home}", f"{program}/bin/trimix"]
    more = ["export", NAME, again / NAME, "--with-program", again]
    done = subprocess.run([*no_network, *clean, *more], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    here, there = (snapshot(s / "program" / "wheels") for s in (stick, again))
    assert here.keys() == there.keys()
    differ = {path.name.split("-")[0] for path in here if here[path] != there[path]}
    assert differ <= {"trimix_gguf", "SHA256SUMS"}  # packed here, built by setuptools there
    mine = [next((s / "program" / "wheels").glob("trimix_gguf-*")) for s in (stick, again)]
    assert contents(mine[0]) == contents(mine[1])


def stop_an_install(stick, home):
    """Kill an install amid pip; the same command is to complete it."""
    program = home / ".local/share/trimix/program"
    env = {"PATH": os.environ["PATH"], "HOME": str(home)}
    script = ["sh", stick / "install.sh"]
    home.mkdir(parents=True)
    with subprocess.Popen(
        script, env=env, stderr=subprocess.PIPE, text=True, process_group=0
    ) as run:
        assert "installing into" in run.stderr.readline()
        while run.poll() is None and not list(program.rglob("numpy/__init__.py")):
            time.sleep(0.05)
        assert run.poll() is None, run.stderr.read()
        os.killpg(run.pid, signal.SIGKILL)
    assert run.returncode == -signal.SIGKILL and not (program / "bin" / "trimix").exists()


def contents(wheel):
    """The files of a wheel, but for the list of them."""
    with zipfile.ZipFile(wheel) as archive:
        return {n: archive.read(n) for n in archive.namelist() if not n.endswith("/RECORD")}


def test_an_export_again_fetches_and_changes_nothing(stick, no_network):
    before = {path: path.stat().st_mtime_ns for path in stick.rglob("*.whl")}
    done = export(stick, before=no_network, offline=True)
    assert done.returncode == 0, done.stderr
    assert "downloading" not in done.stderr and done.stderr.count("packing") == 1  # to compare it
    assert before == {path: path.stat().st_mtime_ns for path in stick.rglob("*.whl")}
    assert not list(stick.rglob(".*"))


def test_wheels_for_another_python_are_downloaded_once(stick, no_network, tmp_path):
    other = "3.12" if HERE != "3.12" else "3.13"
    done = export(stick, "--for-python", other)
    assert done.returncode == 0, done.stderr
    assert f"downloading numpy for Python {other}" in done.stderr
    assert (stick / "program/made-for.txt").read_text().split() == [
        f"{system()}:{version}" for version in sorted([HERE, other])
    ]
    tag = f"cp{other.replace('.', '')}"
    assert len(list(stick.rglob(f"numpy-*-{tag}-*.whl"))) == 1
    assert len(list(stick.rglob("click-*.whl"))) == 1  # pure wheels are shared
    again = export(stick, "--for-python", other, before=no_network, offline=True)
    assert again.returncode == 0 and "downloading" not in again.stderr
    for wheel in stick.rglob(f"numpy-*-{tag}-*.whl"):
        wheel.unlink()
    failed = export(stick, "--for-python", other, before=no_network, offline=True)
    assert failed.returncode == 1
    assert f"for Python {other} could not be had: {UNREACHABLE}" in failed.stderr
    assert "numpy" in failed.stderr.splitlines()[-1] and not (stick / "install.sh").exists()


def test_a_damaged_wheel_is_refused_there_and_made_again_here(stick, tmp_path):
    wheel = next(stick.rglob("click-*.whl"))
    whole = wheel.read_bytes()
    wheel.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    refused(install(stick, tmp_path / "home"), "damaged or missing", wheel.name)
    done = export(stick)
    assert done.returncode == 0 and "packing click" in done.stderr
    assert wheel.read_bytes() == whole
    wheel.unlink()
    refused(install(stick, tmp_path / "home"), "damaged or missing", wheel.name)
    (stick / "program/wheels/SHA256SUMS").unlink()
    refused(install(stick, tmp_path / "home"), "damaged or missing", "SHA256SUMS")
    assert not any((tmp_path / "home").iterdir())


def test_what_is_missing_there_is_told_in_one_line(stick, tmp_path):
    home, bare = tmp_path / "home", tmp_path / "bin"
    bare.mkdir()
    for tool in ("sh", "dirname", "cat", "tr", "grep", "sed", "ls", "mkdir", "rm", "sha256sum"):
        (bare / tool).symlink_to(shutil.which(tool))
    env = shutil.which("env")
    assert env is not None
    refused(install(stick, home, path=bare), "no Python here", f"{system()}:{HERE}")
    real = Path(sys.executable).resolve()
    script = f'#!/bin/sh\n[ "$2" = venv ] && exit 1\nexec "{real}" "$@"\n'
    (bare / "python3").write_text(script)
    (bare / "python3").chmod(0o755)
    refused(install(stick, home, path=bare), "cannot make an environment", "python3-venv")
    mine = home / "letters"
    mine.mkdir()
    (mine / "letter").write_text("dear")
    refused(install(stick, home, mine, path=bare), str(mine), "holds other files")
    assert (mine / "letter").read_text() == "dear"
    (stick / "program/made-for.txt").write_text("plan9-mips:3.11\nlinux-x86_64:3.99\n")
    refused(install(stick, home, path=bare), "plan9-mips:3.11 linux-x86_64:3.99",
            f"this computer has: {system()}:{HERE}", "--for-python")  # fmt: skip


# -- stopped, and refused ---------------------------------------------------------------------


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_an_export_that_was_stopped_is_completed(exported, llama, tmp_path, sent):
    stick = tmp_path / "stick"
    lay_llama(stick, llama)
    arguments = command("export", NAME, stick / NAME, "--with-program", stick)
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True) as running:
        for line in running.stderr:
            if line.startswith("packing rich"):
                running.send_signal(sent)
                break
        rest = running.stderr.read()
    if sent == signal.SIGINT:
        assert running.returncode == 130 and "stopped; the same command goes on" in rest
        assert not list(stick.rglob(".*"))
    assert not (stick / "install.sh").exists()
    done = export(stick)
    assert done.returncode == 0 and "packing numpy" not in done.stderr
    assert "packing psutil" in done.stderr
    assert snapshot(stick) == snapshot(exported)


def test_a_full_disk_is_one_line(exported, tmp_path, llama):
    before = ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o size=60m none "$0" && shift && "$@"']
    stick = tmp_path / "stick"
    stick.mkdir()
    if subprocess.run([*before, stick, "", "true"], stderr=subprocess.DEVNULL).returncode:
        pytest.skip("nothing can be mounted here")
    lay = 'mkdir -p "$0"/program && cp -r "$1" "$0"/program/wheels && shift && "$@"'
    full = tmp_path / "full"
    lay_llama(full, llama)
    inner = ["sh", "-c", lay, stick, full / "program/wheels"]
    done = export(stick, before=[*before, stick, "", *inner], offline=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith("its disk is full; make room and run this again")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("target", "options", "words"),
    [
        ("elsewhere/demo", (), "is not in"),
        ("stick", (), "is not in"),
        ("stick/program/demo", (), "choose another name"),
        ("stick/demo", ("--for-python", "3.10"), "3.11 or newer"),
        ("stick/demo", ("--for-python", "newest"), "3.11 or newer"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    trimix, tmp_path, target, options, words
):
    where = ("--with-program", tmp_path / "stick")
    done = trimix("export", "nano", tmp_path / target, *where, *options)
    assert done.returncode == 1 and words in done.stderr.decode()
    assert len(done.stderr.splitlines()) == 1 and not any(tmp_path.iterdir())


def test_for_python_goes_with_a_program(trimix, tmp_path):
    done = trimix("export", "nano", tmp_path / "x", "--for-python", "3.12")
    assert done.returncode == 2 and b"--with-program" in done.stderr


def test_two_trios_and_a_tar_share_a_stick(stick, trimix, tmp_path):
    done = trimix("export", "nano", stick / "nano.tar", "--with-program", stick)
    assert done.returncode == 0
    listed = (stick / "program/trios.txt").read_text()
    assert [line.split("\t")[0] for line in listed.splitlines()] == [NAME, "nano.tar"]
    shutil.rmtree(stick / NAME)
    assert trimix("export", "nano", stick / "nano.tar", "--with-program", stick).returncode == 0
    assert (stick / "program/trios.txt").read_text().startswith("nano.tar\t")
    assert "the trio nano.tar," in (stick / "README.txt").read_text()


def test_a_name_that_is_no_wheels_is_left_out(tmp_path):
    (tmp_path / "SHA256SUMS").write_text(f"{'0' * 64}  odd.whl\n")
    assert WheelFolder(tmp_path, print).find(Requirement("odd"), []) is None


def test_an_older_wheel_goes_and_one_for_another_system_stays_while_it_is_whole(stick):
    folder = stick / "program" / "wheels"
    sums = folder / "SHA256SUMS"
    older, foreign, damaged = (
        "click-0.1-py3-none-any.whl",
        "x-1-py3-none-win32.whl",
        "y-1-py3-none-win32.whl",
    )
    for name in (older, foreign, damaged):
        (folder / name).write_text(name)
        digest = hashlib.sha256(name.encode()).hexdigest()
        sums.write_text(f"{sums.read_text()}{digest}  {name}\n")
    (folder / damaged).write_text("cut")
    next(folder.glob(f"click-{metadata.version('click')}-*")).unlink()
    made_for = stick / "program/made-for.txt"
    made_for.write_text(f"windows-amd64:3.12\n{system()}:3.99\n")
    done = export(stick)
    assert done.returncode == 0 and f"{damaged} is damaged, and gone" in done.stderr
    listed = {line.split("  ")[1] for line in sums.read_text().splitlines()}
    assert listed == {path.name for path in folder.glob("*.whl")} and foreign in listed
    assert not {older, damaged} & listed
    assert made_for.read_text().split() == ["windows-amd64:3.12", f"{system()}:{HERE}"]


# -- wheels -----------------------------------------------------------------------------------


def test_a_wheel_packed_again_is_the_same_each_time_and_refuses_what_was_altered(tmp_path):
    (tmp_path / "site").mkdir()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    click = metadata.distribution("click")
    first, second = (wheels.repack(click, tmp_path / name) for name in ("a", "b"))
    assert first.name == second.name and first.read_bytes() == second.read_bytes()
    with zipfile.ZipFile(first) as archive:
        archive.extractall(tmp_path / "site")
    (copy,) = metadata.distributions(path=[str(tmp_path / "site")])
    assert contents(wheels.repack(copy, tmp_path)) == contents(first)
    (tmp_path / "site" / "click" / "core.py").write_text("altered")
    with pytest.raises(ProgramError, match="core.py was altered since click"):
        wheels.repack(copy, tmp_path)
    (tmp_path / "site" / "click" / "core.py").unlink()
    with pytest.raises(ProgramError, match="core.py of click .* is missing"):
        wheels.repack(copy, tmp_path)


def test_an_environment_without_pip_is_told(monkeypatch):
    monkeypatch.setattr(wheels.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ProgramError, match="has no pip; .* -m ensurepip"):
        wheels.check_pip()

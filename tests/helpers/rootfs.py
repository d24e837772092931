"""A Debian root in a folder: commands in it by chroot, and a container of namespaces around it."""

import ast
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dockerfile

PACKAGES = "python3,python3-venv,ca-certificates"  # what the base image has, beside minbase
# Unlike chroot, an engine gives a container these and no more.
DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
NETWORK = re.compile(
    r"PIP_\w+|(?:https?|ftp|all|no)_proxy|SSL_CERT_(?:FILE|DIR)|REQUESTS_CA_BUNDLE|CURL_CA_BUNDLE",
    re.IGNORECASE,
)


def debootstrap(folder: Path, suite: str, mirror: str | None) -> None:
    """A fresh Debian in `folder`, whole or not at all."""
    if mirror is None:
        targets = ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages"]
        listed = subprocess.run(targets, check=True, capture_output=True, text=True).stdout
        mirror = next(uri for uri in listed.split() if "security" not in uri)
    partial = folder.with_suffix(".part")
    shutil.rmtree(partial, ignore_errors=True)
    command = ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", suite, partial, mirror]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"debootstrap: {(done.stdout + done.stderr)[-2000:]}")
    shutil.rmtree(partial / "var/cache/apt/archives", ignore_errors=True)
    partial.rename(folder)


def size_of(folder: Path) -> int:
    """Megabytes (10^6) on disk."""
    command = ["du", "--summarize", "--one-file-system", "--block-size=1000000", str(folder)]
    return int(
        subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[0]
    )


def lent_environment(apt_config: Path) -> dict[str, str]:
    """How this machine's pip and apt reach their indexes, as environment variables."""
    lent = {name: value for name, value in os.environ.items() if NETWORK.fullmatch(name)}
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], check=True, capture_output=True, text=True
    ).stdout
    for name, value in re.findall(r"^global\.([\w-]+)=(.*)$", listed, re.MULTILINE):
        lent.setdefault(f"PIP_{name.upper().replace('-', '_')}", ast.literal_eval(value).strip())
    dump = subprocess.run(["apt-config", "dump"], check=True, capture_output=True, text=True).stdout
    wanted = re.findall(r"^Acquire::(?:https?::|Check-|Retries).*$", dump, re.MULTILINE)
    apt_config.write_text("\n".join(wanted) + "\n")
    return lent | {"APT_CONFIG": str(apt_config), "DEBIAN_FRONTEND": "noninteractive"}


def lent_paths(environment: dict[str, str]) -> list[Path]:
    """The files and folders of this machine that the lent settings name, outermost only."""
    words = " ".join(environment.values()).replace("file://", "").split()
    found = {Path("/etc/resolv.conf"), Path("/etc/hosts")}
    found |= {Path(word) for word in words if word.startswith("/") and Path(word).exists()}
    for index in [p for p in found if p.name == "simple"]:  # its links lead beside it
        found.add(index.parent)
    return sorted(path for path in found if not found & set(path.parents))


@dataclass
class Rootfs:
    """A root folder, and what its image says of user, folder and environment."""

    path: Path
    environment: dict[str, str] = field(default_factory=lambda: {"PATH": dockerfile.PATH})
    user: str = "0:0"
    folder: str = "/"

    @classmethod
    def copy_of(cls, base: Path, path: Path) -> "Rootfs":
        shutil.rmtree(path, ignore_errors=True)
        subprocess.run(["cp", "--archive", "--reflink=auto", str(base), str(path)], check=True)
        return cls(path)

    def run(self, command: str) -> str:
        """RUN: a shell command in this root, with this machine's network; its output.

        What is lent is mounted while it runs, and leaves nothing behind.
        """
        with tempfile.TemporaryDirectory() as temporary:
            lent = lent_environment(Path(temporary) / "apt.conf")
            paths = [*lent_paths(lent), Path("/dev"), Path("/proc")]
            made = [p for path in paths for p in self._mount_point(path)]
            mounts = [f"mount --rbind {shlex.quote(str(p))} {self._inside(p)}" for p in paths]
            enter = ["chroot", f"--userspec={self.user}", str(self.path), "/bin/sh", "-c"]
            inner = f"cd {shlex.quote(self.folder)} && {command}"
            script = "\n".join(["set -e", *mounts, f"exec {shlex.join([*enter, inner])}"])
            done = subprocess.run(
                ["unshare", "--mount", "--pid", "--fork", "--kill-child", "/bin/sh", "-c", script],
                env={"HOME": "/root", **self.environment, **lent},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for path in reversed(made):
                with suppress(OSError):  # a folder that the command also used
                    path.rmdir() if path.is_dir() else path.unlink()
        if done.returncode != 0:
            raise SystemExit(f"{done.stdout[-4000:]}\nRUN {command}: exit {done.returncode}")
        return done.stdout

    def _inside(self, path: Path) -> Path:
        return self.path / str(path).lstrip("/")

    def _mount_point(self, path: Path) -> list[Path]:
        """What had to be made so that `path` can be mounted."""
        inside = self._inside(path)
        made = [p for p in (inside, *inside.parents) if not p.exists()][::-1]
        inside.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            inside.mkdir(exist_ok=True)
        elif not inside.exists():
            inside.touch()
        return made


class Container:
    """`docker run --read-only --tmpfs /tmp --cap-drop ALL --network none -v VOLUME:/trios`."""

    def __init__(
        self, image: Rootfs, stage: dockerfile.Stage, volume: Path, **environment: str
    ) -> None:
        (place,) = stage.last("VOLUME").words() or [""]
        if not volume.exists():  # as an engine fills a named volume at first
            shutil.copytree(image.path / place.lstrip("/"), volume, symlinks=True)
            subprocess.run(
                ["chown", f"--reference={image.path / place.lstrip('/')}", str(volume)], check=True
            )
        root = shlex.quote(str(image.path))
        entry, command = stage.last("ENTRYPOINT").words(), stage.last("CMD").words()
        if entry is None or command is None:
            raise SystemExit("ENTRYPOINT and CMD must be in exec form: a shell drops SIGTERM")
        self._as_user = _as_user(image.user)
        enter = ["chroot", str(image.path), *self._as_user, *entry, *command]
        enter[2:2] = ["/usr/bin/env", f"--chdir={image.folder}"]
        script = f"""
set -e
ip link set lo up
mount --bind {root} {root}
mount -o remount,bind,ro {root}
mount --bind {shlex.quote(str(volume))} {root}{place}
mount -t tmpfs tmpfs {root}/tmp
mount -t proc proc {root}/proc
mount -t tmpfs tmpfs {root}/dev
for name in {" ".join(DEVICES)}; do
  touch {root}/dev/$name
  mount --bind /dev/$name {root}/dev/$name
done
mkdir -m 1777 {root}/dev/shm
exec {shlex.join(enter)}
"""
        unshare = ["unshare", "--mount", "--net", "--ipc", "--uts", "--pid", "--fork"]
        self._environment = {**image.environment, **environment}
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by __exit__
        self._started = time.monotonic()
        self._process = subprocess.Popen(
            [*unshare, "--kill-child", "/bin/sh", "-c", script],
            env=self._environment,
            stdout=self._log,
            stderr=self._log,
        )
        self._pid = self._first_process()

    def __enter__(self) -> "Container":
        return self

    def __exit__(self, *_: Any) -> None:
        self._process.kill()
        self._process.wait()
        self._log.close()

    def log(self) -> str:
        return os.pread(self._log.fileno(), 1 << 20, 0).decode(errors="replace")

    def run(self, command: list[str], **options: Any) -> "subprocess.CompletedProcess[str]":
        """`docker exec`: a command beside the first process, as the same user."""
        return subprocess.run(
            self._beside(command), env=self._environment, capture_output=True, text=True, timeout=60
        )

    def client(self, program: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
        return self.run(["python", "-c", program, *arguments])

    def start_client(self, program: str, *arguments: str) -> "subprocess.Popen[str]":
        command = self._beside(["python", "-c", program, *arguments])
        return subprocess.Popen(command, env=self._environment, stdout=subprocess.PIPE, text=True)

    def wait_until_healthy(self, check: list[str]) -> float:
        """Run the HEALTHCHECK until it succeeds; seconds since the start."""
        while (checked := self.run(check)).returncode != 0:
            if self._process.poll() is not None or time.monotonic() - self._started > 60:
                raise SystemExit(f"not healthy: {checked.stderr}\n{self.log()}")
            time.sleep(0.1)
        return round(time.monotonic() - self._started, 1)

    def wait_for(self, pattern: str) -> re.Match[str]:
        """A line of the log."""
        while (found := re.search(pattern, self.log(), re.MULTILINE)) is None:
            if self._process.poll() is not None or time.monotonic() - self._started > 60:
                raise SystemExit(f"{pattern} did not come: {self.log()}")
            time.sleep(0.05)
        return found

    def wait_for_handler(self) -> None:
        """Until the first process handles SIGTERM, which it would not get before."""
        while not int(self._status("SigCgt"), 16) >> (signal.SIGTERM - 1) & 1:
            time.sleep(0.002)

    def user(self) -> str:
        """uid and gid of the first process."""
        return f"{self._status('Uid').split()[0]}:{self._status('Gid').split()[0]}"

    def capabilities(self) -> str:
        return self._status("CapEff").strip()

    def end(self) -> tuple[int, float]:
        """SIGTERM to the first process; its exit code, and the seconds it took."""
        started = time.monotonic()
        os.kill(self._pid, signal.SIGTERM)
        return self._process.wait(15), time.monotonic() - started

    def _beside(self, command: list[str]) -> list[str]:
        enter = ["nsenter", f"--target={self._pid}", "--mount", "--net", "--pid", "--root", "--wd"]
        return [*enter, *self._as_user, *command]

    def _status(self, name: str) -> str:
        text = Path(f"/proc/{self._pid}/status").read_text()
        return text.partition(f"\n{name}:")[2].partition("\n")[0].strip()

    def _first_process(self) -> int:
        """The process that is number 1 in there, once it is the image's own."""
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        own = Path(f"/proc/{self._process.pid}/root").resolve()
        while self._process.poll() is None:
            with suppress(OSError, IndexError):
                pid = int(children.read_text().split()[0])
                name = Path(f"/proc/{pid}/comm").read_text().strip()
                if Path(f"/proc/{pid}/root").resolve() != own and name not in ("env", "setpriv"):
                    return pid
            time.sleep(0.002)
        raise SystemExit(f"the container did not start: {self.log()}")


def _as_user(user: str) -> list[str]:
    """As an engine drops rights with --cap-drop ALL and no-new-privileges."""
    uid, _, gid = user.partition(":")
    rights = ["--clear-groups", "--inh-caps=-all", "--bounding-set=-all", "--no-new-privs"]
    return ["setpriv", f"--reuid={uid}", f"--regid={gid or uid}", *rights]

"""The Dockerfile's steps in a fresh Debian, for a machine without a container engine.

    python benchmarks/container.py --work /srv/container > benchmarks/results/container.txt

Needs root on Debian or Ubuntu, and debootstrap. The Dockerfile itself is read and run: debootstrap
stands in for the base image, chroot for RUN, and namespaces for the running container (its own
network with loopback only, a read-only root, a tmpfs at /tmp). pip and apt use in there what this
machine's pip and apt use. Then the server is started as the image's user, asked, and ended by
SIGTERM. Ends in a line of JSON.
"""

import argparse
import json
import os
import platform
import re
import shutil
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests" / "helpers"))

import dockerfile  # noqa: E402
from rootfs import Container, Rootfs, debootstrap, size_of  # noqa: E402

BUILD = re.compile(r"machine/build\.py wheel (\S+)")
# Prints the text; of a stream "begun" at its first event, and how it ended.
CLIENT = """
import json, sys
from urllib import request
key, n_tokens, stream = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "stream"
body = {"prompt": "Қазақстан Республикасының Үкіметі", "max_tokens": n_tokens, "seed": 7,
        "logit_bias": {"0": -100}, "stream": stream}
headers = {"Content-Type": "application/json"} | ({"Authorization": "Bearer " + key} if key else {})
asked = request.Request("http://127.0.0.1:8080/v1/completions", json.dumps(body).encode(), headers)
try:
    answer = request.urlopen(asked)
except request.HTTPError as error:
    sys.exit(f"status {error.code}")
if stream:
    lines = [answer.readline()]
    print("begun", flush=True)
    lines += answer.readlines()
    finish = json.loads(lines[-4].removeprefix(b"data: "))["choices"][0]["finish_reason"]
    print(lines[-2].decode().strip(), finish)
else:
    print(json.load(answer)["choices"][0]["text"])
"""


def build(options: argparse.Namespace) -> tuple[Rootfs, dockerfile.Stage, dict[str, float]]:
    """Run every stage; the last one's root, the stage, and seconds for each step."""
    stages = dockerfile.read_stages(ROOT / "Dockerfile")
    roots: dict[str, Rootfs] = {}
    seconds: dict[str, float] = {}
    for stage in stages:
        found = re.fullmatch(r"python:(3\.\d+)-slim-(\w+)", stage.base)
        if found is None:
            raise SystemExit(f"FROM {stage.base}: expected python:3.N-slim-SUITE")
        python, suite = found.groups()
        base = options.work / f"base-{suite}"
        if not base.is_dir():
            seconds["debootstrap"] = timed(lambda: debootstrap(base, suite, options.mirror))  # noqa: B023
        root = roots[stage.name] = Rootfs.copy_of(base, options.work / f"stage-{stage.name}")
        have = root.run("python3 -c 'import sys; print(*sys.version_info[:2], sep=\".\")'").strip()
        if have != python:
            raise SystemExit(f"Debian {suite} has Python {have}, the Dockerfile wants {python}")
        print(f"FROM {stage.base}: Debian {suite}, Python {have}, {size_of(base)} MB", flush=True)
        for number, instruction in enumerate(stage.instructions):
            took = timed(lambda: step(root, instruction, roots, options.llama_wheel))  # noqa: B023
            seconds[f"{stage.name}.{number} {instruction.name}"] = round(took, 1)
            print(f"{took:7.1f} s  {instruction.name} {instruction.value[:90]}", flush=True)
    return root, stage, seconds


def step(
    root: Rootfs, instruction: dockerfile.Instruction, roots: dict[str, Rootfs], wheel: Path | None
) -> None:
    """Do one instruction of the Dockerfile."""
    name, rest = instruction.name, instruction.rest
    if name == "RUN":
        found = BUILD.search(rest)
        if found is not None and wheel is not None:
            print(f"           {wheel.name} is taken instead of building it", flush=True)
            (root.path / found[1].lstrip("/")).mkdir(parents=True, exist_ok=True)
            shutil.copy(wheel, root.path / found[1].lstrip("/"))
        else:
            root.run(rest)
    elif name == "COPY":
        copy(root, instruction, roots)
    elif name == "ENV":
        root.environment |= dockerfile.environment(rest, root.environment)
    elif name == "WORKDIR":
        root.folder = rest
        (root.path / rest.lstrip("/")).mkdir(parents=True, exist_ok=True)
    elif name == "USER":
        root.user = rest
    # The others say how the image is run.


def copy(root: Rootfs, instruction: dockerfile.Instruction, roots: dict[str, Rootfs]) -> None:
    """COPY as an engine does it: of a folder its contents, links as they are."""
    *sources, target = instruction.rest.split()
    into = root.path / os.path.join(root.folder, target).lstrip("/")
    if "from" in instruction.options:
        (source,) = sources
        stage = roots[instruction.options["from"]]
        shutil.copytree(stage.path / source.lstrip("/"), into, symlinks=True, dirs_exist_ok=True)
        return
    for source, files in dockerfile.sources_of(instruction, dockerfile.context_files(ROOT)).items():
        if not files:
            raise SystemExit(f"COPY {source}: not in the build's context")
        for file in files:
            to = into / (Path(source).name if file == Path(source) else file.relative_to(source))
            if file == Path(source) and not target.endswith("/") and target != ".":
                to = into
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, to, follow_symlinks=False)


def use(image: Rootfs, stage: dockerfile.Stage, work: Path) -> dict[str, object]:
    """Three containers: with the key that it makes, with one given, and ended while it loads."""
    check = stage.health_command()
    results: dict[str, object] = {}
    shutil.rmtree(work / "volume", ignore_errors=True)

    with Container(image, stage, work / "volume") as served:
        results["healthy_after_s"] = served.wait_until_healthy(check)
        key = served.wait_for(r"^key: (\S+)$")[1]
        refused = served.client(CLIENT, "", "8", "whole")
        assert refused.returncode == 1 and "status 401" in refused.stderr, refused
        started = time.monotonic()
        answer = served.client(CLIENT, key, "16", "whole")
        n_tokens = min(200, max(4, int(16 * 3 / (time.monotonic() - started))))  # of three seconds
        assert answer.returncode == 0 and answer.stdout.strip(), answer
        print(f"without a key: 401; with the printed one: {answer.stdout.strip()!r}")
        results["user"], results["capabilities"] = served.user(), served.capabilities()
        assert results["user"] == image.user != "0:0" and not int(served.capabilities(), 16)
        written = served.run(["python", "-c", "open('/etc/trial', 'w')"])
        assert "Read-only file system" in written.stderr, written
        for place in ("/trios/trial", "/tmp/trial"):
            assert served.run(["python", "-c", f"open('{place}', 'w')"]).returncode == 0, place
        streaming = served.start_client(CLIENT, key, str(n_tokens), "stream")
        assert streaming.stdout is not None and streaming.stdout.readline() == "begun\n"
        code, seconds = served.end()
        last = streaming.stdout.read().strip()
        assert streaming.wait(30) == 0 and last == "data: [DONE] length", last
        results["exit_with_an_answer_running"] = code
        print(f"SIGTERM during an answer: its {n_tokens} tokens came; exit {code}, {seconds:.1f} s")
        assert code == 0 and seconds > 0.2, served.log()

    with Container(image, stage, work / "volume", TRIMIX_API_KEY="sesame") as served:
        served.wait_until_healthy(check)
        answer = served.client(CLIENT, "sesame", "8", "whole")
        assert answer.returncode == 0 and "key:" not in served.log(), served.log()
        code, seconds = served.end()
        results["exit_idle"] = code
        print(f"with TRIMIX_API_KEY: answered, no key printed; exit {code} after {seconds:.1f} s")
        assert code == 0, served.log()

    with Container(image, stage, work / "volume") as served:
        served.wait_for_handler()
        code, seconds = served.end()
        results["exit_while_loading"] = code
        print(f"SIGTERM before it serves: exit {code} after {seconds:.1f} s")
        assert code == 130 and "answers at" not in served.log(), (code, served.log())
    return results


def timed(work: object) -> float:
    """Seconds that `work` takes."""
    started = time.monotonic()
    work()  # type: ignore[operator]
    return time.monotonic() - started


def main() -> None:
    """Measure, and print; the last line is JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--work", type=Path, required=True, help="folder for the roots, 2 GB")
    parser.add_argument("--mirror", help="Debian mirror; default: that of this machine's apt")
    parser.add_argument(
        "--llama-wheel", type=Path, metavar="FILE", help="one that build.py --portable made"
    )
    options = parser.parse_args()
    if os.geteuid() != 0 or shutil.which("debootstrap") is None:
        raise SystemExit("needs root, and debootstrap (apt-get install debootstrap)")
    options.work = options.work.resolve()
    options.work.mkdir(parents=True, exist_ok=True)
    print(f"{platform.platform()}, {os.cpu_count()} cores")
    started = time.monotonic()
    image, stage, seconds = build(options)
    total = round(time.monotonic() - started)
    sizes = {
        "image_mb": size_of(image.path),
        "opt_trimix_mb": size_of(image.path / "opt" / "trimix"),
    }
    print(f"built in {total} s; root {sizes['image_mb']} MB, of it trimix {sizes['opt_trimix_mb']}")
    results = use(image, stage, options.work)
    built = "given" if options.llama_wheel else "built"
    print(
        json.dumps({"llama_wheel": built, "build_s": total, **sizes, **results, "steps": seconds})
    )


if __name__ == "__main__":
    main()

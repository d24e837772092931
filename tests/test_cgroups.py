"""A container's limits of memory and processors, as Linux writes them down in either version."""

import pytest

from trimix_gguf.machine import container, memory, threads

GIB = 1 << 30
V2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup rw\n"
V1_MEMORY = "35 23 0:31 {root} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
V1_CPU = "36 23 0:32 {root} /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"


@pytest.fixture
def tree(tmp_path):
    """tree(files) -> a root with these files; memory.stat and the like by their group."""

    def make(mounts, groups, files):
        every = {"proc/self/mountinfo": mounts, "proc/self/cgroup": groups, **files}
        for name, text in every.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(str(text), encoding="ascii")
        return tmp_path

    return make


def found(root):
    return container.memory_limit(root), container.memory_left(root), container.processors(root)


def test_version_2_the_smallest_of_a_group_and_those_above_holds(tree):
    top, pod = "sys/fs/cgroup", "sys/fs/cgroup/pod"
    root = tree(V2, "0::/pod/box\n", {
        f"{top}/memory.stat": "inactive_file 1\n",
        f"{pod}/memory.max": 4 * GIB, f"{pod}/memory.current": 4 * GIB - 1000,
        f"{pod}/memory.stat": "anon 5\ninactive_file 300\nactive_file 50\n",
        f"{pod}/cpu.max": "150000 100000\n",
        f"{pod}/box/memory.max": "max\n", f"{pod}/box/memory.high": 5 * GIB,
        f"{pod}/box/memory.current": 0, f"{pod}/box/cpu.max": "max 100000\n",
    })  # fmt: skip
    assert found(root) == (4 * GIB, 1350, 2)


@pytest.mark.parametrize("seen", ["/", "/docker/4f1a"])
def test_version_1_with_and_without_a_name_space(tree, seen):
    """In a container, the mount is the group itself, whatever path /proc tells."""
    mounts = (V1_MEMORY + V1_CPU).format(root=seen)
    groups = "4:memory:/docker/4f1a\n2:cpu,cpuacct:/docker/4f1a\n1:name=systemd:/x\n0::/\n"
    base = "sys/fs/cgroup/memory"
    inside = "" if seen != "/" else "/docker/4f1a"
    root = tree(mounts, groups, {
        f"{base}{inside}/memory.limit_in_bytes": 400 << 20,
        f"{base}{inside}/memory.usage_in_bytes": 100 << 20,
        f"{base}{inside}/memory.stat": "inactive_file 7\ntotal_inactive_file 1024\n"
                                       "total_active_file 1024\n",
        f"sys/fs/cgroup/cpu,cpuacct{inside}/cpu.cfs_quota_us": 50000,
        f"sys/fs/cgroup/cpu,cpuacct{inside}/cpu.cfs_period_us": 100000,
    })  # fmt: skip
    assert found(root) == (400 << 20, (300 << 20) + 2048, 1)


def test_no_limit_is_none(tree):
    mounts = V2.replace("/sys/fs/cgroup", "/sys/fs/cgroup/unified") + V1_MEMORY.format(root="/")
    root = tree(mounts, "4:memory:/\n0::/\n", {
        "sys/fs/cgroup/memory/memory.limit_in_bytes": (1 << 63) - 4096,
        "sys/fs/cgroup/memory/memory.usage_in_bytes": 5,
        "sys/fs/cgroup/unified/cpu.max": "max 100000\n",
    })  # fmt: skip
    assert found(root) == (None, None, None)


@pytest.mark.parametrize("text", ["", "x\n", "1:memory\n", "::::\n", "0::/../../..\n"])
def test_what_is_not_understood_limits_nothing(tree, tmp_path, text):
    assert found(tmp_path / "nowhere") == (None, None, None)
    assert found(tree(text + V2, text, {})) == (None, None, None)


def test_memory_and_cores_are_the_smaller_of_machine_and_container(monkeypatch):
    free, has, cores = memory.available(), memory.total(), threads.available_cores()
    monkeypatch.setattr(container, "memory_left", lambda: 1000)
    monkeypatch.setattr(container, "memory_limit", lambda: 2000)
    monkeypatch.setattr(threads, "_processors", lambda: 1)
    assert (memory.available(), memory.total(), threads.available_cores()) == (1000, 2000, 1)
    monkeypatch.setattr(container, "memory_left", lambda: 1 << 60)
    monkeypatch.setattr(container, "memory_limit", lambda: 1 << 60)
    monkeypatch.setattr(threads, "_processors", lambda: 10**6)
    assert memory.available() > free / 2 and memory.total() >= has
    assert threads.available_cores() >= cores

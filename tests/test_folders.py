"""Where trios and caches are, on each system, and that those of earlier versions are found."""

import sys
from pathlib import Path

import pytest
from platformdirs.macos import MacOS
from platformdirs.unix import Unix
from platformdirs.windows import Windows

from trimix_gguf.errors import TrioFileError
from trimix_gguf.machine import folders
from trimix_gguf.machine.notes import read_table
from trimix_gguf.trios import store

OWN = ("TRIMIX_CACHE", "TRIMIX_HOME")
SYSTEM = ("XDG_CACHE_HOME", "XDG_DATA_HOME", "LOCALAPPDATA")
# system -> platformdirs' class; caches and data of an account without settings, below its home
SYSTEMS = {
    "linux": (Unix, ".cache/trimix", ".local/share/trimix"),
    "darwin": (MacOS, "Library/Caches/trimix", "Library/Application Support/trimix"),
    "win32": (Windows, "AppData/Local/trimix", "AppData/Local/trimix"),
}


@pytest.fixture
def account(monkeypatch, tmp_path):
    """account(system) is the home folder of a new account on that system."""
    for name in (*OWN, *SYSTEM):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    local = str(tmp_path / "AppData" / "Local")
    monkeypatch.setattr("platformdirs.windows.get_win_folder", lambda name: local)

    def on(system):
        monkeypatch.setattr(sys, "platform", system)
        monkeypatch.setattr("platformdirs.PlatformDirs", SYSTEMS[system][0])
        return tmp_path

    return on


@pytest.mark.parametrize("system", SYSTEMS)
def test_each_system_has_its_folders(account, system):
    home, (_, cache, data) = account(system), SYSTEMS[system]
    assert folders.cache_folder() == home / cache
    assert folders.home_folder() == home / data
    assert store.trios_folder() == home / data / "trios"
    assert list(home.iterdir()) == []  # asking makes nothing


@pytest.mark.parametrize("system", SYSTEMS)
def test_ones_own_folders_go_before_those_of_the_system(account, system, monkeypatch, tmp_path):
    account(system)
    for name in OWN:
        monkeypatch.setenv(name, str(tmp_path / name))
    assert folders.cache_folder() == tmp_path / "TRIMIX_CACHE"
    assert store.trios_folder() == tmp_path / "TRIMIX_HOME" / "trios"


def test_linux_follows_the_variables_of_xdg(account, monkeypatch, tmp_path):
    account("linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "c"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "d"))
    assert folders.cache_folder() == tmp_path / "c" / "trimix"
    assert folders.home_folder() == tmp_path / "d" / "trimix"


@pytest.mark.parametrize("system", SYSTEMS)
def test_what_an_earlier_version_left_is_found_where_the_system_now_names_another_folder(
    account, system, monkeypatch, tmp_path
):
    home, (_, cache, data) = account(system), SYSTEMS[system]

    class Moved(SYSTEMS[system][0]):
        """As platformdirs answers on Android, or where a folder was redirected."""

        user_cache_dir = str(tmp_path / "new" / "cache")
        user_data_dir = str(tmp_path / "new" / "data")

    monkeypatch.setattr("platformdirs.PlatformDirs", Moved)
    assert folders.cache_folder() == tmp_path / "new" / "cache"
    assert folders.home_folder() == tmp_path / "new" / "data"
    for earlier in (cache, data):
        (home / earlier).mkdir(parents=True, exist_ok=True)
    assert folders.cache_folder() == home / cache
    assert folders.home_folder() == home / data
    for now in ("cache", "data"):  # once there is a new one, it is the one in use
        (tmp_path / "new" / now).mkdir(parents=True)
    assert folders.cache_folder() == tmp_path / "new" / "cache"
    assert folders.home_folder() == tmp_path / "new" / "data"


@pytest.mark.parametrize("unknown", ["~/.cache/trimix", None])
def test_without_a_home_folder_it_is_said_in_one_line(account, monkeypatch, unknown):
    """platformdirs 4 left the '~' where it was; later versions raise RuntimeError."""
    account("linux")

    def none(*_):
        if unknown is None:
            raise RuntimeError("could not determine the home directory")
        return unknown

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Unix, "user_cache_dir", property(none))
    monkeypatch.setattr(Unix, "user_data_dir", property(none))
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(RuntimeError):
        folders.cache_folder()
    with pytest.raises(TrioFileError, match="set TRIMIX_HOME"):
        store.trios_folder()
    assert read_table("costs.json") == {}

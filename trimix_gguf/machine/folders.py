"""Where a user's trios and caches are: the folders that each system has for them."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from platformdirs import PlatformDirs

_NAME = "trimix"


def cache_folder() -> Path:
    """$TRIMIX_CACHE, or the user's cache folder. Raises RuntimeError without a home folder."""
    if chosen := os.environ.get("TRIMIX_CACHE"):
        return Path(chosen)
    earlier = _earlier("XDG_CACHE_HOME", ".cache", "Library/Caches")
    return _in_use(_system().user_cache_dir, earlier)


def home_folder() -> Path:
    """$TRIMIX_HOME, or the user's data folder. Raises RuntimeError without a home folder."""
    if chosen := os.environ.get("TRIMIX_HOME"):
        return Path(chosen)
    earlier = _earlier("XDG_DATA_HOME", ".local/share", "Library/Application Support")
    return _in_use(_system().user_data_dir, earlier)


def _system() -> "PlatformDirs":
    from platformdirs import PlatformDirs  # 5 ms that a start with TRIMIX_CACHE does not need

    # opinion=False: on Windows the cache stays where earlier versions had it.
    return PlatformDirs(_NAME, appauthor=False, opinion=False)


def _in_use(folder: str, earlier: Path | None) -> Path:
    """The system's folder, unless only the one that an earlier version chose is there."""
    if folder.startswith("~"):
        raise RuntimeError("Could not determine home directory.")  # as Path.home() says it
    chosen = Path(folder)
    return earlier if earlier is not None and earlier.is_dir() and not chosen.is_dir() else chosen


def _earlier(variable: str, elsewhere: str, on_macos: str) -> Path | None:
    """What version 0.1 chose before it asked platformdirs; None without a home folder."""
    try:
        if sys.platform == "win32":
            local = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
            return Path(local) / _NAME
        if sys.platform == "darwin":
            return Path.home() / on_macos / _NAME
        return Path(os.environ.get(variable) or Path.home() / elsewhere) / _NAME
    except RuntimeError:
        return None

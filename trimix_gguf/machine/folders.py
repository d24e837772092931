"""Placeholder until merge."""

import os
from pathlib import Path


def cache_folder() -> Path:
    return Path(os.environ.get("TRIMIX_CACHE") or Path.home() / ".cache" / "trimix")

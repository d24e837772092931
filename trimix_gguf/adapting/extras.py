"""What `trimix adapt` needs beside the default install."""

import contextlib
import importlib
import importlib.util
import io
import os
import warnings
from collections.abc import Iterator
from types import ModuleType

from trimix_gguf.errors import TrimixError

INSTALL = "pip install 'trimix-gguf[adapt]' (about 1.5 GB with PyTorch)"


def need(module: str) -> ModuleType:
    """A module of the extra `adapt`; raises TrimixError, with what to install, where it is not."""
    try:
        found = importlib.import_module(module)
    except ImportError:
        raise TrimixError(f"`trimix adapt` needs {module.partition('.')[0]}: {INSTALL}") from None
    if module == "torch":
        _keep_to_limit(found)
    return found


def _keep_to_limit(torch: ModuleType) -> None:
    """Let PyTorch have no more threads than OpenMP gives.

    It shares out its work among as many as it believes in; what is for those that OMP_THREAD_LIMIT
    holds back is not done, and numbers are whatever stood there.
    """
    limit = os.environ.get("OMP_THREAD_LIMIT", "")
    if limit.isdecimal() and 0 < int(limit[:9]) < torch.get_num_threads():
        torch.set_num_threads(int(limit[:9]))


def is_here(module: str) -> bool:
    """Whether a module can be imported; it is not imported for that."""
    return importlib.util.find_spec(module) is not None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps what these libraries say of themselves off the screen; their errors are raised."""
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield

"""What `trimix adapt` needs beside the default install."""

import contextlib
import importlib
import importlib.util
import io
import warnings
from collections.abc import Iterator
from types import ModuleType

from trimix_gguf.errors import TrimixError

INSTALL = "pip install 'trimix-gguf[adapt]' (about 1.5 GB with PyTorch)"


def need(module: str) -> ModuleType:
    """A module of the extra `adapt`; raises TrimixError, with what to install, where it is not."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise TrimixError(f"`trimix adapt` needs {module.partition('.')[0]}: {INSTALL}") from None


def is_here(module: str) -> bool:
    """Whether a module can be imported; it is not imported for that."""
    return importlib.util.find_spec(module) is not None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps what these libraries say of themselves off the screen; their errors are raised."""
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield

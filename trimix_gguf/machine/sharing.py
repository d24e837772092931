"""Whether two trios in one process share models, so that their weights are there once."""

from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

from trimix_gguf.machine.hashes import same_content
from trimix_gguf.machine.loading import LoadingOptions
from trimix_gguf.roles import ROLES, Role

_OF_WEIGHTS = ("n_gpu_layers", "device", "mmap", "mlock")  # the other settings are a context's
Paths = Mapping[Role, Path]
Options = Mapping[Role, LoadingOptions]


def shared_roles(
    paths: Paths,
    options: Options,
    others: Paths,
    theirs: Options,
    *,
    among: Container[Role] = ROLES,
) -> list[Role]:
    """The roles, `among` those given, in which two trios have the same file and ask the same of it.

    None, unless large_ins and small_base are among them: trios that share less are kept apart.
    `options` are Trio.load's by role. Raises OSError where a file is not there.
    """

    def asked(given: Options, role: Role) -> list[Any]:
        known: Mapping[str, Any] = given.get(role, {})
        return [known.get(name) for name in _OF_WEIGHTS]

    def is_same(role: Role) -> bool:
        if role not in among or asked(options, role) != asked(theirs, role):
            return False
        return same_content(paths[role], others[role])

    shared = is_same("large_ins") and is_same("small_base")
    return [role for role in ROLES if is_same(role)] if shared else []

"""The methods that a run compares, by name; choosing/methods.py has their table."""

from trimix_gguf.choosing.methods import ORACLE, evaluated_methods
from trimix_gguf.errors import WeightsError

CALIBRATED = "+cal"  # after a method's name: choices minus what they get without the question
LARGE_BASE = "large_base"  # the fourth model, which DECOUPLED reads


def check_methods(names: tuple[str, ...]) -> None:
    """Raises WeightsError for a method that does not exist, and lists those that do."""
    known = evaluated_methods()
    for name in names:
        if name not in known:
            raise WeightsError(f"there is no method {name!r}; the methods are {', '.join(known)}")


def is_oracle(name: str) -> bool:
    """Whether a method looks at the labels."""
    return name.removesuffix(CALIBRATED) == ORACLE

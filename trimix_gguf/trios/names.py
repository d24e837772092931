"""What may be the name of a trio: it becomes a folder, on any system."""

import re
import unicodedata

from trimix_gguf.errors import TrioFileError

# What Windows takes for a device, with any ending: CON.gguf is the console.
_DEVICES = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³]) *(\..*)?", re.I)
_FORBIDDEN = frozenset('/\\:*?"<>|')


def check_name(name: str) -> str:
    """The name, where it can be a folder on any system; raises TrioFileError."""
    bad = next((c for c in name if c in _FORBIDDEN or unicodedata.category(c)[0] == "C"), None)
    if bad is not None:
        raise TrioFileError(f"name {name!r} holds {bad!r}; use letters, digits, '.' and '-'")
    if not 0 < len(name.encode()) <= 100:
        raise TrioFileError(f"a name has 1 to 100 bytes, not {len(name.encode())}: {name!r}")
    if _DEVICES.fullmatch(name):
        raise TrioFileError(f"name {name!r} is a device on Windows; take another, as {name[:3]}-1")
    if name[0] in ".-" or name[-1] == "." or name.strip() != name:
        raise TrioFileError(f"name {name!r} begins or ends with a dot, dash or space")
    return name

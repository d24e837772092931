"""Write what is known of the nano trio that ships: checksums, sizes, and logits for the self-test.

    TRIMIX_SELF_TEST=0 python convert/nano/ship.py     # after new models; `make nano` does it

`trimix tune --trio nano` then measures which mix answers best.
"""

from trimix_gguf.machine.hashes import sha256_of
from trimix_gguf.roles import ROLES
from trimix_gguf.trio import trial
from trimix_gguf.trio.trio import NANO
from trimix_gguf.trios.triofile import TrioFile


def main() -> None:
    """Write trio.toml and trial.json anew."""
    trio = TrioFile.read(NANO / "trio.toml")
    for role in ROLES:
        file = NANO / f"{role}.gguf"
        trio = trio.with_model(role, sha256=sha256_of(file), n_bytes=file.stat().st_size)
    trio.write()
    trial.keep()


if __name__ == "__main__":
    main()

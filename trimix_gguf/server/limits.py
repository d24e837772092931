"""How much a server takes on, and for how long it waits."""

from dataclasses import dataclass


def share_of_context(n_ctx: int, n_parallel: int) -> int:
    """Most tokens of an answer whose request does not say: its part of the context."""
    return max(16, n_ctx // n_parallel)


@dataclass(frozen=True)
class Limits:
    """Of answers: `parallel` at a time, `queue` more that wait, `timeout_s` for each.

    One client, a key's holder or an address, has at most `per_client` of them at once (0: any).
    A body may have `body_limit` bytes, and `read_timeout_s` to come. At the end of the server,
    running answers have `drain_s` to finish.
    """

    parallel: int = 8
    queue: int = 32
    per_client: int = 0
    timeout_s: float = 600.0
    read_timeout_s: float = 30.0
    drain_s: float = 10.0
    body_limit: int = 1 << 20

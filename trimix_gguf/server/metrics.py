"""What the server has done, in Prometheus' text format."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator

from trimix_gguf.answering.batching import Statistics

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_BOUNDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0, 120.0, 300.0)


class Metrics:
    """HTTP responses by path and status, and a histogram of seconds to the first token."""

    def __init__(self) -> None:
        self._responses: Counter[tuple[str, int]] = Counter()
        self._tokens: Counter[tuple[str, str]] = Counter()
        self._first_token = [0] * (len(_BOUNDS) + 1)  # by the bound above it; the last has none
        self._first_token_sum = 0.0

    def count_response(self, path: str, status: int) -> None:
        """Count one HTTP response."""
        self._responses[path, status] += 1

    def count_tokens(self, key: str, n_prompt: int, n_tokens: int) -> None:
        """Count the tokens of one HTTP request, by the name of its key."""
        if n_prompt:
            self._tokens[key, "prompt"] += n_prompt
            self._tokens[key, "generated"] += n_tokens

    def observe_first_token(self, seconds: float) -> None:
        """Note how long a first token took."""
        self._first_token[bisect_left(_BOUNDS, seconds)] += 1
        self._first_token_sum += seconds

    def render(self, engine: Statistics) -> str:
        """The whole text, with the numbers of the engine."""
        parts = [
            _gauge("requests_running", "Requests being answered.", engine.n_running),
            _gauge("requests_waiting", "Requests waiting for their turn.", engine.n_waiting),
            _counter(
                "requests_finished",
                "Requests that ended, by how.",
                {f'reason="{reason}"': n for reason, n in engine.finished.items()},
            ),
            _counter("prompt_tokens", "Tokens of prompts.", {"": engine.n_prompt_tokens}),
            _counter(
                "cached_tokens",
                "Prompt tokens taken from the cache.",
                {"": engine.n_cached_tokens},
            ),
            _counter("generated_tokens", "Tokens generated.", {"": engine.n_tokens}),
            _counter("step_seconds", "Seconds of reading and decoding.", {"": engine.step_seconds}),
            _counter(
                "http_responses",
                "HTTP responses, by path and status.",
                {f'path="{p}",status="{s}"': n for (p, s), n in self._responses.items()},
            ),
            _counter(
                "key_tokens",
                "Tokens by the name of the key, or - for who has none.",
                {f'key="{key}",kind="{kind}"': n for (key, kind), n in self._tokens.items()},
            ),
            self._histogram(),
        ]
        return "".join(f"{line}\n" for part in parts for line in part)

    def _histogram(self) -> Iterator[str]:
        name, total = "trimix_time_to_first_token_seconds", 0
        yield f"# HELP {name} Seconds from a request to its first token."
        yield f"# TYPE {name} histogram"
        for bound, n in zip((*map(str, _BOUNDS), "+Inf"), self._first_token, strict=True):
            total += n
            yield f'{name}_bucket{{le="{bound}"}} {total}'
        yield f"{name}_sum {self._first_token_sum}"
        yield f"{name}_count {total}"


def _gauge(name: str, text: str, value: float) -> Iterator[str]:
    yield f"# HELP trimix_{name} {text}"
    yield f"# TYPE trimix_{name} gauge"
    yield f"trimix_{name} {value}"


def _counter(name: str, text: str, values: dict[str, float]) -> Iterator[str]:
    """Values by their labels, as text; '' where there are none."""
    yield f"# HELP trimix_{name}_total {text}"
    yield f"# TYPE trimix_{name}_total counter"
    for labels, value in values.items():
        yield f"trimix_{name}_total{f'{{{labels}}}' if labels else ''} {value}"

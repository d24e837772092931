"""The models of a comparison in the processes of a Ray cluster.

Groups of questions, and so their answers, are the same as without Ray.
"""

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from typing import Any

from trimix_gguf.evaluation.running.comparing import Comparison
from trimix_gguf.evaluation.running.working import Job, Models
from trimix_gguf.machine.cluster import Loaded, Pool
from trimix_gguf.trio.trio import Trio


class RayModels:
    """Each process loads the trio with `load`."""

    def __init__(
        self, load: Callable[[], Trio], comparison: Comparison, n_workers: int | None
    ) -> None:
        self._load, self._comparison, self._n_workers = load, comparison, n_workers

    @contextmanager
    def trio(self) -> Iterator[Pool]:
        """Processes with the trio, and a fourth model where a method needs it."""
        with closing(self._pool(partial(_Trio, self._load, self._comparison))) as pool:
            yield pool

    @contextmanager
    def single(self, name: str, n_ctx: int) -> Iterator[Pool]:
        """Processes with a single GGUF, by its name."""
        with closing(self._pool(partial(_Single, self._comparison, name, n_ctx))) as pool:
            yield pool

    def _pool(self, load: Callable[[], Loaded]) -> Pool:
        return Pool(load, named=str, n_workers=self._n_workers, may_differ=["cpu"])


class _Trio:
    """The models of a process."""

    def __init__(self, load: Callable[[], Trio], comparison: Comparison) -> None:
        self._models = comparison.models(load())

    def header(self) -> dict[str, Any]:
        """What of the models the results depend on."""
        return dict(self._models.header())

    def work(self, job: Job) -> Any:
        """The result of a job."""
        return self._models.work(job)


class _Single:
    """The single GGUF of a process; its file was compared with the trio's."""

    def __init__(self, comparison: Comparison, name: str, n_ctx: int) -> None:
        self._models: Models = comparison.models(
            comparison.load_single(name, n_ctx), is_single=True
        )

    def header(self) -> dict[str, Any]:
        """Nothing more."""
        return {}

    def work(self, job: Job) -> Any:
        """The result of a job."""
        return self._models.work(job)

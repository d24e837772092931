"""Trio: three Models kept on the same segments, and the rows that predict their next token."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trimix_gguf.errors import ModelFileError, PromptError
from trimix_gguf.machine.gguf_file import read_gguf
from trimix_gguf.machine.memory import check_fits
from trimix_gguf.machine.planner import place
from trimix_gguf.machine.threads import run_all
from trimix_gguf.machine.vocabulary import check_contract
from trimix_gguf.mixing.fusion import Rows
from trimix_gguf.roles import ROLES
from trimix_gguf.trio.model import Model
from trimix_gguf.trio.prompt import Prompt, Segment, Unit, n_common, text_prompt

Progress = Callable[[int], None]  # tokens just read
Consume = Callable[[Rows, NDArray[np.int64]], None]  # rows [n, n_vocab], the ids they predict

Mark = tuple[int, int]  # units read, and units consumed: the last row predicts one ahead

NANO = Path(__file__).parent.parent / "nano"  # the Kazakh trio that ships with the package


class Trio:
    """large_ins, small_cpt and small_base on one prompt.

    Invariant: after every public call, failed ones included, the three follow one list of
    segments. A role that a mix leaves out is not decoded; it stays behind by shared tokens,
    which it reads in windows the next time its row is wanted.
    """

    def __init__(self, *, large_ins: Model, small_cpt: Model, small_base: Model) -> None:
        self.models = dict(zip(ROLES, (large_ins, small_cpt, small_base), strict=True))
        self.n_vocab = check_contract({r: m.file for r, m in self.models.items()})
        self.n_window = min(m.n_window for m in self.models.values())
        self._ids: dict[str, list[int]] = {role: [] for role in ROLES}
        self.mark: Mark = (0, 0)
        self._pool = ThreadPoolExecutor(len(ROLES), thread_name_prefix="device")
        self._rows: Rows = {}  # next-token rows [n_vocab] of the roles that are up to date

    @classmethod
    def load(
        cls,
        *,
        large_ins: Path | str,
        small_base: Path | str,
        small_cpt: Path | str | None = None,
        small_cpt_lora: Path | str | None = None,
        per_role: dict[str, dict[str, Any]] | None = None,
        chat_template: str | None = None,
        **options: Any,
    ) -> "Trio":
        """Open three GGUF files; `options` go to every Model, `per_role[role]` to one.

        Without `small_cpt`, `small_cpt_lora` is applied over small_base, whose weights the two
        then share. `chat_template` stands for that of large_ins' file. `n_gpu_layers` "auto" leaves
        layers and device to the planner. Raises ModelFileError, VocabularyMismatch,
        MemoryNeededError.
        """
        if small_cpt is None and small_cpt_lora is None:
            raise ModelFileError("small_cpt is missing; give its GGUF, or an adapter of small_base")
        paths = {
            "large_ins": Path(large_ins),
            "small_cpt": Path(small_cpt or small_base),
            "small_base": Path(small_base),
        }
        files = {role: read_gguf(path) for role, path in paths.items()}
        check_contract(files)
        adapter = read_gguf(Path(small_cpt_lora)) if small_cpt_lora else None
        asked = {role: {**options, **(per_role or {}).get(role, {})} for role in ROLES}
        own = place(files, asked, adapter)
        check_fits(files, own, adapter)
        models: dict[str, Model] = {}
        for role in ("large_ins", "small_base", "small_cpt"):
            share = next((m for m in models.values() if m.path == paths[role]), None)
            lora = small_cpt_lora if role == "small_cpt" else None
            tokenizer = role == ROLES[0]  # large_ins' serves all three
            models[role] = Model(
                paths[role], lora=lora, share=share, tokenizer=tokenizer, **own[role]
            )
        if chat_template is not None:
            models["large_ins"].chat_template = chat_template
        return cls(**models)

    @classmethod
    def nano(cls, **options: Any) -> "Trio":
        """The small Kazakh trio that ships with the package: for a first try and for tests."""
        arguments: dict[str, Any] = {**trio_paths(NANO), "n_ctx": 512, **options}
        return cls.load(**arguments)

    # -- facts ------------------------------------------------------------------------------

    @property
    def n_ctx(self) -> int:
        return min(m.n_ctx for m in self.models.values())

    @property
    def n_past(self) -> int:
        """Tokens of large_ins so far, read or owed."""
        return len(self._ids["large_ins"])

    @property
    def room(self) -> int:
        """Tokens that every role can still take."""
        return min(self.models[r].n_ctx - len(self._ids[r]) for r in ROLES)

    @cached_property
    def unused(self) -> NDArray[np.bool_] | None:
        """bool [n_vocab]: ids that no mix may pick; None where there are none."""
        mask = self.models["large_ins"].unused()[: self.n_vocab]
        return mask if mask.any() else None

    @cached_property
    def end_of_generation(self) -> frozenset[int]:
        """The union of the three models' own."""
        distinct = {m.path: m for m in self.models.values()}.values()
        return frozenset().union(*(m.end_of_generation() for m in distinct))

    def prompt(
        self, text: str, *, special: bool = False, spans: tuple[str, str] | None = None
    ) -> Prompt:
        """Plain text -> Prompt, by large_ins' tokenizer."""
        model = self.models["large_ins"]
        text = model.normalize(text)
        return text_prompt(
            text,
            lambda t: model.tokenize(t, special=special),
            lambda i: model.piece(i, special=special),
            bos=model.bos,
            spans=spans,
        )

    # -- reading ----------------------------------------------------------------------------

    def prefill(
        self,
        prompt: Prompt,
        *,
        consume: Consume | None = None,
        progress: Progress | None = None,
        after: Mark | None = None,
    ) -> None:
        """Replace what the caches hold by `prompt`; of what they hold, its beginning is kept.

        `consume(rows, targets)` is called for every scored token that some row predicts, with
        rows [n ≤ n_window, n_vocab] that are valid during the call alone: memory does not grow
        with the prompt. During the call `mark` says how far it has come; a later prefill of a
        prompt with the same beginning may go on `after` that mark, and over what is not scored
        and still held. Without `consume` nothing is decoded until rows() asks for it, and then
        by the roles asked for alone. Raises PromptError, ModelError.
        """
        for role, model in self.models.items():
            if prompt.n_tokens(role) >= model.n_ctx:
                raise PromptError(
                    f"the prompt is {prompt.n_tokens(role)} tokens, and {role}'s context holds "
                    f"{model.n_ctx}; shorten it or raise --n-ctx"
                )
        units = prompt.units
        read = covered = kept = self.n_kept(units)
        if consume is not None:
            read, covered = after or (0, 0)
            # Up to the next segment to score, what the caches hold need not be read again.
            read = max(read, min(kept, _next_scored(prompt, covered)))
        with self._atomic():
            self._rewind(*(sum(len(ids[i]) for ids, _ in units[:read]) for i in range(len(ROLES))))
            start = 0  # units before the segment
            for segment in prompt.segments:
                n_units, skip = len(segment.units), max(0, read - start)
                if skip < n_units and consume is not None and segment.scored:
                    self._score(segment, consume, progress, start, skip, covered)
                elif skip < n_units:
                    self._owe(segment, skip)
                start += n_units
            if consume is not None:  # a window's rows are the most memory beside the weights
                self._rows = {role: row.copy() for role, row in self._rows.items()}
                for model in self.models.values():
                    model.drop_rows()

    def n_kept(self, units: Sequence[Unit]) -> int:
        """How many of a prompt's first units the caches hold, or are owed, already."""
        return n_common(units, self._ids)

    def advance(self, token: int) -> None:
        """Append one token to every role; it is decoded when a row is asked for."""
        for role in ROLES:
            self._ids[role].append(token)
        self._rows = {}

    def rows(self, roles: Sequence[str] = ROLES, progress: Progress | None = None) -> Rows:
        """Next-token logits [n_vocab] of `roles`, after all tokens so far.

        Zero-copy: valid until the next call that reads. A role that owes tokens reads them now.
        """
        owing = [role for role in roles if role not in self._rows]
        with self._atomic():
            self._rows |= self.on_devices(owing, lambda role: self._catch_up(role, progress))
        return {role: self._rows[role] for role in roles}

    def tail_rows(self, roles: Sequence[str], n: int) -> Rows:
        """Logits [n, n_vocab] of `roles` after each of the last `n` ≤ n_window tokens.

        One batch a role, zero-copy: valid until the next call that reads that role.
        """
        if n == 1:
            return {role: row[None, :] for role, row in self.rows(roles).items()}
        with self._atomic():
            tails = self.on_devices(roles, lambda role: self._read_tail(role, n))
        self._rows |= {role: tails[role][-1] for role in roles}
        return tails

    def rewind(self, n: int) -> None:
        """Forget the last `n` shared tokens."""
        self._rewind(*(len(self._ids[r]) - n for r in ROLES))

    def forget(self) -> None:
        """Empty the three caches."""
        self._rewind(0)

    def forget_rows(self) -> None:
        """The models' buffers are about to be, or were, written by others."""
        self._rows = {}

    @property
    def ids(self) -> dict[str, list[int]]:
        """What each role has read or owes."""
        return {role: list(ids) for role, ids in self._ids.items()}

    @ids.setter
    def ids(self, ids: dict[str, list[int]]) -> None:
        """To be kept with caches that hold no more than this; for those who load them."""
        self._ids = {role: list(ids[role]) for role in ROLES}
        self._rows = {}

    def close(self) -> None:
        for model in self.models.values():
            model.close()

    def __enter__(self) -> "Trio":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- the invariant's keepers ------------------------------------------------------------

    @contextmanager
    def _atomic(self) -> Iterator[None]:
        """On any failure, Ctrl-C included, empty the three caches: they agree on that."""
        try:
            yield
        except BaseException:
            self._rewind(0)
            for model in self.models.values():
                model.rewind(0)  # whatever Ctrl-C kept it from counting
            raise

    def _rewind(self, *lengths: int) -> None:
        self._rows = {}
        for role, n in zip(ROLES, lengths if len(lengths) == 3 else lengths * 3, strict=True):
            del self._ids[role][max(n, 0) :]
            model = self.models[role]
            if model.n_past > n:
                model.rewind(max(n, 0))

    def _catch_up(self, role: str, progress: Progress | None = None) -> NDArray[np.float32]:
        """Decode what `role` owes; its last row [n_vocab]."""
        model, ids = self.models[role], self._ids[role]
        if not ids:
            raise PromptError(f"{role} has nothing to continue; give a prompt")
        if model.n_past >= len(ids):  # its row was overwritten: the last token is read again
            model.rewind(len(ids) - 1)
        for start in range(model.n_past, len(ids), model.n_batch):
            window = ids[start : start + model.n_batch]
            row = model.decode(window)
            if progress is not None and role == ROLES[0]:
                progress(len(window))
        return row[-1, : self.n_vocab]

    def _read_tail(self, role: str, n: int) -> NDArray[np.float32]:
        model, ids = self.models[role], self._ids[role]
        first = len(ids) - n
        if model.n_past > first:
            model.rewind(first)
        for start in range(model.n_past, first, model.n_batch):
            model.decode(ids[start : min(start + model.n_batch, first)])
        return model.decode(ids[first:], every_row=True)[:, : self.n_vocab]

    def on_devices(self, roles: Sequence[str], read: Callable[[str], NDArray[np.float32]]) -> Rows:
        """`read(role)` for each role: at the same time on different devices, in turn on one."""
        groups: dict[str, list[str]] = {}
        for role in roles:
            groups.setdefault(self.models[role].device, []).append(role)

        def run(group: list[str]) -> Rows:
            return {role: read(role) for role in group}

        if len(groups) < 2:
            return run(list(roles))
        parts = run_all(self._pool, run, groups.values())
        return {role: row for part in parts for role, row in part.items()}

    def _owe(self, segment: Segment, skip: int) -> None:
        """Append a segment that is not scored; it is decoded when a row is asked for."""
        for role in ROLES:
            self._ids[role] += segment.ids[role][skip:] if segment.shared else segment.ids[role]
        self._rows = {}

    def _score(
        self,
        segment: Segment,
        consume: Consume,
        progress: Progress | None,
        start: int,
        skip: int,
        covered: int,
    ) -> None:
        """Decode a shared segment window by window, handing each predicted token to `consume`.

        `start` units lie before it, `skip` of its tokens are read, `covered` units consumed.
        """
        ids = np.asarray(segment.ids["large_ins"], dtype=np.int64)
        if covered <= start + skip:  # the rows before it predict the first token to be read
            before = {r: self._catch_up(r, progress)[None, :] for r in ROLES if self._ids[r]}
            if len(before) == len(ROLES):
                self.mark = (start + skip, start + skip + 1)
                consume(before, ids[skip : skip + 1])
        for at in range(skip, len(ids), self.n_window):
            window = ids[at : at + self.n_window].tolist()
            rows = {
                role: self.models[role].decode(window, every_row=True)[:, : self.n_vocab]
                for role in ROLES
            }
            for role in ROLES:
                self._ids[role] += window
            targets = ids[at + 1 : at + 1 + len(window)]
            if len(targets):
                self.mark = (start + at + len(window), start + at + 1 + len(targets))
                consume({r: rows[r][: len(targets)] for r in ROLES}, targets)
            self._rows = {role: rows[role][-1] for role in ROLES}
            if progress is not None:
                progress(len(window))


def _next_scored(prompt: Prompt, covered: int) -> int:
    """Units before the first segment that has something to score beyond the `covered` ones."""
    start = 0
    for segment in prompt.segments:
        n_units = len(segment.units)
        if segment.scored and start + n_units > covered:
            break
        start += n_units
    return start


def concurrency(devices: Mapping[str, str]) -> str:
    """In words, how models on these devices (by role) are decoded for one token."""
    if len(set(devices.values())) < 2:
        return f"in turn, on {next(iter(devices.values()))}"
    return "at once, " + ", ".join(f"{role} on {name}" for role, name in devices.items())


def trio_paths(folder: Path) -> dict[str, Path]:
    """The three GGUF files of a folder, named after their roles."""
    paths = {role: folder / f"{role}.gguf" for role in ROLES}
    for path in paths.values():
        if not path.is_file():
            names = ", ".join(p.name for p in paths.values())
            raise ModelFileError(f"{path}: no such file; a trio folder holds {names}")
    return paths

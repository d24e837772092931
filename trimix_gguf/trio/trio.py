"""Trio: three Models kept on the same segments, and the rows that predict their next token."""

import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Unpack

import numpy as np
from numpy.typing import NDArray

from trimix_gguf.errors import ModelFileError
from trimix_gguf.machine import file_trial
from trimix_gguf.machine.file_trial import FileTrial
from trimix_gguf.machine.gguf_file import read_gguf
from trimix_gguf.machine.loading import Loading, LoadingOptions
from trimix_gguf.machine.memory import Models, check_fits
from trimix_gguf.machine.planner import place
from trimix_gguf.machine.sharing import Options, shared_roles
from trimix_gguf.machine.vocabulary import check_contract
from trimix_gguf.mixing.fusion import Rows
from trimix_gguf.mixing.masks import TokenTree
from trimix_gguf.roles import LOADING_ORDER, ROLES, Role
from trimix_gguf.trio.model import Model
from trimix_gguf.trio.prefill import Prefill, PromptMark, StandFor, Window, count_ids
from trimix_gguf.trio.prompt import Prompt, Unit, left_out, n_common, text_prompt
from trimix_gguf.trio.sequences import Sequences, TokenProgress
from trimix_gguf.trio.strand import Strand
from trimix_gguf.trio.sums import PrefixSums
from trimix_gguf.trio.tuned import Tuning

Consume = Callable[[Window], None]

NANO = Path(__file__).parent.parent / "nano"  # the Kazakh trio that ships with the package


class Trio(Strand):
    """large_ins, small_cpt and small_base on one prompt, which is sequence 0 of `sequences`.

    Invariant: after every public call, failed ones included, the three follow one list of
    segments. A role that a mix leaves out is not decoded; it stays behind by shared tokens,
    which it reads in windows the next time its row is wanted.
    """

    def __init__(self, *, large_ins: Model, small_cpt: Model, small_base: Model) -> None:
        models = dict(zip(ROLES, (large_ins, small_cpt, small_base), strict=True))
        self.n_vocab = check_contract({r: m.file for r, m in models.items()})
        super().__init__(models, Sequences(models, self.n_vocab), 0)
        self.sums: PrefixSums | None = None  # over the prompt in the caches, for who scored it
        self.tuning: Tuning | None = None  # what `trimix tune` found out about these models
        self.asked: Mapping[Role, LoadingOptions] = {}  # by role, before layers were placed

    @classmethod
    def load(
        cls,
        *,
        large_ins: Path | str,
        small_base: Path | str,
        small_cpt: Path | str | None = None,
        small_cpt_lora: Path | str | None = None,
        per_role: Mapping[Role, LoadingOptions] | None = None,
        chat_template: str | None = None,
        tuning: Tuning | None = None,
        beside: "Trio | None" = None,
        **options: Unpack[LoadingOptions],
    ) -> "Trio":
        """Open three GGUF files; `options` are fields of Loading, `per_role[role]` those of one.

        Without `small_cpt`, `small_cpt_lora` is applied over small_base, whose weights the two
        then share. `chat_template` stands for that of large_ins' file. `n_gpu_layers` "auto" leaves
        layers and device to the planner. Models that the open trio `beside` loads alike are not
        loaded again: the two share their weights, and each has its own caches. Raises
        ModelFileError, VocabularyMismatch, MemoryNeededError.
        """
        if small_cpt is None and small_cpt_lora is None:
            raise ModelFileError("small_cpt is missing; give its GGUF, or an adapter of small_base")
        paths: dict[Role, Path] = {
            "large_ins": Path(large_ins),
            "small_cpt": Path(small_cpt or small_base),
            "small_base": Path(small_base),
        }
        given = per_role or {}
        asked: dict[Role, LoadingOptions] = {r: {**options, **given.get(r, {})} for r in ROLES}
        known = {} if beside is None else beside.shared(paths, asked)
        paths |= {role: model.path for role, model in known.items()}
        if small_cpt is None:
            paths["small_cpt"] = paths["small_base"]
        files = {role: read_gguf(path) for role, path in paths.items()}
        check_contract(files)
        adapter = read_gguf(Path(small_cpt_lora)) if small_cpt_lora else None
        wanted: dict[Role, LoadingOptions] = {
            r: {**asked[r], **_as_placed(known.get(r))} for r in ROLES
        }
        present = frozenset(model.path for model in known.values())
        placed = place(files, wanted, adapter, present)
        loadings = {r: Loading(**one) for r, one in placed.items()}
        check_fits(Models(files, loadings, adapter, present))
        file_trial.require(_trials(paths, loadings, small_cpt_lora))
        models = _open_models(paths, loadings, small_cpt_lora, known)
        if chat_template is not None:
            models["large_ins"].chat_template = chat_template
        trio = cls(**models)
        trio.tuning, trio.asked = tuning, asked
        return trio

    def shared(self, paths: Mapping[Role, Path], asked: Options) -> dict[Role, Model]:
        """The models here that another trio's roles would load alike, if it were loaded now.

        A file that was written again since it was loaded is another. Raises ModelFileError.
        """
        own = {role: model.path for role, model in self.models.items()}
        still = [role for role, model in self.models.items() if model.is_on_disk]
        try:
            roles = shared_roles(paths, asked, own, self.asked, among=still)
        except OSError as error:
            raise ModelFileError(f"{error.filename}: {error.strerror}") from None
        return {role: self.models[role] for role in roles}

    @classmethod
    def nano(cls, **options: Any) -> "Trio":
        """The small Kazakh trio that ships with the package: for a first try and for tests."""
        table = tomllib.loads((NANO / "trio.toml").read_text(encoding="utf-8"))
        tuning = Tuning.from_table(table["tuning"]) if "tuning" in table else None
        paths = {str(role): path for role, path in trio_paths(NANO).items()}
        return cls.load(**{**paths, "n_ctx": 512, "tuning": tuning, **options})

    # -- facts ------------------------------------------------------------------------------

    @property
    def n_ctx(self) -> int:
        """Positions of the smallest of the three contexts."""
        return min(m.n_ctx for m in self.models.values())

    @property
    def n_past(self) -> int:
        """Tokens of large_ins so far, read or owed."""
        return len(self._ids["large_ins"])

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

    @cached_property
    def token_tree(self) -> TokenTree:
        """The tokens as JSON schemas need them; those that no text has are empty."""
        none = np.zeros(self.n_vocab, dtype=np.bool_) if self.unused is None else self.unused
        piece = self.models["large_ins"].piece
        never = {*np.flatnonzero(none).tolist(), *self.end_of_generation}
        return TokenTree([b"" if i in never else piece(i) for i in range(self.n_vocab)])

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

    def text(self, ids: Sequence[int]) -> str:
        """The text of token ids, by large_ins' pieces."""
        piece = self.models["large_ins"].piece
        return b"".join(map(piece, ids)).decode("utf-8", "replace")

    # -- reading ----------------------------------------------------------------------------

    def prefill(
        self,
        prompt: Prompt,
        *,
        consume: Consume | None = None,
        progress: TokenProgress | None = None,
        after: PromptMark | None = None,
        stand_for: StandFor | None = None,
    ) -> None:
        """Replace what the caches hold by `prompt`; of what they hold, its prefix is kept.

        `consume(window)` is called for every scored token that some row predicts, with n ≤ n_window
        rows that are valid during the call only: memory does not grow with the prompt. A later
        prefill of a prompt with the same prefix may go on `after` a window's mark. `stand_for`
        leaves some of the scored tokens out (see Prefill). Without
        `consume` nothing is decoded until rows() asks for it, and then by the roles asked for
        only. Raises PromptError, ModelError.
        """
        reading = Prefill(prompt, stand_for=stand_for, to_end=False)
        n_ctx = {role: model.n_ctx for role, model in self.models.items()}
        reading.check_fits(n_ctx, self.n_vocab)
        kept = self.n_kept(reading.units)
        if consume is None:
            reading.at = kept
        else:
            reading.start(max(kept, after[0] if after else 0), after[1] if after else 0)
        with self._atomic():
            self._rewind(reading.lengths())
            rows: Rows = {}
            while consume is not None and reading.at < reading.stop:
                window, rows = self._read_window(reading, progress)
                if len(window.targets):
                    consume(window)
            if reading.at < len(reading.units):
                self.sequences.append(0, reading.ids(reading.at, len(reading.units)))
            else:  # Copy: a window's rows, dropped below, are the most memory beside the weights.
                self._rows = {role: matrix[-1].copy() for role, matrix in rows.items()}
            for model in self.models.values() if rows else ():
                model.drop_rows()

    def _read_window(self, reading: Prefill, progress: TokenProgress | None) -> tuple[Window, Rows]:
        n_batch = min(model.n_batch for model in self.models.values())
        end = reading.portion(n_batch, self.n_window)
        self.sequences.append(0, reading.ids(reading.at, end))
        wanted = {role: {0: reading.wanted(end, role)} for role in ROLES}
        rows = self.sequences.read(wanted, progress)
        return reading.take(end, rows), rows

    def n_kept(self, units: Sequence[Unit]) -> int:
        """How many of a prompt's first units the caches hold, or are owed, already."""
        return n_common(units, self._ids)

    def shift(self, old: Sequence[Unit], new: Sequence[Unit]) -> bool:
        """Take out of the caches what a prompt of units `new` leaves out of `old`.

        What stands after it is not read again: it moves up, and still holds what it took from
        what is left out, so the rows are no longer exactly those of `new`. False, and all is as
        before, where the caches hold nothing after it, or a model cannot shift.
        """
        found, n_kept = left_out(old, new), self.n_kept(old)
        if found is None or n_kept <= found[1]:
            return False
        start, end = found
        ends = {role: count_ids(old, i) for i, role in enumerate(ROLES)}
        self._rows = {}
        with self._atomic():
            moved = self.sequences.shift(0, {r: (ends[r][start], ends[r][end]) for r in ROLES})
        if moved and self.sums is not None:
            self.sums = self.sums.for_prompt(old, self.sums.points, n_kept).without(start, end)
        return moved

    def forget(self) -> None:
        """Empty the three caches."""
        self._rewind(dict.fromkeys(ROLES, 0))

    def forget_rows(self) -> None:
        """The models' buffers are about to be, or were, written for other sequences."""
        self._rows = {}

    def hold(self, ids: Mapping[Role, Sequence[int]]) -> None:
        """Say what was read or is owed, where the caches were loaded and hold no more than this."""
        self.sequences.replace_ids(ids)
        self._rows = {}

    @contextmanager
    def forks(self, roles: Sequence[Role] = ROLES) -> Iterator[Sequences]:
        """Within it, texts may fork from what the trio holds; they are dropped at its end.

        `roles` read what they owe first: forks share what was read. Meanwhile the trio may read
        on and be rewound, and afterwards holds what it was left with.
        """
        self.rows([r for r in roles if self.sequences.n_read(0, r) < len(self._ids[r])])
        self._rows = {}  # forks write where they are
        try:
            yield self.sequences
        finally:
            self.sequences.drop_forks()
            self._rows = {}

    def close(self) -> None:
        """Free the three models."""
        self._rows = {}
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
            self.forget()
            for model in self.models.values():
                model.rewind(0)  # it may hold ids that Ctrl-C kept it from counting
            raise

    def _rewind(self, lengths: Mapping[Role, int]) -> None:
        self._rows, self.n_texts = {}, self.n_texts + 1
        self.sequences.rewind(0, lengths)

    def _read_tail(
        self, roles: Sequence[Role], n: int, progress: TokenProgress | None = None
    ) -> Rows:
        with self._atomic():
            return super()._read_tail(roles, n, progress)


def _as_placed(model: Model | None) -> LoadingOptions:
    """Where a model's layers are, for one that shares its weights."""
    if model is None:
        return {}
    at = model.loading
    return {
        "n_gpu_layers": at.n_gpu_layers,
        "device": at.device,
        "split": at.split,
        "keep_output": at.keep_output,
    }


def _open_models(
    paths: Mapping[Role, Path],
    loadings: Mapping[Role, Loading],
    lora: Path | str | None,
    known: Mapping[Role, Model],
) -> dict[Role, Model]:
    """A model for each role; it shares the weights of a known one, or of a role with its file."""
    models: dict[Role, Model] = {}
    for role in LOADING_ORDER:
        same = next((m for m in models.values() if m.path == paths[role]), None)
        models[role] = Model(
            paths[role],
            loadings[role],
            lora=lora if role == "small_cpt" else None,
            share=known.get(role, same),
            tokenizer=role == ROLES[0],  # large_ins' serves all three
        )
    return models


def _trials(
    paths: Mapping[Role, Path], loadings: Mapping[Role, Loading], lora: Path | str | None
) -> Iterator[FileTrial]:
    """The files as they are about to be opened; one child tries them all."""
    for role in LOADING_ORDER:
        tokenizer = role == ROLES[0]
        yield FileTrial(paths[role], loadings[role], tokenizer=tokenizer)
        if lora is not None and role == "small_cpt":
            yield FileTrial(paths[role], loadings[role], lora=Path(lora), tokenizer=tokenizer)


def concurrency(devices: Mapping[Role, str]) -> str:
    """In words, how models on these devices (by role) are decoded for one token."""
    if len(set(devices.values())) < 2:
        return f"in turn, on {next(iter(devices.values()))}"
    return "at once, " + ", ".join(f"{role} on {name}" for role, name in devices.items())


def trio_paths(folder: Path) -> dict[Role, Path]:
    """The three GGUF files of a folder, named after their roles."""
    paths = {role: folder / f"{role}.gguf" for role in ROLES}
    for role, path in paths.items():
        split = sorted(folder.glob(f"{role}-00001-of-*.gguf"))
        if split and not path.is_file():
            paths[role] = split[0]
    for path in paths.values():
        if not path.is_file():
            names = ", ".join(p.name for p in paths.values())
            raise ModelFileError(f"{path}: no such file; a trio folder holds {names}")
    return paths

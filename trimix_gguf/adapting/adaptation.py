"""The whole way: raw text -> a taught small_cpt -> a trio in the store, and what it is worth."""

from __future__ import annotations

import random
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trimix_gguf.adapting import outlook, publishing, teaching, training
from trimix_gguf.adapting.asked import Asked, Shown
from trimix_gguf.adapting.bases import (
    ENGLISH,
    Base,
    Tokenizer,
    check_alike,
    find_base,
    load_base,
)
from trimix_gguf.adapting.candidates import choose
from trimix_gguf.adapting.chat_vector import add_chat_vector, find_instruct
from trimix_gguf.adapting.documents import list_texts
from trimix_gguf.adapting.extras import is_here, need
from trimix_gguf.adapting.history import History
from trimix_gguf.adapting.judging import Judge
from trimix_gguf.adapting.measuring import tokens_per_second
from trimix_gguf.adapting.outlook import Outlook, Way, look_ahead
from trimix_gguf.adapting.partner import Partner
from trimix_gguf.adapting.preparing import HELD_OUT, LEARNED, Wanted, prepare
from trimix_gguf.adapting.questions import Question, questions_of
from trimix_gguf.adapting.recipe import Recipe
from trimix_gguf.adapting.report import Report
from trimix_gguf.adapting.rows import Rows, count_tokens, measured_rows, write_rows
from trimix_gguf.adapting.taught import add_adapter, faster_dtype, make_taught, products_per_second
from trimix_gguf.adapting.together import Together
from trimix_gguf.adapting.workplace import DECIDED, REPORT, Workplace
from trimix_gguf.errors import DataError, VocabularyMismatch
from trimix_gguf.machine.files import whole_file
from trimix_gguf.machine.gguf_file import read_gguf
from trimix_gguf.machine.vocabulary import check_contract
from trimix_gguf.trios.store import resolve
from trimix_gguf.trios.triofile import TrioFile

N_LOOKS = 6  # measurements on the way, or more in a long run
# Learning rates for a model as wide as WIDTH; a narrower one takes, and needs, larger steps.
FULL_RATE, ADAPTER_RATE, WIDTH = 1e-4, 5e-4, 896


@dataclass(frozen=True)
class Adapted:
    """What came of it; `trio` is None after a dry run, and where only a file was asked for."""

    report: Report
    outlook: Outlook
    history: History | None = None
    trio: TrioFile | None = None


def adapt(
    asked: Asked,
    work: Workplace,
    shown: Shown,
    *,
    dry_run: bool = False,
    together: Together = Together(),  # noqa: B008  # frozen
) -> Adapted | None:
    """Make a trio of that name from text; with `dry_run`, only say what it would take.

    A run that was stopped goes on from `work`. Of several processes, `together`, the first makes
    it; others return None. Raises TrimixError; training.Stopped after Ctrl-C.
    """
    if together.is_first:
        asked.check_free(work.folder)
    else:
        shown = Shown.nothing()
    with work.held() if together.is_first else nullcontext():
        with together.first_before_others():
            if together.is_first:
                work.check_asked(asked.settings(), asked.files())
            trio = resolve(asked.trio)
            trio.check_files()
            base = find_base(trio, asked.base, work.folder, alone=asked.output is not None)
            run = _Run(asked, work, shown, trio, base, Tokenizer(base), together)
            run.check_wishes()
            report = run.prepare()
            for line in report.lines():
                shown.say(line)
            ahead = run.look_ahead(report)
            if not dry_run:
                ahead.check()
        return Adapted(report, ahead) if dry_run else run.make(report, ahead)


class _Run:
    """The steps of one run, each of which keeps in the workplace what it found."""

    def __init__(
        self,
        asked: Asked,
        work: Workplace,
        shown: Shown,
        trio: TrioFile,
        base: Base,
        tokenizer: Tokenizer,
        together: Together,
    ) -> None:
        self.asked, self.work, self.shown, self.together = asked, work, shown, together
        self.trio, self.base, self.tokenizer = trio, base, tokenizer
        self.folder = work.folder
        self.instruct: Base | None = None
        self.pairs: list[teaching.Pair] = []

    def check_wishes(self) -> None:
        """Read --pairs, find the model of --instruct, and say what must be a whole model.

        Before anything long: once training is begun, no file may be repaired.
        """
        asked, given = self.asked, self.asked.instruct
        if asked.pairs is not None:
            self.pairs = teaching.read_pairs(asked.pairs, asked.keep_out, self.shown.say)
        if given is not None:
            self.instruct = find_instruct(given, self.base, self.folder)
        if self.asked.train_embeddings and self.base.is_tied:
            self.shown.say(
                f"{self.base.gguf.name} has one matrix for embeddings and output, which no adapter "
                "of llama.cpp changes: the result is a whole model, of about "
                f"{self.base.file.n_weights * 34 / 32 / outlook.GIB:.1f} GiB"
            )

    @property
    def _is_whole(self) -> bool:
        """Whether small_cpt cannot be an adapter."""
        tied = self.asked.train_embeddings and self.base.is_tied
        return self.asked.full or self.instruct is not None or tied

    # -- text -----------------------------------------------------------------------------------

    def prepare(self) -> Report:
        """Clean the text, and the replay beside it."""
        return Report.from_json(self.work.once(REPORT, self._prepare))

    def _prepare(self) -> dict[str, Any]:
        asked = self.asked
        # Both first, so that none is read for nothing.
        texts, replay = list_texts(asked.texts), list_texts(asked.replay)
        wanted = Wanted(asked.script, asked.keep_out)
        report = prepare(texts, self.folder, wanted, self.shown.read)
        if replay:
            self._replay.mkdir(exist_ok=True)
            try:
                prepare(replay, self._replay, Wanted(None, asked.keep_out), self.shown.read)
            except DataError as error:
                raise DataError(f"--replay: {error}") from None
        learned = teaching.Texts(self.folder / LEARNED)
        held = teaching.Texts(self.folder / HELD_OUT)
        for part, kept in ((report.learned, learned), (report.heldout, held)):
            part.n_tokens = count_tokens(kept, self.tokenizer, part.n_characters)
        report.english_tokens_per_character = len(self.tokenizer.ids(ENGLISH)) / len(ENGLISH)
        return report.to_json()

    @property
    def _replay(self) -> Path:
        return self.folder / "replay"

    def _texts(self, name: str, replay: bool = False) -> Sequence[str]:
        if replay and not self.asked.replay:
            return ()
        return teaching.Texts((self._replay if replay else self.folder) / name)

    # -- what it takes --------------------------------------------------------------------------

    def n_tokens(self, report: Report, speed: float) -> int:
        """How many to learn from: as asked, or EPOCHS times the text."""
        if self.asked.tokens is not None:
            return self.asked.tokens
        if self.asked.minutes is not None:  # the speed is that of all processes
            return int(self.asked.minutes * 60 * speed)
        return outlook.EPOCHS * report.learned.n_tokens

    def look_ahead(self, report: Report) -> Outlook:
        """Estimate the run, and say it."""
        dtype = self._dtype() if is_here("torch") else "float32"
        together, way = self.together, self._way(dtype)
        products = self._products()[dtype] if is_here("torch") else None
        speed = outlook.guessed_speed(self.base, way, products)
        ahead = look_ahead(
            self.base,
            self.folder,
            way,
            n_tokens=self.n_tokens(report, speed),
            n_characters=report.learned.n_characters,
            n_processes=together.size,
            tokens_per_second=speed,
        )
        epochs = ahead.n_tokens / max(report.learned.n_tokens, 1)
        self.shown.say(f"enough?   {outlook.suffices(report.learned.n_tokens)}")
        for line in ahead.lines():
            self.shown.say(line)
        self.shown.say(f"epochs    {epochs:.1f} times the text, if it were all that is read")
        return ahead

    # -- training -------------------------------------------------------------------------------

    def make(self, report: Report, ahead: Outlook) -> Adapted | None:
        """Train, choose, write the trio; None in a process that only helps."""
        together, dtype = self.together, self._dtype()
        judge = self._judge() if together.is_first else None  # first: both need much memory
        model = self._model(dtype)
        with together.first_before_others():
            decided = self.work.once(DECIDED, lambda: self._decide(model, dtype, report))
            decided = {"rows_per_step": 4} | decided  # as in runs of earlier versions
            together.check_begun_by(decided.get("n_processes"), self.folder)
            rows = Rows.load(self.folder) or self._rows(decided)
        taught = make_taught(model, rows)
        recipe = Recipe(
            n_steps=decided["n_steps"],
            learning_rate=self._rate(),
            dtype=dtype,
            rows_per_step=decided["rows_per_step"],
            rows_at_once=decided["n_rows"],
            seed=self.asked.seed,
            n_warm_up=max(1, min(50, decided["n_steps"] // 20)),
            steps_between_looks=min(100, -(-decided["n_steps"] // N_LOOKS)),
            n_processes=together.size,
        )
        shown, folder = self.shown, self.folder
        history = training.train(
            taught, rows, recipe, judge, folder, show=shown.step, say=shown.say, together=together
        )
        together.leave()
        if judge is None:
            return None
        choose(taught, judge, history, self.folder, dtype, self.shown.say)
        n_tokens = decided["n_steps"] * decided["rows_per_step"] * self.base.n_block
        return Adapted(report, ahead, history, self._publish(model, n_tokens, judge))

    def _judge(self) -> Judge:
        held, english = self._texts(HELD_OUT), self._texts(HELD_OUT, True)
        n_ctx = self.base.file.n_ctx_train
        questions = questions_of(held, self.tokenizer, n_ctx, self.asked.seed)
        if not questions:
            self.shown.say("the held-out text is too short for exercises: perplexity decides")
        partner = self._partner(questions) if questions else None
        return Judge.make(held, english, self.tokenizer, self.base, questions, partner)

    def _partner(self, questions: Sequence[Question]) -> Partner | None:
        """Have large_ins answer; None where it has another vocabulary."""
        large_ins = self.trio.path("large_ins")
        try:
            check_contract({"large_ins": read_gguf(large_ins), "small_base": self.base.file})
        except VocabularyMismatch:
            return None
        partner, n = Partner(self.folder, questions), len(questions)
        partner.read_large_ins(large_ins, lambda at: self.shown.read(f"large_ins, of {n}", at))
        alone = partner.alone()
        self.shown.say(
            f"large_ins gives the right answers of {n} exercises {sum(alone) / n:.0%}; its mix "
            "with the model in training is measured on the way "
            f"({partner.n_bytes / 2**20:.0f} MiB of disk)"
        )
        return partner

    def _way(self, dtype: str) -> Way:
        asked = self.asked
        size = 4 if dtype == "float32" else 2
        return Way(size, asked.rank, full=asked.full, embeddings=asked.train_embeddings)

    def _dtype(self) -> str:
        """The faster one here."""
        return faster_dtype(self._products())

    def _products(self) -> dict[str, float]:
        """How fast this machine multiplies, measured once."""
        file = self.base.file
        n_ff = int(file.metadata.get(f"{file.architecture}.feed_forward_length", file.n_embd))
        found: dict[str, float] = self.work.once(
            "products.json", lambda: products_per_second(file.n_embd, n_ff)
        )
        return found

    def _model(self, dtype: str) -> Any:
        """The base, with pairs of the same random numbers each time."""
        need("peft")  # before the long work of loading
        self.shown.say(f"loading {(self.base.folder or self.base.gguf).name}, {dtype}")
        model = load_base(self.base, "float32" if self.asked.full else dtype)
        need("torch").manual_seed(self.asked.seed)
        if self.asked.full:
            return model
        return add_adapter(model, self.asked.rank, embeddings=self.asked.train_embeddings)

    def _rate(self) -> float:
        if self.asked.learning_rate is not None:
            return self.asked.learning_rate
        rate = FULL_RATE if self.asked.full else ADAPTER_RATE
        return rate * WIDTH / self.base.file.n_embd

    def _decide(self, model: Any, dtype: str, report: Report) -> dict[str, Any]:
        """What is measured or drawn once, and stays so when the run goes on."""
        # What could be said at the end only, or never, is found out before the training.
        check_alike(model, self.base, self.tokenizer, dtype)
        publishing.try_out(model, self.folder, whole=self._is_whole)
        learned, n_block = self._texts(LEARNED), self.base.n_block
        n_rows = outlook.rows_at_once(self.base, self._way(dtype))
        texts = [learned[at] for at in range(min(20, len(learned)))]
        few = measured_rows(texts, self.tokenizer, n_rows=n_rows, n_block=n_block)
        speed = self.together.size * tokens_per_second(model, few, dtype)
        n_tokens = self.n_tokens(report, speed)
        rows_per_step = outlook.rows_per_step(n_tokens, n_block, self.together.size)
        n_steps = max(1, n_tokens // (rows_per_step * n_block))
        left = outlook.in_words(n_steps * rows_per_step * n_block / speed)
        self.shown.say(
            f"measured: {speed:.0f} tokens/s; {n_steps} steps take about {left}, and the "
            "measurements on the way come on top"
        )
        return {
            "n_steps": n_steps,
            "rows_per_step": rows_per_step,
            "n_rows": min(n_rows, rows_per_step // self.together.size),
            "n_processes": self.together.size,
            "tokens_per_second": round(speed, 1),
        }

    def _rows(self, decided: dict[str, Any]) -> Rows:
        asked, learned = self.asked, self._texts(LEARNED)
        replay = self._texts(LEARNED, True)
        shares = teaching.shares_of(
            pairs=bool(self.pairs), replay=bool(replay), exercises=asked.exercises, text=learned
        )
        mix = ", ".join(f"{kind} {share:.0%}" for kind, share in shares.items())
        self.shown.say(f"the mix: {mix}")
        documents = teaching.teach(learned, replay, self.pairs, shares, random.Random(asked.seed))
        n_rows = decided["n_steps"] * decided["rows_per_step"]
        return write_rows(
            documents, self.tokenizer, self.folder, n_rows=n_rows, n_block=self.base.n_block
        )

    # -- result ---------------------------------------------------------------------------------

    def _add_chat_vector(self, merged: Any, judge: Judge) -> None:
        """Add it where it was asked for, and say what it does to the taught model."""
        if self.instruct is None:
            return
        before = judge.look(merged, 0, "float32")
        add_chat_vector(merged, self.instruct, self.base, self.shown.say)
        after = judge.look(merged, 0, "float32")
        said = f"held-out perplexity {before.perplexity:.1f} -> {after.perplexity:.1f}"
        if before.right is not None:
            said += f", exercises {before.right:.0%} -> {after.right:.0%} right"
        self.shown.say(f"with the chat vector: {said}")

    def _publish(self, model: Any, n_tokens: int, judge: Judge) -> TrioFile | None:
        made: dict[str, Path] = {}
        if self.base.folder is not None:
            made["small_base"] = self.base.gguf
        if not self._is_whole:
            made["small_cpt"] = self.folder / publishing.ADAPTER
            publishing.write_adapter(model, self.folder, made["small_cpt"])
        if self._is_whole or self.asked.merge:
            made["whole"] = self.folder / publishing.MODEL
            merged = publishing.merged(model)
            self._add_chat_vector(merged, judge)
            publishing.write_model(merged, self.base, self.folder, made["whole"])
        if self.asked.output is not None:
            with whole_file(self.asked.output) as path:  # to another disk it is copied
                shutil.move(made.get("whole") or made["small_cpt"], path)
            return None
        return publishing.install(
            self.asked.name,
            self.trio,
            self.base,
            made,
            language=self.asked.lang,
            description=f"made by trimix adapt, which read {n_tokens:,} tokens",
        )


def clear(work: Workplace) -> None:
    """Remove a run's folder once its trio is there."""
    shutil.rmtree(work.folder, ignore_errors=True)


def summary(adapted: Adapted) -> dict[str, Any]:
    """What a run found, as JSON has it."""
    history = [] if adapted.history is None else [one.to_json() for one in adapted.history.all]
    return {
        "trio": None if adapted.trio is None else adapted.trio.name,
        "text": adapted.report.to_json(),
        "outlook": asdict(adapted.outlook),
        "history": history,
    }

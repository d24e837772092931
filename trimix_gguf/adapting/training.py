"""Training by transformers' Trainer, in our order of rows; a stopped run goes on exactly.

The Trainer keeps optimizer, schedule and random state, and brings devices, bfloat16 and several
cards through accelerate. What is ours: the loss, which rows come when, what is measured on the
way, and that a state counts only once all of it is on disk.
"""

from __future__ import annotations

import shutil
import signal
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from trimix_gguf.adapting.extras import need
from trimix_gguf.adapting.history import History
from trimix_gguf.adapting.judging import Judge, Judgement
from trimix_gguf.adapting.outlook import STATES
from trimix_gguf.adapting.recipe import Recipe
from trimix_gguf.adapting.rows import Rows
from trimix_gguf.adapting.taught import trained_numbers
from trimix_gguf.adapting.together import Together
from trimix_gguf.errors import TrimixError
from trimix_gguf.machine.files import whole_file, write_text

WHOLE = "whole"  # a file in a state's folder: the rest of it was written before
MOST_HALVINGS = 3


@dataclass(frozen=True)
class Standing:
    """Where a run is, after a step; `look` where something was measured there."""

    step: int
    n_steps: int
    loss: float
    tokens_per_second: float
    left_s: float
    look: Judgement | None


class Diverged(Exception):
    """A gradient is not a number, and so was the loss."""


class Stopped(KeyboardInterrupt):
    """Training was stopped by Ctrl-C, and its state is on disk."""


def train(
    taught: Any,
    rows: Rows,
    recipe: Recipe,
    judge: Judge | None,
    folder: Path,
    *,
    show: Callable[[Standing], None],
    say: Callable[[str], None],
    together: Together = Together(),  # noqa: B008  # frozen
) -> History:
    """Train the numbers of `taught` that may change, in place; `folder` keeps its states.

    The first of several processes has the judge. Ends early where the answers get worse. Raises
    Stopped after Ctrl-C, TrimixError where the loss stays no number.
    """
    history = History(folder, writes=together.is_first)
    halved = folder / "halvings"
    n_halvings = int(halved.read_text(encoding="utf-8")) if halved.is_file() else 0
    together.wait()  # all have read what the first will write
    while True:
        run = replace(recipe, n_halvings=n_halvings)
        state = together.told(_last_state(folder) if together.is_first else None)
        history.forget_after(0 if state is None else _step_of(state))
        try:
            _run(taught, rows, run, judge, folder, history, state, show, together)
            return history
        except Diverged as error:
            n_halvings += 1
            if n_halvings > MOST_HALVINGS:
                raise TrimixError(
                    f"the loss is not a number at step {error}, also with an eighth of the rate; "
                    "give --learning-rate a lower one, and look at the text"
                ) from None
            if together.is_first:
                write_text(halved, str(n_halvings))
            _restore(taught, folder)
            say(f"the loss is not a number at step {error}: going back, with half the rate")


# -- one run of the Trainer -------------------------------------------------------------------


def _run(
    taught: Any,
    rows: Rows,
    recipe: Recipe,
    judge: Judge | None,
    folder: Path,
    history: History,
    state: Path | None,
    show: Callable[[Standing], None],
    together: Together,
) -> None:
    transformers = need("transformers")
    transformers.utils.logging.set_verbosity_error()
    with _interruptible() as interrupted:
        losses: deque[float] = deque(maxlen=20 * recipe.passes_per_step)
        watch = _watch(
            taught, rows, recipe, judge, folder, history, show, interrupted, losses, together
        )
        trainer = _trainer_class()(
            model=taught,
            args=_arguments(recipe, folder),
            train_dataset=_dataset(rows, recipe),
            callbacks=[watch],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.recipe, trainer.losses = recipe, losses
        if not history.all:
            began = time.monotonic()
            history.add(together.told(judge and judge.look(taught.model, 0, recipe.dtype)))
            watch.look_s = time.monotonic() - began
        if state is None and together.is_first:
            with whole_file(folder / "first.safetensors") as path:
                save_numbers(taught, path)
        together.wait()
        if not history.falls and (state is None or _step_of(state) < recipe.n_steps):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of transformers about itself
                trainer.train(resume_from_checkpoint=None if state is None else str(state))
        elif state is not None:
            trainer._load_from_checkpoint(str(state))
    if interrupted.is_set():
        raise Stopped


def _arguments(recipe: Recipe, folder: Path) -> Any:
    torch, transformers = need("torch"), need("transformers")
    on_card = torch.cuda.is_available() or torch.backends.mps.is_available()
    return transformers.TrainingArguments(
        output_dir=str(folder / "states"),
        max_steps=recipe.n_steps,
        per_device_train_batch_size=recipe.rows_at_once,
        gradient_accumulation_steps=recipe.passes_per_step,
        ddp_find_unused_parameters=False,
        learning_rate=recipe.learning_rate,
        adam_beta1=0.9,
        adam_beta2=0.98,
        weight_decay=0.0,
        max_grad_norm=1.0,
        bf16=recipe.dtype == "bfloat16",
        use_cpu=not on_card,
        seed=recipe.seed,
        save_strategy="no",  # the callback says when
        save_total_limit=STATES,
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        label_names=[],
    )


def _dataset(rows: Rows, recipe: Recipe) -> Any:
    torch = need("torch")

    class InOrder(torch.utils.data.Dataset):  # type: ignore[name-defined,misc]
        def __len__(self) -> int:
            return min(len(rows), recipe.n_steps * recipe.rows_per_step)

        def __getitem__(self, at: int) -> dict[str, Any]:
            ids = torch.from_numpy(np.asarray(rows.ids[at], np.int64))
            return {"ids": ids, "counts": torch.from_numpy(np.array(rows.counts[at]))}

    return InOrder()


def _trainer_class() -> Any:
    torch, transformers = need("torch"), need("transformers")

    class InOrderTrainer(transformers.Trainer):  # type: ignore[name-defined,misc]
        """Rows in their order, our loss and rate, and states of only what changes."""

        recipe: Recipe
        losses: deque[float]

        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
            loss = model(**inputs)
            self.losses.append(float(loss.detach().mean()))
            return loss

        def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer or self.optimizer, lambda step: self.recipe.slope(step)
            )
            return self.lr_scheduler

        def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            save_numbers(self.accelerator.unwrap_model(self.model), folder / "trained.safetensors")

        def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
            super()._load_optimizer_and_scheduler(checkpoint)
            slope = self.recipe.slope(self.lr_scheduler.last_epoch)  # it may be halved since
            rates = self.lr_scheduler.base_lrs
            for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * slope

        def _load_from_checkpoint(self, checkpoint: str, model: Any = None) -> None:
            load_numbers(self.model if model is None else model, Path(checkpoint))

    return InOrderTrainer


def _watch(
    taught: Any,
    rows: Rows,
    recipe: Recipe,
    judge: Judge | None,
    folder: Path,
    history: History,
    show: Callable[[Standing], None],
    interrupted: threading.Event,
    losses: deque[float],
    together: Together,
) -> Any:
    transformers = need("transformers")

    class Watch(transformers.TrainerCallback):  # type: ignore[name-defined,misc]
        """After each step: tells where it is, measures, and says when to save and to stop."""

        def __init__(self) -> None:
            self.saved = self.began = time.monotonic()
            self.seconds: deque[float] = deque(maxlen=20)
            self.look_s = 0.0  # of the last measurement

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.monotonic()

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if not _has_finite_gradients(taught):
                raise Diverged(state.global_step)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            step, now = state.global_step, time.monotonic()
            self.seconds.append(now - self.began)
            step_s = float(np.median(self.seconds))
            look = None
            if recipe.has_look(step):
                own = float(np.mean(list(losses)[-recipe.passes_per_step :]))
                look = together.told(judge and judge.look(taught.model, step, recipe.dtype, own))
                if together.is_first:
                    save_candidate(taught, folder, step)
                history.add(look)
                self.look_s = time.monotonic() - now
            left = (recipe.n_steps - step) * step_s + recipe.looks_left(step) * self.look_s
            speed = recipe.rows_per_step * rows.ids.shape[1] / step_s
            show(Standing(step, recipe.n_steps, float(np.mean(losses)), speed, left, look))
            # Clocks and Ctrl-C of several processes differ: those of the first one count.
            is_due = time.monotonic() - self.saved > recipe.save_every_s
            is_stopped, is_due = together.told((interrupted.is_set(), is_due))
            if is_stopped:
                interrupted.set()
            control.should_training_stop |= is_stopped or history.falls
            if control.should_training_stop or step >= recipe.n_steps or is_due:
                control.should_save = True
                self.saved = time.monotonic()

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            together.wait()
            if together.is_first:
                write_text(folder / "states" / f"checkpoint-{state.global_step}" / WHOLE, "")

    return Watch()


def _has_finite_gradients(taught: Any) -> bool:
    torch = need("torch")
    gradients = [p.grad for p in trained_numbers(taught).values() if p.grad is not None]
    return all(bool(torch.isfinite(one).all()) for one in gradients)


@contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """Ctrl-C sets the event, so that a step is done and saved; a second one stops at once."""
    event = threading.Event()

    def stop(number: int, frame: Any) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# -- states and candidates --------------------------------------------------------------------


def _step_of(state: Path) -> int:
    return int(state.name.rpartition("-")[2])


def _last_state(folder: Path) -> Path | None:
    """The newest whole state; what a kill left of others is removed."""
    whole = []
    for state in sorted((folder / "states").glob("checkpoint-*"), key=_step_of):
        if (state / WHOLE).is_file():
            whole.append(state)
        else:
            shutil.rmtree(state)
    return whole[-1] if whole else None


def save_numbers(taught: Any, path: Path) -> None:
    """Write the numbers that change."""
    found = {name: p.detach().contiguous().cpu() for name, p in trained_numbers(taught).items()}
    need("safetensors.torch").save_file(found, str(path))


def load_numbers(taught: Any, source: Path) -> None:
    """Put back numbers from a file, or from a state's folder."""
    path = source / "trained.safetensors" if source.is_dir() else source
    put_numbers(taught, need("safetensors.torch").load_file(str(path)))


def put_numbers(taught: Any, found: dict[str, Any]) -> None:
    """Set the numbers that change, by name."""
    torch = need("torch")
    with torch.no_grad():
        for name, parameter in trained_numbers(taught).items():
            parameter.copy_(found[name])


def _restore(taught: Any, folder: Path) -> None:
    """The numbers before the first step: what a run begins with where there is no state."""
    load_numbers(taught, folder / "first.safetensors")


def candidate(folder: Path, step: int) -> Path:
    """Where the numbers after a step are kept, to choose from."""
    return folder / "candidates" / f"{step}.safetensors"


def save_candidate(taught: Any, folder: Path, step: int) -> None:
    """Keep the numbers after a step."""
    path = candidate(folder, step)
    path.parent.mkdir(exist_ok=True)
    with whole_file(path) as unfinished:
        save_numbers(taught, unfinished)

"""The loop that trains a model: learning rate, saved state, and how far it has come.

A step's batch must be a function of its number: then a run that was stopped and started again
gives the same model as one that was not. PyTorch is in the `train` extra; it is imported only when
a model is trained.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimix_gguf.machine.files import whole_file


@dataclass(frozen=True)
class Settings:
    """How a model is trained.

    The learning rate rises to `learning_rate` in `n_warm_up` steps. From step `decay_from` on, a
    cosine takes it down to `final_share` of that. So up to there a longer run is the same run.
    `weight_decay` is for the matrices between layers, as are Muon's steps, which have the size of
    AdamW's; AdamW trains embeddings and vectors.
    """

    learning_rate: float
    state: Path  # the file that a stopped run continues from
    n_steps: int
    n_warm_up: int = 20
    decay_from: int = 0
    final_share: float = 0.05
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.0
    clip: float = 1.0  # most of the gradient's norm
    smoothing: float = 0.95  # share of earlier steps in the loss that is shown
    save_every_s: float = 300

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        angle = math.pi * (step - self.decay_from) / max(self.n_steps - self.decay_from, 1)
        cosine = 0.5 * (1 + math.cos(min(max(0.0, angle), math.pi)))
        slope = self.final_share + (1 - self.final_share) * cosine
        return self.learning_rate * min(1.0, (step + 1) / max(self.n_warm_up, 1)) * slope


@dataclass(frozen=True)
class Standing:
    """Where a run is: step number `step` was just done; `loss` is a running mean."""

    step: int
    loss: float
    step_s: float  # seconds of a step, on average
    left_s: float

    def in_words(self, n_tokens: int, n_steps: int) -> str:
        """A progress line, where each of `n_steps` reads `n_tokens`."""
        speed = f"{n_tokens / self.step_s:.0f} tokens/s"
        left = f"{self.left_s / 60:.0f} min left"
        return f"step {self.step}/{n_steps} loss {self.loss:.3f} {speed}, {left}"


def train(
    model: Any,
    loss_of: Callable[[int], Any],
    settings: Settings,
    *,
    progress: Callable[[Standing], None] = lambda standing: None,
) -> None:
    """Train the parameters of a torch.nn.Module that require a gradient, in place.

    `loss_of(step)` gives the loss of that step's batch. After Ctrl-C, which is raised again, and
    after a kill, the next call continues from `settings.state`. The caller seeds PyTorch before it
    builds the model, and removes the state once the trained model is saved.
    """
    run = _Run(model, settings)
    started = saved = time.monotonic()
    first, mean = run.step, None
    try:
        while run.step < settings.n_steps:
            loss = run.do_step(loss_of)
            kept = settings.smoothing
            mean = loss if mean is None else kept * mean + (1 - kept) * loss
            now = time.monotonic()
            step_s = (now - started) / (run.step - first)
            left_s = (settings.n_steps - run.step) * step_s
            progress(Standing(run.step - 1, mean, step_s, left_s))
            if now - saved > settings.save_every_s:
                run.save()
                saved = now
    finally:  # also after Ctrl-C
        run.save()


class _Run:
    """A model in training: its optimizers, and the steps that are done."""

    def __init__(self, model: Any, settings: Settings) -> None:
        import torch

        self._settings = settings
        self._trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
        groups: dict[bool, list[Any]] = {True: [], False: []}
        for p in self._trained.values():
            groups[p.dim() == 2 and id(p) not in embeddings].append(p)
        rate = settings.learning_rate
        self._optimizers: list[Any] = []
        if groups[True]:
            self._optimizers.append(
                torch.optim.Muon(
                    groups[True],
                    lr=rate,
                    weight_decay=settings.weight_decay,
                    adjust_lr_fn="match_rms_adamw",
                )
            )
        if groups[False]:
            self._optimizers.append(
                torch.optim.AdamW(groups[False], lr=rate, betas=settings.betas, weight_decay=0.0)
            )
        self.step = 0
        if settings.state.exists():
            saved = torch.load(settings.state)
            model.load_state_dict(saved["trained"], strict=False)
            for optimizer, state in zip(self._optimizers, saved["optimizers"], strict=True):
                optimizer.load_state_dict(state)
            torch.set_rng_state(saved["generator"])
            self.step = saved["step"]
        self._generator = torch.get_rng_state()  # dropout draws from it
        self._is_whole = True

    def do_step(self, loss_of: Callable[[int], Any]) -> float:
        """One step of the optimizers; its loss."""
        import torch

        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self._settings.rate(self.step)
        loss = loss_of(self.step)
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._trained.values(), self._settings.clip)
        self._is_whole = False
        for optimizer in self._optimizers:
            optimizer.step()
        self.step += 1
        self._generator = torch.get_rng_state()
        self._is_whole = True
        return float(loss.item())

    def save(self) -> None:
        """Write the state after the last whole step; Ctrl-C within one leaves the older file."""
        import torch

        if not self._is_whole:
            return
        state = {
            "trained": {name: p.detach() for name, p in self._trained.items()},
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
            "generator": self._generator,
            "step": self.step,
        }
        with whole_file(self._settings.state) as unfinished:
            torch.save(state, unfinished)

"""lm-evaluation-harness: the mix answers its tasks.

This module needs lm-eval, so it is imported only for `trimix eval --harness`.
"""

import difflib
import hashlib
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from trimix_gguf.answering.chat import apply_template, template_of
from trimix_gguf.answering.generation import generate
from trimix_gguf.choosing.methods import ChosenBy
from trimix_gguf.choosing.score import Grid
from trimix_gguf.choosing.selection import select_weights
from trimix_gguf.errors import PromptError, SamplerError, TrimixError, WeightsError
from trimix_gguf.mixing.fusion import Mix, Weights
from trimix_gguf.mixing.sampling import DEFAULTS
from trimix_gguf.mixing.scoring import GRID, Float64
from trimix_gguf.trio.prompt import Prompt, Segment
from trimix_gguf.trio.trio import Trio

try:
    import lm_eval
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import (
        get_rolling_token_windows,
        make_disjoint_window,
        make_table,
        warning_once,
    )
except ImportError as error:
    raise TrimixError(
        f"the harness needs lm-eval: pip install 'trimix-gguf[lm-eval]' ({error})"
    ) from None

__all__ = ["TrimixLM", "make_table", "run_harness"]

logger = logging.getLogger(__name__)

Likelihood = tuple[float, bool]  # logprob of a continuation; whether greedy decoding gives it
TokenRequest = tuple[tuple[str, str] | None, list[int], list[int]]  # texts, context, continuation

UNPROMPTED = Weights(0.1, 0.9)  # what real prompts choose nearly always
_RENAMED = {"repetition_penalty": "repeat_penalty"}  # transformers' name and Sampling's


class HarnessOptions(TypedDict, total=False):
    """Options of lm_eval.simple_evaluate; the harness's defaults stand for those left out."""

    limit: int | float | None  # examples per task; below 1 a share of them
    num_fewshot: int | None
    apply_chat_template: bool
    system_instruction: str | None
    fewshot_as_multiturn: bool
    gen_kwargs: dict[str, str | float | int] | None
    bootstrap_iters: int


def run_harness(
    lm: "TrimixLM",
    tasks: Sequence[str],
    *,
    include_path: Path | str | None = None,
    include_defaults: bool = True,
    **options: Unpack[HarnessOptions],
) -> dict[str, Any]:
    """Run harness tasks, groups or tags (`*` matches) with `lm`; the results of simple_evaluate.

    `include_path` is a folder with the user's own task YAMLs. Without `include_defaults` only those
    are read, not the harness's thousands. Raises TrimixError for a task that is unknown or has data
    that cannot be read.
    """
    path = None if include_path is None else str(include_path)
    manager = TaskManager(include_path=path, include_defaults=include_defaults)
    try:
        results = lm_eval.simple_evaluate(
            lm, tasks=_known(manager, tasks), task_manager=manager, **options
        )
    except OSError as error:  # datasets' errors of files, names and network
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise TrimixError(f"the harness cannot read the data of its task: {reason}") from error
    return dict(results)


def _known(manager: TaskManager, tasks: Sequence[str]) -> list[str]:
    """The names that match; raises TrimixError for the first one that the harness lacks."""
    names: dict[str, None] = {}
    for task in tasks:
        found = manager.match_tasks([task])
        if not found:
            near = difflib.get_close_matches(task, manager.all_tasks, n=3)
            mend = f"did you mean {', '.join(near)}?" if near else "see `lm-eval ls tasks`"
            raise TrimixError(f"the harness has no task {task!r}; {mend}")
        names |= dict.fromkeys(found)
    if not names:
        raise TrimixError("no harness task was named; give one, such as belebele_kaz_Cyrl")
    return list(names)


class TrimixLM(TemplateLM):  # type: ignore[misc, unused-ignore]
    """A trio as a model of the harness: the mix answers.

    `weights`, or a whole Mix, are fixed; None: select_weights chooses them for each context
    (`method`, `grid`, `last`), without scoring control tokens. `unprompted` weights are used where
    there is no context to choose by: rolling perplexity, an empty context. Contexts that are too
    long lose their beginning except for BOS. A Mix that masks tokens can generate; scoring a text
    with it raises WeightsError. `speculative` is generate's, and off: with it, speed decides near
    ties. `seed` is for tasks that sample; a sampler setting that a task leaves out is off.
    """

    def __init__(
        self,
        trio: Trio,
        weights: Weights | Mix | None = None,
        *,
        method: ChosenBy = "auto",
        grid: Grid = (GRID, GRID),
        last: int | None = None,
        unprompted: Weights | Mix = UNPROMPTED,
        speculative: Literal["auto", "on", "off"] = "off",
        max_gen_toks: int = 256,  # if a task does not say; as in the harness's models
        seed: int = 1234,
    ) -> None:
        super().__init__()
        self._trio, self._model = trio, trio.models["large_ins"]
        self._fixed = None if weights is None else Mix.of(weights)
        self._unprompted = self._fixed or Mix.of(unprompted)
        self._method, self._grid, self._last = method, grid, last
        self._speculative: Literal["auto", "on", "off"] = speculative
        self._random = np.random.default_rng(seed)
        self._is_control = cache(lambda token: not self._model.piece(token))
        self.max_gen_toks = max_gen_toks
        self.chosen: Counter[Weights] = Counter()  # -> the number of contexts that chose them

    # -- tokens -----------------------------------------------------------------------------

    @property
    def max_length(self) -> int:
        """The most tokens that can be read before one that is predicted."""
        return self._trio.n_ctx - 1

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        named = self._model.file.special_id("eos")
        return int(min(self._trio.end_of_generation) if named is None else named)

    @property
    def prefix_token_id(self) -> int:
        """The only token of an empty context: BOS, or the end of another text."""
        named = self._model.file.special_id("bos")
        return int([*self._model.bos, self.eot_token_id if named is None else named][0])

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: object
    ) -> list[int]:
        """The ids of a text, with its control tokens; one BOS if the vocabulary adds one."""
        ids = self._model.tokenize(self._model.normalize(string), special=True)
        bos = [] if add_special_tokens is False else self._model.bos
        return ids if ids[: len(bos)] == bos else bos + ids

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        before, after = super()._encode_pair(context, continuation)
        if not after and continuation:  # merged into the context's last token: score that one
            *before, final = self.tok_encode(context + continuation)
            after = [final]
        return before or [self.prefix_token_id], after

    def _prompt(self, ids: Sequence[int]) -> Prompt:
        """The prompt of `ids`. Control tokens are unscored: small models do not know them."""
        runs = groupby(ids, key=self._is_control)
        return Prompt(tuple(Segment.of(list(run), scored=not control) for control, run in runs))

    def _fit(self, context: list[int], n_more: int) -> list[int]:
        """`context` without its beginning but with BOS, so that `n_more` tokens fit after it."""
        room = self._trio.n_ctx - n_more
        if room < 1:
            raise PromptError(
                f"a task needs {n_more} tokens after its context, and n_ctx is "
                f"{self._trio.n_ctx}; raise --n-ctx, or lower the task's max_gen_toks"
            )
        if len(context) <= room:
            return context
        bos = self._model.bos if context[:1] == self._model.bos else []
        warning_once(logger, "contexts that do not fit lose their beginning; raise --n-ctx")
        return bos + context[len(context) - room + len(bos) :]

    def _mix(self, context: Sequence[int], *, with_choices: bool = False) -> Mix:
        if self._fixed is not None:
            return self._fixed
        prompt = self._prompt(context)
        if not any(scored for _, scored in prompt.units[1:]):
            return self._unprompted
        chosen = select_weights(
            self._trio,
            prompt,
            method=self._method,
            grid=self._grid,
            last=self._last,
            score_tokens="all",
            with_choices=with_choices,
        )
        self.chosen[chosen.weights] += 1
        return chosen.mix

    # -- what the harness asks --------------------------------------------------------------

    def _loglikelihood_tokens(
        self,
        requests: list[TokenRequest],
        disable_tqdm: bool = False,
        *,
        mix: Mix | None = None,
        **_: object,
    ) -> list[Likelihood]:
        """Score continuations; those of one context are scored together, with the same weights."""
        if self._fixed is not None and self._fixed.is_masked:
            raise WeightsError(
                "a mix with a plausibility threshold makes some tokens impossible, so the harness "
                "cannot score texts with it; take tasks that generate, or give --weights"
            )
        answers: dict[int, Likelihood] = {
            i: (0.0, True) for i, r in enumerate(requests) if not r[2]
        }
        order = sorted(
            set(range(len(requests))) - answers.keys(),
            key=lambda i: (requests[i][1], requests[i][2][:-1]),
        )
        groups = []  # all are fitted before the first is read: a run of hours fails at once
        for context, same_context in groupby(order, key=lambda i: requests[i][1]):
            members = list(same_context)
            longest = max(len(requests[i][2]) for i in members)
            groups.append((self._fit(context, longest), members))
        bar = tqdm(total=len(requests), disable=disable_tqdm, desc="Running loglikelihood requests")
        for context, members in groups:
            # Several continuations of one context are the choices of a question.
            context_mix = mix or self._mix(context, with_choices=len(members) > 1)
            # Options that differ only in their last token share every row.
            for stem, same_stem in groupby(members, key=lambda i: requests[i][2][:-1]):
                logprob, greedy, final = self._read(context, stem, context_mix)
                top = int(final.argmax())
                for i in same_stem:
                    token = requests[i][2][-1]
                    answers[i] = (logprob + float(final[token]), greedy and token == top)
                    if requests[i][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[i][0], answers[i])
                    bar.update()
        bar.close()
        return [answers[i] for i in range(len(requests))]

    def _read(self, context: list[int], stem: list[int], mix: Mix) -> tuple[float, bool, Float64]:
        """Logprob of `stem`, whether greedy decoding gives it, and logprobs [n_vocab] after it.

        Models with coefficient 0 are not run; what the caches hold is not read again.
        """
        logprob, greedy, n_rows = 0.0, True, len(stem) + 1
        for at in range(0, n_rows, self._trio.n_window):
            n = min(self._trio.n_window, n_rows - at)
            self._trio.prefill(Prompt((Segment.of(context + stem[: at + n - 1]),)))
            rows = self._trio.tail_rows(mix.roles, n)
            logprobs = log_softmax(mix.fuse(rows, self._trio.unused))
            for row, token in zip(logprobs, stem[at : at + n], strict=False):
                logprob += float(row[token])
                greedy = greedy and int(row.argmax()) == token
        return logprob, greedy, logprobs[-1]

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Logprobs of whole texts, in windows as long as the context, each beginning with BOS."""
        bos = self._model.bos
        windows: list[TokenRequest] = []
        owners = []
        for owner, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            length = self.max_length - len(bos)
            for pair in get_rolling_token_windows(ids, self.prefix_token_id, length, 1):
                context, continuation = make_disjoint_window(pair)
                head = [] if context[: len(bos)] == bos else bos
                windows.append((None, head + context, continuation))
                owners.append(owner)
        scored = self._loglikelihood_tokens(windows, disable_tqdm, mix=self._unprompted)
        totals = [0.0] * len(requests)
        for owner, (logprob, _) in zip(owners, scored, strict=True):
            totals[owner] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continue contexts up to a stop string, greedily unless the task samples."""
        prompts, settings = [], []
        for request in requests:
            context, gen_kwargs = request.args[:2]
            generation = self._settings(gen_kwargs)
            ids = self.tok_encode(context) or [self.prefix_token_id]
            prompts.append(self._fit(ids, generation["max_tokens"]))
            settings.append(generation)
        seeds = self._random.integers(2**32 - 1, size=len(requests)).tolist()
        texts: dict[int, str] = {}
        order = sorted(range(len(requests)), key=lambda i: prompts[i])
        for i in tqdm(order, disable=disable_tqdm, desc="Running generate_until requests"):
            texts[i] = generate(
                self._trio,
                self._prompt(prompts[i]),
                weights=self._mix(prompts[i]),
                speculative=self._speculative,
                seed=seeds[i],
                **settings[i],
            ).text
            self.cache_hook.add_partial("generate_until", requests[i].args, texts[i])
        return [texts[i] for i in range(len(requests))]

    def _settings(self, gen_kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The harness's generation settings as generate's; raises SamplerError for others."""
        given: dict[str, Any] = dict(normalize_gen_kwargs(dict(gen_kwargs), self.max_gen_toks))
        sampled = given.pop("do_sample", False)
        temperature = given.pop("temperature", 1.0)
        settings: dict[str, Any] = {
            "stop": given.pop("until"),
            "max_tokens": given.pop("max_gen_toks"),
            "temperature": float(temperature) if sampled else 0.0,
            **{"top_k": 0, "top_p": 1.0, "min_p": 0.0},
        }
        for name, value in given.items():
            own = _RENAMED.get(name, name)
            if own in DEFAULTS and own != "seed":
                settings[own] = value
            elif (name, value) != ("num_beams", 1):
                raise SamplerError(
                    f"a task wants {name} = {value!r} for generation, which a mix does not know; "
                    "override it by gen_kwargs, or leave the task out"
                )
        return settings

    # -- chat -------------------------------------------------------------------------------

    @property
    def tokenizer_name(self) -> str:
        """A name per file of large_ins and chat template: each has its request cache."""
        template = self._model.chat_template or ""
        return f"{self._model.path.stem}-{hashlib.sha256(template.encode()).hexdigest()[:8]}"

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The chat template of large_ins; None if none is requested."""
        if not chat_template:
            return None
        return template_of(self._model)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Messages to text by large_ins' template; an unfinished last message stays open.

        Like the harness's models, it leaves out system messages if the template refuses them.
        """
        try:
            return apply_template(self._model, chat_history, add_generation_prompt)
        except PromptError as error:
            others = [m for m in chat_history if m["role"] != "system"]
            if len(others) in (0, len(chat_history)):
                raise
            warning_once(logger, f"the chat template gets no system message: {error}")
        return self.apply_chat_template(others, add_generation_prompt)

    def get_model_info(self) -> dict[str, Any]:
        """For the results' `config`: the trio, and the weights with the method that chose them."""
        if self._fixed is not None:
            weights: dict[str, Any] = {"method": "fixed", **self._fixed.to_json()}
        else:
            weights = {
                "method": self._method,
                "unprompted": self._unprompted.to_json(),
                "chosen": [{**asdict(w), "n": n} for w, n in self.chosen.most_common()],
            }
        models = {role: model.path.name for role, model in self._trio.models.items()}
        return {"models": models, "n_ctx": self._trio.n_ctx, "weights": weights}


def log_softmax(rows: NDArray[np.float32]) -> Float64:
    """Logprobs of rows of logits [n, n_vocab], in float64; −inf stays −inf."""
    wide = rows.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    return np.asarray(wide - np.log(np.exp(wide).sum(-1, keepdims=True)))

"""A summary: all that a report says, in the form that `trimix eval report --json` prints."""

from typing import TypedDict

from trimix_gguf.evaluation.run_files.record import RunRecord


class Score(TypedDict):
    """A metric, and its bootstrap interval."""

    value: float
    low: float
    high: float


class Gain(TypedDict):
    """The difference from another method, its interval and its p-value."""

    against: str
    difference: float
    low: float
    high: float
    p: float


class Perplexity(TypedDict):
    """Of prompts: over all tokens, and as the mean over prompts (of nats)."""

    micro: float
    macro: float


class MethodSummary(TypedDict):
    """A method's scores by metric, its mean weights, and the perplexity of the prompts there."""

    metrics: dict[str, Score]
    alpha: float | None
    beta: float | None
    perplexity: Perplexity | None


class Surface(TypedDict):
    """Mean nats and metric at each grid point [n_grid][n_grid], and their rank correlation."""

    mean_nll: list[list[float]]
    metric: list[list[float]]
    spearman: float | None


class ChosenWeights(TypedDict):
    """Which weights a method chose; `counts` [n_grid][n_grid] at the grid points."""

    beta_above_alpha: float
    mean_ratio: float | None
    counts: list[list[int]]
    off_grid: int


class Guidance(TypedDict):
    """The divergence of the small models, and its rank correlation with beta."""

    mean_divergence: float
    spearman: float | None


class MeanFindings(TypedDict):
    """Each method's share of the way from ppl to the oracle."""

    gap_closed: dict[str, float]


class Findings(MeanFindings):
    """What a task shows beside its scores."""

    surface: Surface | None
    chosen: dict[str, ChosenWeights]
    guidance: Guidance | None


Gains = dict[str, dict[str, Gain]]  # method -> "best_single" or "proxy-tuning" -> gain


class TaskSummary(TypedDict):
    """One task of `n` examples; `by_choice`: judged by the likeliest choice, not by the text."""

    n: int
    metrics: list[str]
    by_choice: bool
    methods: dict[str, MethodSummary]
    gains: Gains
    findings: Findings


class Conclusion(TypedDict):
    """The method to use; `p` of the test that decided. None where the run cannot say."""

    method: str | None
    n_questions: int
    p: float | None
    sentence: str


class MeanSummary(TypedDict):
    """The mean of the main metric over tasks, and what follows from it."""

    methods: dict[str, Score]
    gains: Gains
    findings: MeanFindings
    conclusion: Conclusion


class Summary(TypedDict):
    """A whole report."""

    runs: list[RunRecord]
    grid: list[float]
    choice_scoring: bool
    n_resamples: int
    level: float
    methods: list[str]
    oracles: list[str]
    tasks: dict[str, TaskSummary]
    mean: MeanSummary

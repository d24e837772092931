"""The model `trimix` of lm-evaluation-harness's own command: `lm_eval --model trimix`.

lm-eval finds it by the entry point `lm_eval.models` of this package. Versions up to 0.4.13 do not
look for entry points; there

    python -m trimix_gguf.evaluation.running.lm_eval_model run --model trimix …

is lm-eval's command with this model added.
"""

from pathlib import Path
from typing import cast

from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import register_model

from trimix_gguf.choosing.methods import AUTO, ChosenBy
from trimix_gguf.choosing.selection import check_method
from trimix_gguf.errors import TrimixError, WeightsError
from trimix_gguf.evaluation.running.harness import TrimixLM
from trimix_gguf.mixing.fusion import METHODS, Mix, Weights
from trimix_gguf.trio.trio import Trio
from trimix_gguf.trios.store import resolve

# What lm-eval passes itself: a trio has its own batches and devices, and runs no code of a model.
_OF_LM_EVAL = {"batch_size", "max_batch_size", "device", "trust_remote_code"}


@register_model("trimix")
class NamedTrioLM(TrimixLM):
    """A trio that is opened by its name: `--model_args trio=NAME,method=auto`.

    `trio` is a name, a trio file or its folder; `alpha` and `beta` together fix the weights, else
    `method`, which may name a fixed mix too, else what the trio file says. Raises TrimixError as
    resolve and Trio.load do, and for other arguments.
    """

    def __init__(
        self,
        trio: str | Path = "nano",
        method: ChosenBy | None = None,
        alpha: float | None = None,
        beta: float | None = None,
        max_gen_toks: int = 256,
        n_ctx: int | None = None,
        **others: object,
    ) -> None:
        if unknown := sorted(others.keys() - _OF_LM_EVAL):
            raise TrimixError(
                f"--model_args: {unknown[0]} is unknown; known are trio, method, alpha and beta, "
                "max_gen_toks, n_ctx"
            )
        if (alpha is None) != (beta is None):
            raise WeightsError("alpha and beta fix the weights together; give both or none")
        if alpha is not None and method is not None:
            raise WeightsError("give alpha and beta, or a method")
        file = resolve(str(trio))
        weights: Weights | Mix | None = None
        if alpha is not None and beta is not None:
            weights = Weights(float(alpha), float(beta))
        elif method in METHODS:
            weights, method = METHODS[method], None
        elif method is None:  # what the file names is checked where it is read
            weights, method = file.fixed_mix, cast("ChosenBy | None", file.method)
        check_method(method or AUTO)
        given = file.load_arguments() | ({} if n_ctx is None else {"n_ctx": int(n_ctx)})
        super().__init__(
            Trio.load(**given), weights, method=method or AUTO, max_gen_toks=max_gen_toks
        )


if __name__ == "__main__":
    cli_evaluate()

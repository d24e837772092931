"""The loss of several tokens together over a grid: the sum of what each of them has."""

from trimix_gguf.mixing.scoring import grid_token_nlls


def grid_nll(**given):
    """Summed nats [n_alpha, n_beta]; arguments as grid_token_nlls has them."""
    return grid_token_nlls(**given).sum(axis=0)

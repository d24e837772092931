"""The mathematics over rows of logits: the mix, the grid, the sampler."""

"""The three roles of a trio, in the order of the formula."""

ROLES = ("large_ins", "small_cpt", "small_base")

"""The three roles of a trio, in the order of the formula."""

from typing import Literal

Role = Literal["large_ins", "small_cpt", "small_base"]

ROLES: tuple[Role, ...] = ("large_ins", "small_cpt", "small_base")
# Who is loaded first, and loads weights that roles share: small_cpt may adapt small_base.
LOADING_ORDER: tuple[Role, ...] = ("large_ins", "small_base", "small_cpt")

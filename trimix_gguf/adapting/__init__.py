"""From raw text in one's language to a small_cpt, and a trio that has been measured."""

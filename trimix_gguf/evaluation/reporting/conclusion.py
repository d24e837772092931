"""Which method a run speaks for, in one sentence, by paired tests against large_ins."""

from collections.abc import Callable, Mapping

from trimix_gguf.choosing.methods import AUTO, INFORMATIVE, evaluated_methods
from trimix_gguf.evaluation.names.compared import is_oracle
from trimix_gguf.evaluation.reporting.statistics import Difference
from trimix_gguf.evaluation.reporting.summary import Conclusion
from trimix_gguf.roles import ROLES

_LARGE_INS = ROLES[0]
_FEWEST = 30  # questions: on fewer, a bootstrap's interval is too narrow


def conclude(
    values: Mapping[str, float], against: Callable[[str, str], Difference], *, n: int, level: float
) -> Conclusion:
    """The method to use, from the methods' scores on `n` questions and the tests between them.

    auto is tested first. Another method is named only where auto is not above large_ins and that
    one is, with its p-value times the number of such methods (Bonferroni): the best of many is
    often best by chance.
    """
    known = {*evaluated_methods(), INFORMATIVE} - {_LARGE_INS}
    tried = [name for name in values if name in known and not is_oracle(name)]
    others = [name for name in tried if name != AUTO]
    if _LARGE_INS not in values or not tried:
        return _conclusion(n, "compare large_ins and auto (--methods) to learn which one to use")
    if n < _FEWEST:
        return _conclusion(n, f"too few questions ({n}) to say anything")
    best = max(others, key=lambda name: values[name], default=AUTO)
    for name, n_tests in ((AUTO, 1), (best, len(others))):
        if name in tried and n_tests:
            found = against(name, _LARGE_INS)
            p = min(1.0, found.p * n_tests)
            if found.difference > 0 and p < 1 - level:
                times = f", corrected for {n_tests} methods" if n_tests > 1 else ""
                sentence = f"use {name}: it is above large_ins (p {p:.2g}{times})"
                return _conclusion(n, sentence, name, p)
    name = AUTO if AUTO in tried else best
    found = against(name, _LARGE_INS)
    if found.difference < 0 and found.p < 1 - level:
        sentence = f"use large_ins: {name} is below it (p {found.p:.2g})"
        return _conclusion(n, sentence, _LARGE_INS, found.p)
    if name == AUTO:
        sentence = f"use auto; {n} questions cannot tell it from large_ins"
        return _conclusion(n, sentence, name, found.p)
    sentence = f"use large_ins; {n} questions cannot tell {name} from it"
    return _conclusion(n, sentence, _LARGE_INS, found.p)


def _conclusion(
    n: int, sentence: str, method: str | None = None, p: float | None = None
) -> Conclusion:
    return {"method": method, "n_questions": n, "p": p, "sentence": sentence}

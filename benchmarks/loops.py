"""Whether answers that only repeat themselves go on as `trimix eval --fill-loops` takes it.

Every mix of the grid answers questions of a translation task, decoded to the task's limit, while a
Loop watches and foretells; the two are compared token by token.
"""

from typing import Any

from common import load, machine, parser, report

from trimix_gguf.evaluation.names.settings import RunSettings
from trimix_gguf.evaluation.running.continuing import Continuation, Start, continue_all
from trimix_gguf.evaluation.running.loops import Loop
from trimix_gguf.evaluation.running.mixes import grid_continuations
from trimix_gguf.evaluation.running.prompts import open_reader, question_after
from trimix_gguf.evaluation.tasks import find_task
from trimix_gguf.roles import ROLES


class Watch(Loop):
    """Keeps what it would fill an answer with, and lets it be decoded."""

    foretold: tuple[int, list[int]] | None = None  # how many ids were there, and all of them

    def rest(self, n: int) -> list[int]:
        """What a loop would fill in; it is kept to compare, and nothing is filled in."""
        filled = super().rest(n)
        if self.foretold is None and filled:
            self.foretold = len(self._ids), [*self._ids, *filled]
        return []


def main() -> None:
    """Measure, and print; the last line is JSON."""
    options = parser(__doc__)
    options.add_argument("--tasks", nargs="+", default=["flores-to-en", "flores-from-en"])
    options.add_argument("--questions", type=int, default=1, help="of each task")
    options.add_argument("--lang", default="kk")
    # The text is a folder here: the one that trimix eval --data names.
    options = options.parse_args()
    result: dict[str, Any] = {"machine": machine(options), "n": {"questions": options.questions}}
    lines = []
    with load(options, n_ctx=8192) as trio:
        for name in options.tasks:
            task = find_task(name, options.lang)
            dataset = task.load(options.text, options.lang, 0)
            questions = dataset.questions(options.questions, 0)
            reader = open_reader(trio, task, dataset, questions, RunSettings(()))
            written: list[Continuation] = []
            for question in questions:
                reader.read(question_after(reader, question))
                with trio.forks():
                    start = Start.here(trio, ROLES, grid_continuations())
                    for one in start.continuations:
                        one.loop = Watch()
                    continue_all(trio, [start], max_tokens=task.max_tokens)
                written += start.continuations
            result[name] = counts(written, task.max_tokens)
            lines.append(
                "{name}: {answers} answers, {at_limit} to the limit of {limit} tokens; {foretold} "
                "foretold, {wrong} of them otherwise; {share:.0%} of all tokens".format(
                    name=name, limit=task.max_tokens, **result[name]
                )
            )
    report(options, result, lines)


def counts(written: list[Continuation], max_tokens: int) -> dict[str, Any]:
    """How many answers there are, were foretold, and went on otherwise; the tokens foretold."""
    watches = [(one, one.loop.foretold) for one in written if isinstance(one.loop, Watch)]
    seen = [(one, *foretold) for one, foretold in watches if foretold is not None]
    spared = sum(len(one.ids) - there for one, there, _ in seen)
    return {
        "answers": len(written),
        "at_limit": sum(len(one.ids) == max_tokens for one in written),
        "foretold": len(seen),
        "wrong": sum(one.ids != ids for one, _, ids in seen),
        "share": spared / sum(len(one.ids) for one in written),
    }


if __name__ == "__main__":
    main()

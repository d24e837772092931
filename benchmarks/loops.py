"""Whether answers that only repeat themselves go on as `trimix eval --fill-loops` takes it.

Every mix of the grid answers questions of a translation task, decoded to the task's limit, while a
Loop watches and foretells; the two are compared token by token.
"""

from typing import Any

from common import load, machine, parser, report

from trimix_gguf.evaluation.continuing import Mix, Start, continue_all
from trimix_gguf.evaluation.loops import Loop
from trimix_gguf.evaluation.methods import grid_mixes
from trimix_gguf.evaluation.prompts import open_reader, question_after
from trimix_gguf.evaluation.runner import Settings
from trimix_gguf.evaluation.tasks import find_task
from trimix_gguf.roles import ROLES


class Watch(Loop):
    """Keeps what it would fill an answer with, and lets it be decoded."""

    foretold: tuple[int, list[int]] | None = None  # how many ids were there, and all of them

    def rest(self, n: int) -> list[int]:
        filled = super().rest(n)
        if self.foretold is None and filled:
            self.foretold = len(self._ids), [*self._ids, *filled]
        return []


def main() -> None:
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
            questions = Settings((), limit=options.questions).questions(dataset)
            reader = open_reader(trio, task, dataset, questions)
            mixes = []
            for question in questions:
                reader.read(question_after(reader, question))
                with trio.forks():
                    start = Start.here(trio, ROLES, grid_mixes())
                    for mix in start.mixes:
                        mix.loop = Watch()
                    continue_all(trio, [start], max_tokens=task.max_tokens)
                mixes += start.mixes
            result[name] = counts(mixes, task.max_tokens)
            lines.append(
                "{name}: {answers} answers, {at_limit} to the limit of {limit} tokens; {foretold} "
                "foretold, {wrong} of them otherwise; {share:.0%} of all tokens".format(
                    name=name, limit=task.max_tokens, **result[name]
                )
            )
    report(options, result, lines)


def counts(mixes: list[Mix], max_tokens: int) -> dict[str, Any]:
    """How many answers there are, were foretold, and went on otherwise; the tokens foretold."""
    watches = [(mix, mix.loop.foretold) for mix in mixes if isinstance(mix.loop, Watch)]
    seen = [(mix, *foretold) for mix, foretold in watches if foretold is not None]
    spared = sum(len(mix.ids) - there for mix, there, _ in seen)
    return {
        "answers": len(mixes),
        "at_limit": sum(len(mix.ids) == max_tokens for mix in mixes),
        "foretold": len(seen),
        "wrong": sum(mix.ids != ids for mix, _, ids in seen),
        "share": spared / sum(len(mix.ids) for mix in mixes),
    }


if __name__ == "__main__":
    main()

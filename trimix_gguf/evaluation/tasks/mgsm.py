"""MGSM: grade-school problems in several languages (Shi et al., 2022), solved in English.

The set has 250 problems, in the same order in every language; its answers are only numbers. The
last eight are the exemplars: SOLUTIONS solves them in English, as the paper does for native maths.
"""

from pathlib import Path

from trimix_gguf.errors import DataError
from trimix_gguf.evaluation.tasks.rows import one_line, read_tsv
from trimix_gguf.evaluation.tasks.sources import find
from trimix_gguf.evaluation.tasks.task import Dataset, Example, Task

N_PROBLEMS = 250
SOLUTIONS = {
    243: (
        "Mike still writes to 5 - 2 = 3 people. Each gets 2 letters a week, so he writes"
        " 3 * 2 = 6 letters. That is 6 * 5 = 30 pages, which take 30 * 6 = 180 minutes,"
        " or 180 / 60 = 3 hours. The answer is 3."
    ),
    244: (
        "The calls with his boss take 30 * 15 = 450 minutes. With the others he has used"
        " 450 + 300 = 750 minutes. He has 1000 - 750 = 250 minutes left. The answer is 250."
    ),
    245: (
        "After Kyle, Griffin had 24 - 5 = 19 fries. Billy took 2 * 5 = 10, which left"
        " 19 - 10 = 9. Colby took 5 - 3 = 2, which left 9 - 2 = 7. Ginger must have given him"
        " 27 - 7 = 20. The answer is 20."
    ),
    246: (
        "The aquariums differ by 32 - 4 = 28 snails. That is twice the number of fish, so there"
        " are 28 / 2 = 14 fish, and 14 / 2 = 7 in each aquarium. The answer is 7."
    ),
    247: (
        "One day costs 250 * 6 = 1500 dollars, one week 1500 * 4 = 6000 and five weeks"
        " 6000 * 5 = 30000. The discount is 30000 / 10 = 3000, so she paid"
        " 30000 - 3000 = 27000 dollars. The answer is 27000."
    ),
    248: (
        "The party cost 12 + 43 + 15 + 4 + 22 = 96 dollars. Each of the three paid"
        " 96 / 3 = 32 dollars. The answer is 32."
    ),
    249: (
        "The onions weigh 4 * 50 = 200 pounds. They cost 200 * 1.50 = 300 dollars."
        " The answer is 300."
    ),
    250: (
        "On Monday Sue ate 4 * 5 = 20 cookies, 20 - 5 = 15 more than her sister. On Tuesday she"
        " ate 2 * 13 = 26, 26 - 13 = 13 more. Together that is 15 + 13 = 28 cookies more, or"
        " 28 * 200 = 5600 calories. The answer is 5600."
    ),
}


def load(data: Path, lang: str, seed: int) -> Dataset:
    """All problems but the last eight, which are the exemplars."""
    path = find(data, f"eval/{lang}/mgsm_{lang}.tsv")
    rows = read_tsv(path, ("question", "answer"), header=False)
    if len(rows) != N_PROBLEMS:
        raise DataError(f"{path}: expected MGSM's {N_PROBLEMS} problems, got {len(rows)}")
    examples, pool = [], []
    for number, (where, row) in enumerate(rows, 1):
        question, answer = f"Problem: {one_line(row['question'])}\nSolution:", row["answer"]
        solution = SOLUTIONS.get(number)
        if solution is None:
            examples.append(Example(str(number), question, answer, (answer,)))
            continue
        if not solution.endswith(f" {answer.replace(',', '')}."):
            raise DataError(f"{where}: not MGSM's problem {number}: {answer} is not its answer")
        pool.append(Example(str(number), question, solution, (answer,)))
    return Dataset.shuffled(examples, pool, seed)


MGSM = Task(
    name="mgsm",
    languages=("bn", "te", "en"),
    instruction="Solve each problem step by step, in English and on one line.",
    metrics=("number",),
    max_tokens=250,
    load=load,
)

"""Small files of every kind that a task reads, and how a task is loaded from them."""

import json

from trimix_gguf.evaluation.tasks import find_task
from trimix_gguf.evaluation.tasks.mgsm import SOLUTIONS
from trimix_gguf.evaluation.tasks.sib200 import LABELS


def write_all(folder):
    """A small file of every kind that a task reads."""
    write_sib200(folder)
    write_flores(folder)
    write_kazakh(folder)
    for part, n in (("val", 6), ("test", 6)):
        write_jsonl(folder / f"eval/ta/{part}.jsonl", [xcopa(part, n) for n in range(n)])
    numbers = {n: solution.split()[-1].rstrip(".") for n, solution in SOLUTIONS.items()}
    lines = [f"সমস্যা {n}?\t{numbers.get(n, n)}" for n in range(1, 251)]
    write_lines(folder / "eval/bn/mgsm_bn.tsv", lines)
    write_milic(folder)
    return folder


def write_lines(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_jsonl(path, rows):
    return write_lines(path, [json.dumps(row, ensure_ascii=False) for row in rows])


def write_json(path, rows):
    return write_lines(path, [json.dumps(rows, ensure_ascii=False, indent=1)])


def write_sib200(folder):
    for part, n in (("train", 28), ("test", 9)):
        rows = [f"{part}{i}\t{LABELS[i % 7]}\tМәтін {part} {i}" for i in range(n)]
        rows[0] = rows[0].replace("Мәтін", '"Ол ""иә"" деді').replace(" 0", ' 0"')
        lines = ["index_id\tcategory\ttext", *rows]
        write_lines(folder / f"eval/kk/sib200/{part}.tsv", lines)


def write_flores(folder):
    for lang, word in (("kk", "Сөйлем\u2028"), ("en", "Sentence")):
        write_lines(folder / f"eval/{lang}/flores200.txt", [f"{word} {i}" for i in range(7)])
    pairs = [f'"Мысал" {i}\t"Example" {i}' for i in range(9)]
    write_lines(folder / "eval/kk/flores200_fewshot.tsv", ["kk\ten", *pairs])


def write_kazakh(folder):
    for part, n in (("dev", 9), ("test", 60)):
        rows = [
            {"question": f"{part} {i}?", "choices": [f"{c}{i}" for c in "абвг"], "answer": "D"}
            for i in range(n)
        ]
        write_jsonl(folder / f"eval/kk/tumlu/{part}.jsonl", rows)
    write_jsonl(folder / "eval/kk/kazqad/validation.jsonl", [kazqad(i) for i in range(40)])
    write_jsonl(folder / "eval/kk/kkCOPA.jsonl", [kkcopa(i) for i in range(40)])
    write_jsonl(folder / "kaz_Cyrl.jsonl", [belebele(i) for i in range(45)])


def kazqad(i):
    words = [f"сөз{i // 2}-{n}" for n in range(150)]
    answer = f"жауап{i}"
    words[(i * 7) % 150] = answer
    context = " ".join(words)
    answers = {"text": [answer, answer], "answer_start": [context.index(answer)] * 2}
    row = {"id": f"q{i}", "title": "т", "context": context, "question": f"не\n{i}?"}
    return {**row, "answers": answers}


def kkcopa(i):
    premise = "Ортақ себеп." if i in (0, 39) else f"Себеп {i}."
    row = {"items_id": str(i), "asks-for_eng": "cause" if i % 2 else "effect"}
    texts = {"p_contents_kz": premise, "a1_contents_kz": "Бір.", "a2_contents_kz": "Екі."}
    return {**row, **texts, "correct_answers": str(1 + i % 2)}


def xcopa(part, i):
    row = {"premise": f"{part} {i}", "choice1": "ஒன்று", "choice2": "இரண்டு"}
    return {**row, "question": "effect", "label": i % 2, "idx": i}


def belebele(i):
    options = {f"mc_answer{n}": f"жауап {n}" for n in range(1, 5)}
    row = {"flores_passage": f"Үзінді {i // 2}.", "question": f"Сұрақ {i}?", **options}
    return {**row, "correct_answer_num": str(1 + i % 4) if i % 2 else 1 + i % 4}


def milic(kind, part, i):
    name, answer = f"{part}-{i}", "ABC"[i % 3]
    context, options = ["سالام", "ياخشى\nمۇ"], ["بىر", "ئىككى", "ئۈچ"]
    kinds: dict[str, dict] = {
        "response_selection": {"context": context, "options": options, "answer": answer},
        "reading_comprehension": {
            "context": context, "question": "كىم؟", "options": options, "answer": answer,
        },
        "text_classification": {
            "text": "تېكىست " * 99, "label": {"en": f"Label {i % 4}", "zh": "标"},
        },
        "title_generation_200": {"content": "ماقالە " * 99, "title": f"ماۋزۇ {i}"},
        "math": {"question": f"1 + {i}؟", "cot": {"en": f"It is {1 + i}.", "zh": ""},
                 "answer": 1 + i},
        "translation_dialogue": {"ug": f"سالام {i}", "en": f"Hello {i}"},
    }  # fmt: skip
    return {**kinds[kind], "id": name}


def write_milic(folder):
    for kind in (
        "response_selection", "reading_comprehension", "text_classification",
        "title_generation_200", "math", "translation_dialogue",
    ):  # fmt: skip
        for part, n in (("test", 12), ("train_1", 16), ("train_2", 16), ("train_3", 16)):
            rows = [milic(kind, part, i) for i in range(n)]
            write_json(folder / f"data/{kind}/ug/{part}.json", rows)


def load(name, lang, folder, seed=0):
    return find_task(name, lang).load(folder, lang, seed)


def prompt(task, dataset, example):
    shown = [f"{e.question} {e.answer}\n\n" for e in dataset.exemplars[: task.n_exemplars]]
    return f"{task.instruction}\n\n{''.join(shown)}{example.question}"

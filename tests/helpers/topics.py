"""A user's own small task: topics of Kazakh sentences."""

from trimix_gguf.trio.prompt import Prompt

TOPICS = {"спорт": "Команда ойында жеңді.", "саясат": "Үкімет жаңа заң қабылдады."}
EXEMPLARS = "".join(f"Text: {text}\nTopic: {label}\n\n" for label, text in TOPICS.items())
QUESTION = "Text: Президент Астанада сөз сөйледі.\nTopic:"


def scored(trio, text):
    return Prompt(tuple(s for s in trio.prompt(text).segments if s.scored))


def arguments(task_file, out, methods="ppl,ppl-answers,ppl-task,ent,proxy-tuning,upper-bound"):
    return [
        *("eval", "--lang", "kk", "--tasks", str(task_file), "--methods", methods),
        *("--threads", "1", "-o", str(out)),
    ]  # fmt: skip

"""A user's own small task: topics of Kazakh sentences."""

from trimix_gguf.evaluation.running.distributing import ask_task
from trimix_gguf.evaluation.running.working import Here, Models
from trimix_gguf.trio.prompt import Prompt

TOPICS = {"спорт": "Команда ойында жеңді.", "саясат": "Үкімет жаңа заң қабылдады."}
EXEMPLARS = "".join(f"Text: {text}\nTopic: {label}\n\n" for label, text in TOPICS.items())
QUESTION = "Text: Президент Астанада сөз сөйледі.\nTopic:"


def scored(trio, text):
    return Prompt(tuple(s for s in trio.prompt(text).segments if s.scored))


def ask_here(trio, task, dataset, settings, out):
    """Have an open trio answer a task's questions into a file."""
    models = Models(trio, {task.name: (task, dataset)}, settings)
    ask_task(Here(models), task, dataset, settings, out)


def arguments(task_file, out, methods="ppl,ppl-answers,ppl-task,ent,proxy-tuning,upper-bound"):
    return [
        *("eval", "--lang", "kk", "--tasks", str(task_file), "--methods", methods),
        *("--threads", "1", "-o", str(out)),
    ]  # fmt: skip

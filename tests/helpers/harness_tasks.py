"""Tasks of lm-evaluation-harness over local data, as a user writes them."""

import json

from conftest import KAZAKH
from naive_mix import CHOICES

TEXTS = [KAZAKH, "Абай — қазақтың ұлы ақыны. " * 3, "Астана " * 5]
STOPS = [".", "\n\n"]
TASKS = {
    "kk_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "Сұрақ: {{question}}\nЖауап:",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{label}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "kk_rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "kk_text": {
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{text}}",
        "generation_kwargs": {"until": STOPS, "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}
DOCS = {
    "kk_choice": [{"question": q, "choices": c, "label": n} for q, c, n in CHOICES],
    "kk_rolling": [{"text": text} for text in TEXTS],
    "kk_text": [{"text": question} for question, _, _ in CHOICES[:3]],
}


def write_tasks(folder):
    """Their files in `folder`, which is returned; a YAML file may be JSON."""
    for name, config in TASKS.items():
        data = folder / f"{name}.jsonl"
        data.write_text("\n".join(map(json.dumps, DOCS[name])), encoding="utf-8")
        kwargs = {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")}
        whole = {"task": name, "dataset_path": "json", "dataset_kwargs": kwargs, **config}
        whole["test_split"] = "test"
        (folder / f"{name}.yaml").write_text(json.dumps(whole), encoding="utf-8")
    return folder

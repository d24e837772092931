"""What a Worker of the tests runs."""

import os
import time

from trimix_gguf.machine.worker import answer_calls


def main():
    """Say what is asked for, or misbehave."""
    answer_calls(_answer)


def _answer(request):
    if request == "environment":
        return repr(dict(os.environ))
    if request == "die":
        os._exit(3)
    if request == "sleep":
        time.sleep(600)
    while request == "spin":
        pass
    return [request, os.getpid()]

"""Text to token ids and back, as llama.cpp's server and vLLM do it."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from trimix_gguf.errors import QueueFull
from trimix_gguf.roles import ROLES
from trimix_gguf.server.fields import Fields
from trimix_gguf.trio.trio import Trio


class Tokens:
    """The tokenizer of a trio; `most` calls may wait for it."""

    def __init__(self, trio: Trio, *, most: int) -> None:
        self._trio, self._model, self._most = trio, trio.models[ROLES[0]], most
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tokenize")
        self._n_aside = 0

    async def tokenize(self, fields: Fields) -> dict[str, Any]:
        """The ids of `content` (llama.cpp's name) or `prompt` (vLLM's).

        As there, control tokens in a `prompt` are read as such; in a `content` they are text,
        unless parse_special says otherwise.
        """
        content, prompt = fields.text("content"), fields.text("prompt")
        begin = [fields.boolean(name) for name in ("add_special", "add_special_tokens")]
        special = fields.take("parse_special")
        fields.done()
        if type(special) not in (bool, type(None)):
            fields.wrong("parse_special", special, "true or false")
        special = content is None if special is None else special
        text = prompt if content is None else content
        if text is None:
            fields.wrong("content", None, "a string")
        model = self._model
        ids = await self.aside(lambda: model.tokenize(model.normalize(text), special=special))
        ids = (model.bos if any(begin) else []) + ids
        return {"tokens": ids, "count": len(ids), "max_model_len": self._trio.n_ctx}

    async def detokenize(self, fields: Fields) -> dict[str, Any]:
        """The text of `tokens`, under llama.cpp's name and vLLM's."""
        ids, n_vocab = fields.take("tokens"), self._trio.n_vocab
        fields.done()
        if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < n_vocab for i in ids):
            fields.wrong("tokens", ids, f"a list of token ids below {n_vocab}")
        text = await self.aside(lambda: self._trio.text(ids))
        return {"content": text, "prompt": text}

    def info(self) -> dict[str, Any]:
        """What vLLM's /tokenizer_info says; lm-evaluation-harness asks for it."""
        pieces = {
            f"{name}_token": self._model.piece(token, special=True).decode("utf-8", "replace")
            for name, token in self._model.special_tokens().items()
        }
        names = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"))
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **names,
            **pieces,
            "add_bos_token": bool(self._model.bos),
            "model_max_length": self._trio.n_ctx,
            "chat_template": self._model.chat_template,
        }

    async def aside(self, call: Callable[[], Any]) -> Any:
        """What a call gives that tokenizes, in a thread of its own; raises QueueFull."""
        if self._n_aside > self._most:
            raise QueueFull(f"{self._n_aside} requests wait already; try again later")
        self._n_aside += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, call)
        finally:
            self._n_aside -= 1

    def close(self) -> None:
        """End its thread."""
        self._thread.shutdown()

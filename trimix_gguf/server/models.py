"""What clients are told of the trios: OpenAI's list of models, and Ollama's."""

import hashlib
import time
from datetime import UTC, datetime
from typing import Any

from trimix_gguf.roles import ROLES
from trimix_gguf.server.limits import Limits
from trimix_gguf.server.tools import takes_tools
from trimix_gguf.server.trios import Engine, Entry, Trios, defaults_of

_FAMILY = "trimix"
_NEVER = "9999-12-31T23:59:59Z"


class Models:
    """The trios of a server, as OpenAI's and Ollama's clients expect models."""

    def __init__(self, trios: Trios, limits: Limits) -> None:
        self._trios, self._limits = trios, limits
        self._created = time.time()

    def openai(self) -> dict[str, Any]:
        """The list of /v1/models."""
        data = [self.openai_model(entry) for entry in self._trios.entries]
        return {"object": "list", "data": data}

    def openai_model(self, entry: Entry) -> dict[str, Any]:
        """One model of it."""
        # Of calls that name none; None where each prompt chooses its own.
        fixed, tuning = defaults_of(entry, self._limits).fixed, entry.tuning
        said: dict[str, Any] = {
            "description": entry.description or None,
            "weights": fixed and [fixed.weights.alpha, fixed.weights.beta],
            "tuning": tuning and {"verdict": tuning.words, "n_exercises": tuning.n},
        }
        if entry.task is not None:
            said["task"] = entry.task.name
        if not self._trios.is_single:
            said["languages"] = entry.languages
        return {
            "id": entry.name,
            "object": "model",
            "created": int(self._created),
            "owned_by": _FAMILY,
            "max_model_len": entry.n_ctx,
            "trimix": said,
        }

    def tags(self) -> dict[str, Any]:
        """The list of /api/tags."""
        return {"models": [self._tag(entry) for entry in self._trios.entries]}

    def loaded(self) -> dict[str, Any]:
        """The list of /api/ps: trios in memory. They stay until others need the room."""
        told = {"expires_at": _NEVER, "size_vram": 0}
        here = [entry for entry in self._trios.entries if self._trios.is_loaded(entry)]
        return {
            "models": [
                {**self._tag(entry), **told, "context_length": entry.n_ctx} for entry in here
            ]
        }

    def shown(self, entry: Entry, engine: Engine) -> dict[str, Any]:
        """What /api/show says of one of them."""
        template = engine.trio.models[ROLES[0]].chat_template
        return {
            "modelfile": "",
            "parameters": "",
            "template": template or "",
            "details": _details(),
            "model_info": {
                "general.architecture": _FAMILY,
                "general.basename": entry.name,
                f"{_FAMILY}.context_length": entry.n_ctx,
            },
            "capabilities": ["completion", *(["tools"] if takes_tools(template) else [])],
            "modified_at": self._modified,
        }

    @property
    def _modified(self) -> str:
        return datetime.fromtimestamp(self._created, UTC).isoformat().replace("+00:00", "Z")

    def _tag(self, entry: Entry) -> dict[str, Any]:
        return {
            "name": entry.name,
            "model": entry.name,
            "modified_at": self._modified,
            "size": entry.n_bytes,
            # Clients cut it to show it; here it stands for the name.
            "digest": hashlib.sha256(entry.name.encode()).hexdigest(),
            "details": _details(),
        }


def _details() -> dict[str, Any]:
    return {
        "parent_model": "",
        "format": "gguf",
        "family": _FAMILY,
        "families": [_FAMILY],
        "parameter_size": "",
        "quantization_level": "",
    }

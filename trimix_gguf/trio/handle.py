"""Handles of llama.cpp that a model loses when it is closed."""

from typing import Any

from trimix_gguf.errors import ModelError


class Handle:
    """An attribute of a Model; ModelError once it is gone, where llama.cpp would crash."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, model: Any, owner: type) -> Any:
        try:
            return vars(model)[self._name]
        except KeyError:
            raise ModelError(f"{model.path.name} is closed; open its trio again") from None

    def __set__(self, model: Any, value: Any) -> None:
        vars(model)[self._name] = value

    def __delete__(self, model: Any) -> None:
        vars(model).pop(self._name, None)

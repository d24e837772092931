"""Added tokens that take the spaces beside them, which llama.cpp has no word for.

Source: tokenizers/src/tokenizer/added_vocabulary.rs of Hugging Face's tokenizers.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from trimix_gguf.machine.gguf_file import GGUFFile
from trimix_gguf.machine.vocabulary import STRIPPING

_CONTROL, _USER_DEFINED = 3, 4  # llama.cpp's token types


@dataclass(frozen=True)
class AddedTokens:
    """Added tokens by their text, longest first; `left` and `right` are the ids that strip."""

    text_ids: Mapping[str, int]
    control: frozenset[int]
    left: frozenset[int]
    right: frozenset[int]

    @staticmethod
    def of(file: GGUFFile) -> "AddedTokens | None":
        """Those of a file; None where none takes spaces, so that llama.cpp cuts a text right."""
        left, right = (frozenset(file.array(STRIPPING[s]) or ()) for s in ("lstrip", "rstrip"))
        if not left | right:
            return None
        texts = file.array("tokenizer.ggml.tokens") or []
        types = file.array("tokenizer.ggml.token_type") or []
        added = [i for i, kind in enumerate(types) if kind in (_CONTROL, _USER_DEFINED)]
        added.sort(key=lambda i: -len(texts[i]))
        return AddedTokens(
            {texts[i].decode("utf-8", "replace"): i for i in added},
            frozenset(i for i in added if types[i] == _CONTROL),
            left,
            right,
        )

    def tokenize(self, text: str, plain: Callable[[str], list[int]], *, special: bool) -> list[int]:
        """Ids of a text; `plain` cuts what is between added tokens. `special`: control ones too."""
        ids: list[int] = []
        done = 0
        for start, end, token in self._matches(text, special):
            start = max(start, done)  # its beginning may be spaces that the last one has taken
            if token in self.left:
                start = done + len(text[done:start].rstrip())
            if token in self.right:
                end += len(text[end:]) - len(text[end:].lstrip())
            ids += plain(text[done:start]) if done < start else []
            ids.append(token)
            done = max(done, end)
        return ids + (plain(text[done:]) if done < len(text) else [])

    def _matches(self, text: str, special: bool) -> Iterator[tuple[int, int, int]]:
        """Start, end and id of each added token: at each place the longest, from the left."""
        wanted = {t: i for t, i in self.text_ids.items() if special or i not in self.control}
        if wanted:
            for match in re.finditer("|".join(map(re.escape, wanted)), text):
                yield match.start(), match.end(), wanted[match[0]]

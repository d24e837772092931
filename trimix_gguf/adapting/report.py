"""What came of raw text: what was read, dropped and why, and what is left to learn from."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

N_SAMPLES = 3
_SAMPLE = 70  # characters shown of a sample


@dataclass
class Dropped:
    """What was left out for one reason."""

    n: int = 0
    n_characters: int = 0
    samples: list[str] = field(default_factory=list)

    def add(self, text: str) -> None:
        """Count one more."""
        self.n += 1
        self.n_characters += len(text)
        if len(self.samples) < N_SAMPLES:
            shown = " ".join(text.split())[:_SAMPLE]
            self.samples.append(shown.encode(errors="replace").decode())


@dataclass
class Part:
    """Some documents."""

    n_documents: int = 0
    n_characters: int = 0
    n_tokens: int = 0

    def add(self, text: str) -> None:
        """Count one more; its tokens are counted elsewhere."""
        self.n_documents += 1
        self.n_characters += len(text)

    @property
    def tokens_per_character(self) -> float:
        """How finely the vocabulary cuts this text."""
        return self.n_tokens / max(self.n_characters, 1)


@dataclass
class Report:
    """Everything that preparing text found; `files` by name, `dropped` by reason."""

    files: dict[str, Part] = field(default_factory=dict)
    dropped: dict[str, Dropped] = field(default_factory=dict)
    scripts: Counter[str] = field(default_factory=Counter)
    script: str = ""
    learned: Part = field(default_factory=Part)
    heldout: Part = field(default_factory=Part)
    english_tokens_per_character: float = 0.0

    def drop(self, reason: str, text: str) -> None:
        """Count what is left out, with a sample."""
        self.dropped.setdefault(reason, Dropped()).add(text)

    def dropped_in_short(self) -> str:
        """What was left out and why, as the end of a sentence; '' where nothing was."""
        found = [f"{gone.n:,} {reason}" for reason, gone in self.dropped.items()]
        return f"; dropped: {', '.join(found)}" if found else ""

    @property
    def hardness(self) -> float:
        """Tokens per character, beside English: 1 is as easy."""
        return self.learned.tokens_per_character / max(self.english_tokens_per_character, 1e-9)

    def to_json(self) -> dict[str, Any]:
        """As JSON has it."""
        return {**asdict(self), "scripts": dict(self.scripts.most_common())}

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> "Report":
        """From what to_json gave."""
        return Report(
            files={name: Part(**part) for name, part in value["files"].items()},
            dropped={name: Dropped(**part) for name, part in value["dropped"].items()},
            scripts=Counter(value["scripts"]),
            script=value["script"],
            learned=Part(**value["learned"]),
            heldout=Part(**value["heldout"]),
            english_tokens_per_character=value["english_tokens_per_character"],
        )

    def lines(self) -> list[str]:
        """In words, for a person."""
        read = Part(*(sum(getattr(p, n) for p in self.files.values()) for n in _COUNTED))
        total = sum(self.scripts.values())
        shares = [f"{s} {n / total:.0%}" for s, n in self.scripts.most_common(3)]
        return [
            f"read      {_part(read)} in {len(self.files):,} files; scripts: {', '.join(shares)}",
            *(line for reason, gone in self.dropped.items() for line in _dropped(reason, gone)),
            f"held out  {_part(self.heldout)}, for measuring",
            f"left      {_part(self.learned)}, {self.learned.n_tokens:,} tokens",
            f"vocabulary: {self.learned.tokens_per_character:.2f} tokens per character, English "
            f"{self.english_tokens_per_character:.2f}: {self.hardness:.1f} times as many",
        ]


_COUNTED = ("n_documents", "n_characters", "n_tokens")


def _part(part: Part) -> str:
    return f"{part.n_documents:,} documents, {part.n_characters:,} characters"


def _dropped(reason: str, gone: Dropped) -> list[str]:
    first = f"dropped   {gone.n:,} {reason}, {gone.n_characters:,} characters"
    return [first, *(f"            {sample}" for sample in gone.samples)]

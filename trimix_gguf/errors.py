"""Everything this package raises for a caller to handle.

TrimixError
 ├── BuildError           llama.cpp cannot be built here, or does not run here
 ├── ModelFileError       a GGUF that is absent, damaged or not one
 ├── ModelError           llama.cpp refused to load, decode or rewind
 │    └── ContextFullError    no room left in a KV cache
 ├── WorkerError          a worker that cannot be used, or was lost
 ├── MemoryNeededError    a trio larger than this machine's free memory
 ├── VocabularyMismatch   models that do not speak the same tokens
 ├── PromptError          a prompt that cannot be read, scored or fitted
 ├── WeightsError         weights or a grid outside what the mix allows
 ├── SamplerError         a grammar or setting that llama.cpp refuses
 │    ├── SchemaError         a JSON schema that no answer could be held to
 │    └── NothingAllowed      grammar, biases and masks together rule out every token
 ├── DataError            evaluation data that is absent, damaged or not what a task asks for
 ├── TrioFileError        a trio that is unknown, incomplete, damaged, or not one
 ├── QueueFull            more requests at once than may wait
 ├── HubError             what the Hugging Face hub has cannot be brought here
 ├── ProgramError         wheels of this program that cannot be had or written
 └── ConversionError      a checkpoint that cannot become a GGUF

Each message is one line: what was expected, what came, and the mend.
"""


class TrimixError(Exception):
    """Base of every error that a user's input or machine can cause."""


class BuildError(TrimixError):
    """llama.cpp cannot be built on this machine, or does not run on it."""


class ModelFileError(TrimixError):
    """A file that is absent, damaged or not a GGUF."""


class ModelError(TrimixError):
    """llama.cpp refused to load, decode or rewind."""


class ContextFullError(ModelError):
    """No room left in a KV cache."""


class WorkerError(TrimixError):
    """A worker on another machine that cannot be used, or was lost."""


class MemoryNeededError(TrimixError):
    """More memory than this machine has free."""


class VocabularyMismatch(TrimixError):
    """Models of one trio that do not speak the same tokens."""


class PromptError(TrimixError):
    """A prompt that cannot be read, scored or fitted."""


class WeightsError(TrimixError):
    """Weights or a grid outside what the mix allows."""


class SamplerError(TrimixError):
    """A grammar or a sampling setting that llama.cpp refuses."""


class SchemaError(SamplerError):
    """A JSON schema that no answer could be held to."""


class NothingAllowed(SamplerError):
    """Grammar, biases and masks together rule out every token."""


class DataError(TrimixError):
    """Evaluation data that is absent, damaged or not what a task asks for."""


class TrioFileError(TrimixError):
    """A trio that is unknown, incomplete, damaged, or not one."""


class QueueFull(TrimixError):
    """More requests at once than may wait."""


class HubError(TrimixError):
    """What the Hugging Face hub has cannot be brought here."""


class ProgramError(TrimixError):
    """Wheels of this program, to install it elsewhere, that cannot be had or written."""


class ConversionError(TrimixError):
    """A checkpoint that cannot become a GGUF."""

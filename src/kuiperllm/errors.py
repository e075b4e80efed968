"""Every exception that KuiperLLM raises on purpose.

A message is one line that says what is wrong, where, and what to do about it. The command line prints it
as it stands and leaves with the class's `exit_code`; the server maps the class to an HTTP status.
"""

from __future__ import annotations


class KuiperError(Exception):
    """The root of the tree: catch this to catch everything that is meant for the user's eyes."""

    exit_code = 1


class UsageError(KuiperError, ValueError):
    """The caller asked for something that makes no sense: a bad option, parameter or argument."""

    exit_code = 2


class SamplingError(UsageError):
    """A sampling parameter is outside its range, or two of them contradict each other."""


class ContextLengthError(UsageError):
    """The prompt does not fit into the context of the model."""


class ConfigError(KuiperError, ValueError):
    """A model configuration is missing a field or contradicts itself."""


class QueueFullError(KuiperError):
    """As many requests wait as may; try again later."""


class EngineStoppedError(KuiperError):
    """The engine was shut down, or failed, and takes no more requests; the message says which."""


class CheckpointError(KuiperError):
    """A checkpoint file is missing, truncated, corrupt, or contradicts its configuration."""


class ExportError(KuiperError):
    """A checkpoint could not be written; nothing of it was kept."""


class UnsupportedError(KuiperError):
    """An architecture, data type or format that this version cannot run; the message lists what it can."""


class DownloadError(KuiperError):
    """A model could not be fetched from the hub."""


class TokenizerError(KuiperError):
    """A tokenizer file is missing, corrupt or of an unknown kind, or a token id is out of range."""


class ChatTemplateError(KuiperError):
    """There is no chat template, or it refused the messages or failed on them."""


class DeviceError(KuiperError):
    """A device is unknown, absent, or not the one that the operands live on."""


class OutOfMemoryError(KuiperError, MemoryError):
    """A device has less free memory than is needed; the message states both and what to change."""


class ShapeError(KuiperError, ValueError):
    """A tensor's shape does not match the contract of the operation it is given to."""


class DTypeError(KuiperError, TypeError):
    """A tensor's data type does not match the contract of the operation it is given to."""


class MemoryLifetimeError(KuiperError):
    """Memory was used after its owner released it."""


class DLPackError(KuiperError, BufferError):
    """Memory cannot be exchanged with another library in the way that was asked for."""


class KernelError(KuiperError):
    """A kernel could not be compiled or loaded, or there is none for these operands."""

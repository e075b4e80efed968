"""The tokenizer of a source, in the form that each format wants it in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kuiperllm.checkpoint import Checkpoint
from kuiperllm.engine.loading import open_tokenizer, tokenizer_source
from kuiperllm.errors import TokenizerError, UnsupportedError, UsageError
from kuiperllm.text import Tokenizer
from kuiperllm.text.files import read_bytes
from kuiperllm.text.writing import gguf_tokenizer, llama2c_tokenizer, tokenizer_files

_LLAMA2C_FILE = "tokenizer.bin"
_COPIED_KINDS = ("tokenizer.json", "vocab.json + merges.txt", "sentencepiece")
_VOCABULARIES = {
    "tokenizer.json": "tokenizer.json",
    "sentencepiece": "tokenizer.model",
    "vocab.json + merges.txt": "vocab.json",
}
"""By the kind of a tokenizer, the customary name of its main file."""
_COPIED_FILES = (
    *_VOCABULARIES.values(),
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)


class SourceTokenizer:
    """The tokenizer of a checkpoint, or the one at another path.

    Args:
        checkpoint: the source.
        named: a tokenizer's file or folder; None: the checkpoint's own, which may be missing.

    Raises:
        TokenizerError: there is no tokenizer at `named`, or it is damaged.
    """

    def __init__(self, checkpoint: Checkpoint, named: str | Path | None) -> None:
        self._checkpoint = checkpoint
        self._named = named
        self.notes: list[str] = []
        """What a user should know, a sentence each."""
        self._tokenizer: Tokenizer | None = None
        try:
            self._tokenizer = open_tokenizer(checkpoint, named)
        except (TokenizerError, UnsupportedError) as error:
            if named is not None:
                raise
            self.notes.append(f"exported without a tokenizer: {error}")

    def require(self, why: str) -> Tokenizer:
        """The tokenizer.

        Raises:
            UsageError: there is none.
        """
        if self._tokenizer is None:
            raise UsageError(f"{why} takes a tokenizer; name one with --tokenizer")
        return self._tokenizer

    def is_at(self, path: Path) -> bool:
        """Whether the tokenizer is read from this file."""
        return self._tokenizer is not None and tokenizer_source(self._checkpoint, self._named) == path

    def files(self) -> dict[str, bytes]:
        """For a folder, by name: copies of the source's, or new ones where it has another form.

        Raises:
            TokenizerError: a file cannot be read any more.
        """
        if self._tokenizer is None:
            return {}
        source, kind = tokenizer_source(self._checkpoint, self._named), self._tokenizer.kind
        if source is None or kind not in _COPIED_KINDS:
            return tokenizer_files(self._tokenizer)
        folder = source if source.is_dir() else source.parent
        copies = {name: read_bytes(folder / name) for name in _COPIED_FILES if (folder / name).is_file()}
        if not source.is_dir() and source.name not in copies:  # a file of an unusual name
            copies = {name: data for name, data in copies.items() if name not in _VOCABULARIES.values()}
            copies[_VOCABULARIES[kind]] = read_bytes(source)
        return copies

    def gguf_keys(self) -> dict[str, Any]:
        """The keys `tokenizer.*`: a GGUF source's own, or new ones.

        Raises:
            UnsupportedError: GGUF has no name for what the tokenizer does.
        """
        metadata = self._checkpoint.metadata
        if self._named is None and "tokenizer.ggml.model" in metadata:
            return {key: value for key, value in metadata.items() if key.startswith("tokenizer.")}
        if self._tokenizer is None:
            return {}
        return gguf_tokenizer(self._tokenizer, self._checkpoint.config.vocab_size)

    def llama2c_files(self) -> dict[str, bytes]:
        """tokenizer.bin, by name, if llama2.c can work with this tokenizer; else there is a note."""
        if self._tokenizer is None:
            return {}
        try:
            data = llama2c_tokenizer(self._tokenizer, self._checkpoint.config.vocab_size)
        except UnsupportedError:
            data = None
        if data is None:
            kind = self._tokenizer.kind
            self.notes.append(f"no {_LLAMA2C_FILE}: llama2.c cannot work with a tokenizer of the kind {kind}")
            return {}
        return {_LLAMA2C_FILE: data}

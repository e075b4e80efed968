"""Reading tokenizer files: bounded, and with errors that name the file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from kuiperllm.errors import TokenizerError
from kuiperllm.text.tokenizer import MAX_VOCAB_SIZE, one_line

# The largest tokenizer.json in wide use has 33 MB; whatever is far above that is another kind of file.
MAX_FILE_BYTES = 64 << 20

T = TypeVar("T")


def read_bytes(path: Path) -> bytes:
    """The contents of a regular file of reasonable size.

    Raises:
        TokenizerError: it is missing, not a regular file, empty or too large.
    """
    try:
        if not path.is_file():
            raise TokenizerError(f"{path}: {'not a regular file' if path.exists() else 'no such file'}")
        if (size := path.stat().st_size) > MAX_FILE_BYTES:
            raise TokenizerError(f"{path}: {size >> 20} MiB is too large for a tokenizer file")
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        raise TokenizerError(f"{path}: cannot be read: {one_line(error)}") from None
    if not data:
        raise TokenizerError(f"{path}: the file is empty")
    return data


def read_text(path: Path) -> str:
    """The contents of a UTF-8 file.

    Raises:
        TokenizerError: as `read_bytes`, or it is not UTF-8.
    """
    return as_text(read_bytes(path), str(path))


def as_text(data: bytes, where: str) -> str:
    """Bytes read as UTF-8, without a byte order mark.

    Raises:
        TokenizerError: they are not UTF-8.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{where}: not UTF-8 text (byte {error.start})") from None


def parse_object(text: str, where: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        TokenizerError: the text is not JSON, or not an object.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{where}: not valid JSON: {one_line(error)}") from None
    if not isinstance(value, dict):
        raise TokenizerError(f"{where}: must hold a JSON object, not a {type(value).__name__}")
    return value


def is_id(value: object) -> bool:
    """Whether a JSON value can be a token id."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MAX_VOCAB_SIZE


def checked_vocab(vocab: object, where: str) -> dict[str, int]:
    """A mapping from token to id, both unique.

    Raises:
        TokenizerError: it is something else.
    """
    if not isinstance(vocab, dict) or not vocab:
        raise TokenizerError(f"{where}: the vocabulary must be a JSON object of tokens and ids")
    for token, token_id in vocab.items():
        if not is_id(token_id):
            raise TokenizerError(f"{where}: token {token!r} has the impossible id {token_id!r}")
    if len(set(vocab.values())) != len(vocab):
        raise TokenizerError(f"{where}: two tokens share one id")
    return vocab


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token that is matched in the text before everything else; fields as in Hugging Face files."""

    token_id: int
    content: str
    special: bool = True
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False

    @classmethod
    def from_json(cls, token_id: object, raw: object, where: str) -> AddedToken:
        """Read an entry of `added_tokens` or `added_tokens_decoder`.

        Raises:
            TokenizerError: a field is missing or of the wrong type.
        """
        if not isinstance(raw, Mapping) or not isinstance(raw.get("content"), str) or not raw["content"]:
            raise TokenizerError(f"{where}: added token {token_id!r} has no content")
        if not isinstance(token_id, int) or not is_id(token_id):
            raise TokenizerError(
                f"{where}: added token {raw['content']!r} has the impossible id {token_id!r}"
            )
        flags = {name: raw.get(name, False) for name in ("lstrip", "rstrip", "single_word", "special")}
        flags["normalized"] = raw.get("normalized", not flags["special"])
        for name, value in flags.items():
            if not isinstance(value, bool):
                raise TokenizerError(f"{where}: added token {raw['content']!r}: {name} must be true or false")
        return cls(token_id, raw["content"], **flags)


@dataclass(frozen=True, slots=True)
class TokenizerConfig:
    """What tokenizer_config.json and the files beside it say; empty where there are none."""

    tokenizer_class: str | None = None
    bos_token: str | None = None
    eos_token: str | None = None
    add_bos: bool | None = None
    add_prefix_space: bool = False
    chat_template: str | None = None
    added_tokens: tuple[AddedToken, ...] = ()

    @classmethod
    def read(cls, folder: Path) -> TokenizerConfig:
        """Read a folder's tokenizer_config.json, special_tokens_map.json and chat template.

        Raises:
            TokenizerError: one of them is corrupt or has a field of the wrong type.
        """
        path = folder / "tokenizer_config.json"
        where = str(path)
        raw = _optional_object(path)
        names = _optional_object(folder / "special_tokens_map.json")
        return cls(
            tokenizer_class=_typed(raw, "tokenizer_class", str, where),
            bos_token=_token_name(raw, "bos_token", where) or _token_name(names, "bos_token", where),
            eos_token=_token_name(raw, "eos_token", where) or _token_name(names, "eos_token", where),
            add_bos=_typed(raw, "add_bos_token", bool, where),
            add_prefix_space=bool(_typed(raw, "add_prefix_space", bool, where)),
            chat_template=_chat_template(folder, raw, where),
            added_tokens=_added_tokens(raw, where),
        )


def _optional_object(path: Path) -> dict[str, Any]:
    return parse_object(read_text(path), str(path)) if path.exists() else {}


def _typed(raw: Mapping[str, Any], name: str, kind: type[T], where: str) -> T | None:
    value = raw.get(name)
    if value is not None and not isinstance(value, kind):
        raise TokenizerError(f"{where}: {name} must be a {kind.__name__}, not {one_line(repr(value), 40)}")
    return value


def _token_name(raw: Mapping[str, Any], name: str, where: str) -> str | None:
    """A special token's text, which is written either as a string or as an object with `content`."""
    value = raw.get(name)
    content = value.get("content") if isinstance(value, Mapping) else value
    if content is not None and not isinstance(content, str):
        raise TokenizerError(f"{where}: {name} must be a token's text")
    return content or None


def _added_tokens(raw: Mapping[str, Any], where: str) -> tuple[AddedToken, ...]:
    decoder = _typed(raw, "added_tokens_decoder", dict, where) or {}
    tokens = []
    for key, value in decoder.items():
        token_id = int(key) if key.isascii() and key.isdecimal() and len(key) < 10 else key
        tokens.append(AddedToken.from_json(token_id, value, where))
    return tuple(sorted(tokens, key=lambda token: token.token_id))


def _chat_template(folder: Path, raw: Mapping[str, Any], where: str) -> str | None:
    """The chat template: a file of its own wins over the field in tokenizer_config.json."""
    if (path := folder / "chat_template.jinja").exists():
        return read_text(path)
    if (path := folder / "chat_template.json").exists():
        raw, where = parse_object(read_text(path), str(path)), str(path)
    value = raw.get("chat_template")
    if isinstance(value, list):  # several named templates
        named = {t.get("name"): t.get("template") for t in value if isinstance(t, Mapping)}
        value = named.get("default")
    if value is not None and not isinstance(value, str):
        raise TokenizerError(f"{where}: chat_template must be a text or a list with one named 'default'")
    return value

"""Byte-level BPE tokenizers from loose files: vocab.json with merges.txt, and Meta's rank files."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kuiperllm.errors import TokenizerError
from kuiperllm.text.byte_level import Family, build_pipeline, piece_of_bytes
from kuiperllm.text.files import (
    AddedToken,
    TokenizerConfig,
    checked_vocab,
    read_text,
)
from kuiperllm.text.pipeline import BYTE_LEVEL, PipelineTokenizer, add_tokens, end_tokens
from kuiperllm.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    import tokenizers

# Longest token of a rank file, and longest file: deriving merges takes time in proportion to length times
# size.
MAX_RANKED_BYTES = 256
MAX_RANK_FILE_BYTES = 16 << 20


# --- vocab.json and merges.txt ----------------------------------------------------------------------------


def load_vocab_and_merges(
    path: Path, raw: dict[str, Any], merges_path: Path, config: TokenizerConfig
) -> Tokenizer:
    """Build a tokenizer from GPT-2's two files and the added tokens of tokenizer_config.json.

    Args:
        path: vocab.json, for messages.
        raw: its contents.
        merges_path: merges.txt.
        config: what tokenizer_config.json says.

    Raises:
        TokenizerError: a file is missing or corrupt.
    """
    where = str(path)
    vocab = checked_vocab(raw, where)
    merges = parse_merges(read_text(merges_path).split("\n"), str(merges_path))
    family = _FAMILY_OF_CLASS.get((config.tokenizer_class or "").removesuffix("Fast"))
    if family is None:
        family = Family.guess(vocab, (token.content for token in config.added_tokens))
    native = build_pipeline(
        vocab, merges, family, where=str(merges_path), add_prefix_space=config.add_prefix_space
    )
    add_bos = family is Family.LLAMA3 if config.add_bos is None else config.add_bos
    return _finish(native, vocab, config, kind="vocab.json + merges.txt", add_bos=add_bos, where=where)


_FAMILY_OF_CLASS = {"GPT2Tokenizer": Family.GPT2, "Qwen2Tokenizer": Family.QWEN2}


def parse_merges(lines: Iterable[str], where: str) -> list[tuple[str, str]]:
    """Merge rules, one on each line as two tokens with a blank between; a `#version` line may come first.

    Raises:
        TokenizerError: a line is not of that form.
    """
    merges = []
    for number, line in enumerate(lines, start=1):
        if number == 1 and line.startswith("#version"):
            continue
        parts = line.rstrip("\r").split(" ")
        if len(parts) == 2 and parts[0] and parts[1]:
            merges.append((parts[0], parts[1]))
        elif parts != [""]:
            raise TokenizerError(f"{where}: line {number} is not a merge of two tokens: {line[:40]!r}")
    return merges


def _finish(
    native: tokenizers.Tokenizer,
    vocab: Mapping[str, int],
    config: TokenizerConfig,
    *,
    kind: str,
    add_bos: bool,
    where: str,
) -> Tokenizer:
    """Add the configured tokens to a pipeline and describe the result."""
    added = config.added_tokens
    add_tokens(native, added, where)
    special = {token.content: token.token_id for token in added if token.special}
    id_of: Callable[[str], int | None] = native.token_to_id
    return PipelineTokenizer(
        native,
        BYTE_LEVEL,
        kind=kind,
        vocab_size=max([*vocab.values(), *(token.token_id for token in added)]) + 1,
        special_tokens=special,
        bos_token_id=None if config.bos_token is None else id_of(config.bos_token),
        eos_token_ids=end_tokens(config, id_of, special),
        add_bos=add_bos,
        chat_template=config.chat_template,
    )


# --- tiktoken form ----------------------------------------------------------------------------------------

# Meta's names for the 256 ids behind the ranks, as of Llama 3.1; Llama 3 has the same meanings where it
# uses them.
_META_SPECIAL = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|step_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    "<|image|>",
    *(f"<|reserved_special_token_{i}|>" for i in range(2, 246)),
)


def load_tiktoken(path: Path, data: bytes, config: TokenizerConfig) -> Tokenizer:
    """Build Llama 3's tokenizer from Meta's tokenizer.model: lines of a token in base64 and its rank.

    Special tokens follow the ranks: those of tokenizer_config.json if it is there, else Meta's 256.

    Raises:
        TokenizerError: the file is corrupt.
    """
    where = str(path)
    vocab = {piece_of_bytes(token): rank for token, rank in parse_ranks(data, where).items()}
    if not config.added_tokens:
        config = TokenizerConfig(
            bos_token="<|begin_of_text|>",
            chat_template=config.chat_template,
            added_tokens=tuple(AddedToken(len(vocab) + i, name) for i, name in enumerate(_META_SPECIAL)),
        )
    native = build_pipeline(vocab, merges_of_ranks(vocab), Family.LLAMA3, where=where)
    add_bos = config.add_bos is not False
    return _finish(native, vocab, config, kind="tiktoken", add_bos=add_bos, where=where)


def parse_ranks(data: bytes, where: str) -> dict[bytes, int]:
    """The tokens of a tiktoken file, in the order of their ranks.

    Raises:
        TokenizerError: a line is malformed, the ranks are not 0, 1, 2, …, or a byte has no token.
    """
    if len(data) > MAX_RANK_FILE_BYTES:
        raise TokenizerError(f"{where}: {len(data) >> 20} MiB is too large for a list of ranks")
    tokens: list[tuple[int, bytes]] = []
    for number, line in enumerate(data.splitlines(), start=1):
        if not line:
            continue
        try:
            encoded, rank = line.split(b" ")
            token = base64.b64decode(encoded, validate=True)
            tokens.append((int(rank), token))
        except ValueError:
            raise TokenizerError(f"{where}: line {number} is not a token in base64 and its rank") from None
        if not 0 < len(token) <= MAX_RANKED_BYTES:
            raise TokenizerError(f"{where}: the token in line {number} has {len(token)} bytes")
    tokens.sort()
    if [rank for rank, _ in tokens] != list(range(len(tokens))):
        raise TokenizerError(f"{where}: the ranks are not 0 to {len(tokens) - 1}, each once")
    ranks = {token: rank for rank, token in tokens}
    if len(ranks) != len(tokens):
        raise TokenizerError(f"{where}: two ranks share one token")
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise TokenizerError(f"{where}: byte {missing[0]:#04x} has no token ({len(missing)} are missing)")
    return ranks


def merges_of_ranks(vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    """The merges that lead to each token, in the order of the tokens' ranks.

    A rank file lists tokens, not pairs: any two neighbours whose concatenation is a token may merge, and
    the lowest rank goes first. As a list that is every way to cut every token in two, by the ranks of the
    token and its parts.
    """
    merges: list[tuple[str, str]] = []
    for token in sorted(vocab, key=vocab.__getitem__):
        pairs = []
        for cut in range(1, len(token)):
            left = token[:cut]
            if left in vocab and (right := token[cut:]) in vocab:
                pairs.append((left, right))
        if len(pairs) > 1:
            pairs.sort(key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
        merges += pairs
    return merges

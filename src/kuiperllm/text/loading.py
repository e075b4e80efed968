"""Find a tokenizer's files and tell their kinds apart by their contents."""

from __future__ import annotations

from pathlib import Path

from kuiperllm.errors import TokenizerError
from kuiperllm.text.bpe_files import load_tiktoken, load_vocab_and_merges
from kuiperllm.text.files import TokenizerConfig, as_text, parse_object, read_bytes
from kuiperllm.text.pipeline import load_tokenizer_json
from kuiperllm.text.spm import load_llama2c, load_sentencepiece, looks_like_llama2c
from kuiperllm.text.tokenizer import Tokenizer

# In a folder, the first of these that is there is read.
_CANDIDATES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer.bin")


def load_tokenizer(path: Path, *, config_dir: Path | None = None) -> Tokenizer:
    """Load a tokenizer; its kind is recognised from the content, not from the name.

    Args:
        path: a folder as Hugging Face or Meta lay it out, or one file: tokenizer.json, vocab.json (merges.txt
            beside it), a SentencePiece model, a tiktoken-form model, or a llama2.c tokenizer.bin.
        config_dir: where tokenizer_config.json, special_tokens_map.json and the chat template lie; default:
            beside the file. They are optional.

    Raises:
        TokenizerError: there is no tokenizer, or a file is corrupt or of an unknown kind.
    """
    path = Path(path)
    if path.is_dir():
        found = next((path / name for name in _CANDIDATES if (path / name).exists()), None)
        if found is None:
            raise TokenizerError(f"{path}: no tokenizer there; looked for {', '.join(_CANDIDATES)}")
        path = found
    data = read_bytes(path)
    if looks_like_llama2c(data):
        return load_llama2c(path, data)
    config = TokenizerConfig.read(path.parent if config_dir is None else config_dir)
    if data.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{"):
        return _load_json(path, as_text(data, str(path)), config)
    if _looks_like_sentencepiece(data):
        return load_sentencepiece(path, data, config)
    if _looks_like_ranks(data):
        return load_tiktoken(path, data, config)
    hint = "; the tokenizer inside a GGUF file is read with the model" if data.startswith(b"GGUF") else ""
    raise TokenizerError(
        f"{path}: not a tokenizer of a known kind (tokenizer.json, vocab.json, SentencePiece, tiktoken, "
        f"llama2.c){hint}"
    )


def _load_json(path: Path, text: str, config: TokenizerConfig) -> Tokenizer:
    raw = parse_object(text, str(path))
    if "model" in raw and not isinstance(raw["model"], int):
        return load_tokenizer_json(path, text, raw, config)
    if "tokenizer_class" in raw or "added_tokens_decoder" in raw:
        raise TokenizerError(f"{path}: describes a tokenizer but is none; give its folder")
    merges = path.with_name("merges.txt")
    if not merges.exists():
        raise TokenizerError(f"{path}: looks like a vocabulary, but there is no {merges.name} beside it")
    return load_vocab_and_merges(path, raw, merges, config)


def _looks_like_sentencepiece(data: bytes) -> bool:
    """Whether the bytes begin with field 1 holding a message that begins with a piece, which is not empty."""
    return len(data) > 4 and data[0] == 0x0A and 0x0A in (data[2], data[3]) and data[1] != 0


def _looks_like_ranks(data: bytes) -> bool:
    """Whether the first line is a word of base64 and a number."""
    words = data[:1024].split(b"\n", 1)[0].split()
    return len(words) == 2 and words[1].isdigit() and words[0].isascii()

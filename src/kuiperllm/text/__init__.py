"""Text: tokenizers of every file format, chat templates and streaming output."""

from kuiperllm.text.chat_template import ChatTemplate
from kuiperllm.text.detokenizer import Detokenizer, StopStrings
from kuiperllm.text.gguf_vocab import tokenizer_from_gguf
from kuiperllm.text.loading import load_tokenizer
from kuiperllm.text.tokenizer import Tokenizer

__all__ = [
    "ChatTemplate",
    "Detokenizer",
    "StopStrings",
    "Tokenizer",
    "load_tokenizer",
    "tokenizer_from_gguf",
]

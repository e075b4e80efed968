"""Tokenizers in the form of other files: Hugging Face folders, GGUF headers, llama2.c's tokenizer.bin."""

from kuiperllm.text.writing.files import tokenizer_files
from kuiperllm.text.writing.gguf import gguf_tokenizer
from kuiperllm.text.writing.llama2c import llama2c_tokenizer

__all__ = ["gguf_tokenizer", "llama2c_tokenizer", "tokenizer_files"]

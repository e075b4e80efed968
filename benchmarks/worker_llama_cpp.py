"""llama.cpp behind the worker protocol, through the C API that llama-cpp-python binds.

Timed: `llama_decode` (the whole prompt as one batch, or one token), reading the last token's logits (which
waits for them), and NumPy's argmax over them. Not timed: loading, filling the batch structure, clearing the
KV cache, the prompt in front of a decode. Logits are asked for at the last token only.

Runs in the scratch environment; see `peers.py`.
"""

from __future__ import annotations

import ctypes
from importlib.metadata import version
from time import perf_counter
from typing import Any

import llama_cpp
import numpy as np
from llama_cpp._ggml import libggml

from worker_protocol import serve

LOAD_MODES = {"mmap": llama_cpp.LLAMA_LOAD_MODE_MMAP, "read": llama_cpp.LLAMA_LOAD_MODE_NONE}
KV_PADDING = 256


class LlamaCpp:
    """One loaded model and context at a time."""

    def __init__(self) -> None:
        llama_cpp.llama_backend_init()
        self.model: Any = None
        self.context: Any = None

    def info(self) -> dict[str, str]:
        """Versions, and the CPU features that the build uses."""
        libggml.ggml_commit.restype = ctypes.c_char_p
        return {
            "name": "llama.cpp",
            "commit": libggml.ggml_commit().decode(),
            "llama_cpp_python": version("llama-cpp-python"),
            "system_info": llama_cpp.llama_print_system_info().decode().strip(),
        }

    def load(
        self, *, path: str, threads: int, context: int, batch: int, flash_attn: bool, load_mode: str
    ) -> None:
        """Load a GGUF file. `context`: tokens that must fit; `batch`: longest prompt, run as one batch."""
        self.unload()
        model_params = llama_cpp.llama_model_default_params()
        model_params.n_gpu_layers = 0
        model_params.load_mode = LOAD_MODES[load_mode]
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), model_params)
        if self.model is None:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = -(-context // KV_PADDING) * KV_PADDING
        params.n_batch = params.n_ubatch = batch
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = (
            llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
            if flash_attn
            else llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        if self.context is None:
            raise RuntimeError("llama.cpp cannot create a context")
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.batch = llama_cpp.llama_batch_init(batch, 0, 1)
        self.tokens = np.random.default_rng(0).integers(0, self.vocab_size, batch).tolist()

    def prefill(self, *, tokens: int) -> float:
        """Seconds from a prompt to its first token, with an empty KV cache."""
        self._clear()
        return self._step(self.tokens[:tokens], 0)[1]

    def decode(self, *, prompt: int, tokens: int) -> float:
        """Seconds for greedy tokens after a prompt that is not timed."""
        self._clear()
        token, _ = self._step(self.tokens[:prompt], 0)
        total = 0.0
        for position in range(prompt, prompt + tokens):
            token, elapsed = self._step([token], position)
            total += elapsed
        return total

    def unload(self) -> None:
        """Free the model, if there is one."""
        if self.context is not None:
            llama_cpp.llama_batch_free(self.batch)
            llama_cpp.llama_free(self.context)
        if self.model is not None:
            llama_cpp.llama_model_free(self.model)
        self.model = self.context = None

    def _clear(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)

    def _step(self, tokens: list[int], position: int) -> tuple[int, float]:
        """Run tokens at positions from `position` on; the most likely next token, and the seconds it took."""
        batch, count = self.batch, len(tokens)
        batch.n_tokens = count
        for i, token in enumerate(tokens):
            batch.token[i] = token
            batch.pos[i] = position + i
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = i == count - 1
        start = perf_counter()
        if status := llama_cpp.llama_decode(self.context, batch):
            raise RuntimeError(f"llama_decode failed with status {status}")
        logits = self._logits(count - 1)
        best = int(logits.argmax())
        elapsed = perf_counter() - start
        if not np.isfinite(logits[best]):
            raise RuntimeError("llama.cpp made logits that are not finite")
        return best, elapsed

    def _logits(self, index: int) -> np.ndarray:
        """A view of the logits at a position of the last batch; waits until they are there."""
        pointer = llama_cpp.llama_get_logits_ith(self.context, index)
        address = ctypes.cast(pointer, ctypes.c_void_p).value
        return np.frombuffer((ctypes.c_float * self.vocab_size).from_address(address), np.float32)


if __name__ == "__main__":
    serve(LlamaCpp())

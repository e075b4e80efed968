"""Files that llama.cpp loads; needs the package llama-cpp-python, which is built from source."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from export_readers import read_gguf
from test_export_formats import FAMILIES

from kuiperllm import LLM, SamplingParams, export
from kuiperllm.checkpoint.writing.gguf_types import MIXTURES
from tiny_models import BASE, random_weights, write_checkpoint

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")

WIDE = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 260, "head_dim": 64}
TOKENS = 40


def continued(path: Path, ids: list[int]) -> list[int]:
    """The most likely tokens after some, by llama.cpp with keys and values in float32."""
    options: dict[str, Any] = {
        "type_k": 0,
        "type_v": 0,
        "flash_attn": False,
        "n_threads": 1,
        "verbose": False,
    }
    model = llama_cpp.Llama(str(path), n_ctx=256, **options)
    model.eval(ids)
    found = []
    for _ in range(TOKENS):
        logits = llama_cpp.llama_get_logits_ith(model._ctx.ctx, -1)
        found.append(int(np.argmax(np.ctypeslib.as_array(logits, (model.n_vocab(),)))))
        model.eval(found[-1:])
    model.close()
    return found


@pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES)
def test_the_same_greedy_tokens(tmp_path: Path, config: dict[str, Any]) -> None:
    config = config | WIDE
    source = write_checkpoint(tmp_path / "source", config, random_weights(config))
    export(source, tmp_path / "m.gguf")
    llm = LLM(source, device="cpu")
    ids = llm.tokenizer.encode("The quick brown fox jumps over the lazy dog.")
    params = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
    assert continued(tmp_path / "m.gguf", ids) == list(llm.generate([ids], params)[0].token_ids)


@pytest.mark.shared
@pytest.mark.parametrize("quant", ["keep", "q8_0", "q4_0", "q2_k", "q6_k"])
def test_stories(tmp_path: Path, shared: Path, quant: str) -> None:
    """llama.cpp rounds inputs of quantized matrices, so that not every type gives the same text for long."""
    stories = shared / "models" / "stories260K"
    export(stories / "stories260K.bin", tmp_path / "m.gguf", quant=quant, tokenizer=stories / "tok512.bin")
    export(tmp_path / "m.gguf", tmp_path / "floats", quant="none")
    llm = LLM(tmp_path / "floats", device="cpu")
    ids = llm.tokenizer.encode("Once upon a time")
    params = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
    assert continued(tmp_path / "m.gguf", ids) == list(llm.generate([ids], params)[0].token_ids)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"tie_word_embeddings": True},
        {"num_attention_heads": 8, "num_key_value_heads": 1},
        {"hidden_size": 64},
    ],
    ids=["untied", "tied", "few keys", "narrow"],
)
def test_types_are_those_of_llama_quantize(tmp_path: Path, change: dict[str, Any]) -> None:
    config = BASE | WIDE | {"num_hidden_layers": 17} | change
    source = write_checkpoint(tmp_path / "source", config, random_weights(config))
    export(source, tmp_path / "f16.gguf", dtype="float16")
    for quant, mixture in MIXTURES.items():
        export(source, tmp_path / "ours.gguf", quant=quant, force=True)
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype, params.nthread = mixture.number, 1
        paths = (str(tmp_path / name).encode() for name in ("f16.gguf", "theirs.gguf"))
        assert llama_cpp.llama_model_quantize(*paths, ctypes.byref(params)) == 0
        assert read_gguf(tmp_path / "ours.gguf")[2] == read_gguf(tmp_path / "theirs.gguf")[2], quant

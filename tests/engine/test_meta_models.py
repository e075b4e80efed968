"""Models in Meta's form give what the same weights give as safetensors; where their tokenizers are found."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece

from kuiperllm import LLM, SamplingParams
from kuiperllm.engine.loading import open_model, open_tokenizer
from kuiperllm.errors import CheckpointError, TokenizerError
from meta_checkpoints import as_meta, params_of, saved, write_meta
from tiny_models import BASE as ODD
from tiny_models import BOS, EOS, Weights, random_weights, write_checkpoint

GREEDY = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True, logprobs=5)
BASE = ODD | {"vocab_size": 260}
"""As many tokens as the tokenizers of both forms have, and an even number, to be cut into shards."""
TIED: dict[str, Any] = BASE | {"tie_word_embeddings": True}
PROMPT = "Once upon a time there was"


def write_ranks(folder: Path) -> None:
    """A tokenizer in the form of Llama 3's: the bytes, and Meta's special tokens from 256 on."""
    lines = [b"%s %d\n" % (base64.b64encode(bytes([byte])), byte) for byte in range(256)]
    (folder / "tokenizer.model").write_bytes(b"".join(lines))


def write_sentencepiece(folder: Path) -> None:
    """A tokenizer in the form of Llama 2's."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["once upon a time there was a little model"] * 3),
        model_writer=out,
        vocab_size=290,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(out.getvalue())


def steps(llm: LLM) -> list[tuple[int, float, Any]]:
    """Prompt, tokens and log probabilities of a greedy text: equal ones come from equal logits."""
    [done] = llm.generate(PROMPT, GREEDY)
    assert done.logprobs is not None
    return [(0, 0.0, done.prompt_token_ids), *((p.token_id, p.logprob, p.top) for p in done.logprobs)]


@pytest.mark.parametrize(
    ("shards", "embedding_axis", "engine"),
    [
        (1, 1, {}),
        (2, 1, {}),
        (2, 0, {}),
        (2, 0, {"quant": "q8", "group_size": 32}),
        (2, 1, {"dtype": "bfloat16"}),
    ],
)
def test_logits_are_those_of_safetensors(
    tmp_path: Path, shards: int, embedding_axis: int, engine: dict[str, Any]
) -> None:
    weights = random_weights(BASE)
    expected = steps(LLM(write_checkpoint(tmp_path / "hf", BASE, weights), **engine))
    write_meta(tmp_path / "meta", weights, BASE, shards=shards, embedding_axis=embedding_axis)
    write_ranks(tmp_path / "meta")
    llm = LLM(tmp_path / "meta", **engine)
    assert llm.loaded.format == "meta"
    assert steps(llm) == expected


def test_tied_embeddings_are_kept_once(tmp_path: Path) -> None:
    weights = random_weights(TIED)
    expected = LLM(write_checkpoint(tmp_path / "hf", TIED, weights))
    both = weights | {"lm_head.weight": weights["model.embed_tokens.weight"].copy()}
    write_ranks(write_meta(tmp_path / "meta", both, TIED))
    llm = LLM(tmp_path / "meta")
    assert llm.loaded.decoder.weight_bytes == expected.loaded.decoder.weight_bytes
    assert llm.loaded.plan.weight_bytes == expected.loaded.plan.weight_bytes
    assert steps(llm) == steps(expected)


def test_llama_3_rope_scaling_takes_effect(tmp_path: Path) -> None:
    scaling = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"original_max_position_embeddings": 8192}
    config = TIED | {"rope_theta": 500000.0, "max_position_embeddings": 131072}
    weights = random_weights(config)
    params = {"use_scaled_rope": True}
    write_ranks(write_meta(tmp_path / "meta", weights, config, params=params))
    llm = LLM(tmp_path / "meta", max_model_len=256)
    assert llm.config.max_position_embeddings == 131072
    folder = write_checkpoint(tmp_path / "hf", config | {"rope_scaling": scaling}, weights)
    assert steps(llm) == steps(LLM(folder, max_model_len=256))


def test_a_training_checkpoint_of_llama2c(tmp_path: Path) -> None:
    weights = random_weights(BASE)
    arguments = params_of(BASE, vocab_size=BASE["vocab_size"], max_seq_len=256)
    (tmp_path / "ckpt.pt").write_bytes(saved({"model": as_meta(weights, BASE), "model_args": arguments}))
    write_ranks(tmp_path)
    expected = steps(LLM(write_checkpoint(tmp_path / "hf", BASE, weights)))
    assert steps(LLM(tmp_path / "ckpt.pt")) == expected


@pytest.mark.parametrize("above", [False, True])
def test_the_tokenizer_lies_beside_or_above(
    tmp_path: Path, above: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Llama 2 was handed out with one tokenizer for the folders of all sizes."""
    folder = write_meta(tmp_path / "7B", random_weights(BASE), BASE)
    write_sentencepiece(tmp_path if above else folder)
    monkeypatch.chdir(folder)
    for source in (folder, folder / "consolidated.00.pth", Path()):
        with open_model(source) as checkpoint:
            tokenizer = open_tokenizer(checkpoint)
        assert (tokenizer.kind, tokenizer.bos_token_id, tokenizer.eos_token_ids) == ("sentencepiece", 1, (2,))


def test_the_tokenizer_beside_wins(tmp_path: Path) -> None:
    folder = write_meta(tmp_path / "8B", random_weights(BASE), BASE)
    write_sentencepiece(tmp_path)
    write_ranks(folder)
    with open_model(folder) as checkpoint:
        tokenizer = open_tokenizer(checkpoint)
    assert (tokenizer.kind, tokenizer.bos_token_id) == ("tiktoken", BOS)
    assert EOS in tokenizer.eos_token_ids


def test_no_tokenizer(tmp_path: Path) -> None:
    folder = write_meta(tmp_path / "a" / "b", random_weights(BASE), BASE)
    with open_model(folder) as checkpoint, pytest.raises(TokenizerError, match="no tokenizer there"):
        open_tokenizer(checkpoint)


def test_a_tensor_that_a_layer_lacks_is_found_before_loading(tmp_path: Path) -> None:
    weights: Weights = random_weights(BASE)
    del weights["model.layers.1.mlp.up_proj.weight"]
    write_ranks(write_meta(tmp_path, weights, BASE))
    with pytest.raises(CheckpointError, match=r"no tensor 'model\.layers\.1\.mlp\.up_proj\.weight'"):
        LLM(tmp_path)


def test_weights_that_are_no_numbers_are_found(tmp_path: Path) -> None:
    from kuiperllm.checkpoint.check import find_bad_tensors

    weights = random_weights(BASE)
    weights["model.layers.0.self_attn.q_proj.weight"][3, 5] = np.nan
    write_meta(tmp_path, weights, BASE)
    with open_model(tmp_path) as checkpoint:
        [bad] = find_bad_tensors(checkpoint)
    assert str(bad) == "model.layers.0.self_attn.q_proj.weight: 1 NaN"

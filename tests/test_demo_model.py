"""The demo model in the package, read with the gguf package and run by the NumPy reference decoder."""

from __future__ import annotations

import importlib.util
import json
from importlib.resources import files
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from reference_llama import mean_nll, reference_logits

MAX_BYTES = 4_000_000
BOS_ID = 0

# From The Tempest, act 2, scene 1, in the last 5 % of the corpus: the model never saw it.
UNSEEN = """\
SEBASTIAN:
What a strange drowsiness possesses them!

ANTONIO:
It is the quality o' the climate.

SEBASTIAN:
Why
Doth it not then our eyelids sink? I find not
Myself disposed to sleep.

ANTONIO:
Nor I; my spirits are nimble.
They fell together all, as by consent;
They dropp'd, as by a thunder-stroke. What might,
Worthy Sebastian? O, what might?--No more:--
And yet me thinks I see it in thy face,
What thou shouldst be: the occasion speaks thee, and
My strong imagination sees a crown
Dropping upon thy head.
"""
MAX_NLL = 3.65  # nats per token: 3.623 was measured; rows of q and k left unpermuted give 4.93


@pytest.fixture(scope="module")
def demo() -> gguf.GGUFReader:
    return gguf.GGUFReader(str(files("kuiperllm") / "data" / "demo.gguf"))


@pytest.fixture(scope="module")
def tokenizer(demo: gguf.GGUFReader) -> Tokenizer:
    return gguf_tokenizer(demo)


@pytest.fixture(scope="module")
def train_demo() -> ModuleType:
    path = Path(__file__).resolve().parents[1] / "tools" / "train_demo.py"
    spec = importlib.util.spec_from_file_location("train_demo", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def value(reader: gguf.GGUFReader, key: str) -> Any:
    return reader.fields[key].contents()


def gguf_tokenizer(reader: gguf.GGUFReader) -> Tokenizer:
    """The tokenizer that the keys describe: byte-level BPE after GPT-2's way of cutting text into words."""
    tokens = value(reader, "tokenizer.ggml.tokens")
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ")) for merge in value(reader, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(tokens[BOS_ID], special=True)])
    return tokenizer


def hf_config(reader: gguf.GGUFReader) -> SimpleNamespace:
    return SimpleNamespace(
        num_hidden_layers=value(reader, "llama.block_count"),
        num_attention_heads=value(reader, "llama.attention.head_count"),
        num_key_value_heads=value(reader, "llama.attention.head_count_kv"),
        head_dim=value(reader, "llama.attention.key_length"),
        rope_theta=value(reader, "llama.rope.freq_base"),
        rms_norm_eps=value(reader, "llama.attention.layer_norm_rms_epsilon"),
    )


HF_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def half_split_rows(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of each head from GGUF's order (pairs are neighbours) to Hugging Face's (evens, then odds)."""
    heads = weight.reshape(num_heads, -1, weight.shape[1])
    return np.concatenate([heads[:, 0::2], heads[:, 1::2]], axis=1).reshape(weight.shape)


def hf_weights(reader: gguf.GGUFReader) -> dict[str, np.ndarray]:
    config = hf_config(reader)
    weights = {}
    for tensor in reader.tensors:
        weight = gguf.dequantize(tensor.data, tensor.tensor_type)
        stem = tensor.name.removesuffix(".weight")
        if stem.startswith("blk."):
            _, layer, part = stem.split(".")
            name = f"model.layers.{layer}.{HF_NAMES[part]}.weight"
        else:
            name = HF_NAMES[stem] + ".weight"
        if name.endswith("q_proj.weight"):
            weight = half_split_rows(weight, config.num_attention_heads)
        if name.endswith("k_proj.weight"):
            weight = half_split_rows(weight, config.num_key_value_heads)
        weights[name] = weight
    return weights


def test_ships_in_the_package_and_is_small() -> None:
    data = (files("kuiperllm") / "data" / "demo.gguf").read_bytes()
    assert data[:4] == b"GGUF"
    assert len(data) <= MAX_BYTES


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("general.architecture", "llama"),
        ("general.name", "KuiperLLM demo"),
        ("general.license", "MIT"),
        ("general.file_type", gguf.LlamaFileType.MOSTLY_Q8_0),
        ("llama.vocab_size", 1024),
        ("llama.context_length", 512),
        ("llama.embedding_length", 256),
        ("llama.feed_forward_length", 640),
        ("llama.block_count", 5),
        ("llama.attention.head_count", 4),
        ("llama.attention.head_count_kv", 2),
        ("llama.attention.key_length", 64),
        ("llama.attention.value_length", 64),
        ("llama.rope.dimension_count", 64),
        ("llama.rope.freq_base", 10000.0),
        ("llama.attention.layer_norm_rms_epsilon", pytest.approx(1e-5)),
        ("tokenizer.ggml.model", "gpt2"),
        ("tokenizer.ggml.pre", "gpt-2"),
        ("tokenizer.ggml.bos_token_id", BOS_ID),
        ("tokenizer.ggml.eos_token_id", BOS_ID),
        ("tokenizer.ggml.add_bos_token", True),
    ],
)
def test_key(demo: gguf.GGUFReader, key: str, expected: object) -> None:
    assert value(demo, key) == expected


def test_matrices_are_q8_0_and_norms_float32(demo: gguf.GGUFReader) -> None:
    assert len(demo.tensors) == 2 + 5 * 9
    for tensor in demo.tensors:
        expected = "Q8_0" if len(tensor.shape) == 2 else "F32"
        assert tensor.tensor_type.name == expected, tensor.name
    assert "output.weight" not in {tensor.name for tensor in demo.tensors}  # tied to the embedding
    assert "tokenizer.chat_template" not in demo.fields


def test_tokenizer_keys_describe_a_whole_byte_level_bpe(demo: gguf.GGUFReader, tokenizer: Tokenizer) -> None:
    kinds = value(demo, "tokenizer.ggml.token_type")
    assert kinds == [gguf.TokenType.CONTROL] + [gguf.TokenType.NORMAL] * 1023
    assert len(value(demo, "tokenizer.ggml.merges")) == 1024 - 256 - 1
    assert set(pre_tokenizers.ByteLevel.alphabet()) < set(value(demo, "tokenizer.ggml.tokens"))
    assert tokenizer.encode("ROMEO:\n").tokens == ["ROMEO", ":", "Ċ"]
    for text in (UNSEEN, "naïve 東京 \U0001f600\t\r\n  x"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_predicts_unseen_shakespeare(demo: gguf.GGUFReader, tokenizer: Tokenizer) -> None:
    ids = [BOS_ID, *tokenizer.encode(UNSEEN).ids]
    logits = reference_logits(hf_config(demo), hf_weights(demo), ids)
    assert logits.shape == (len(ids), 1024)
    assert mean_nll(logits, ids) < MAX_NLL


def test_begins_with_a_speaker_after_an_empty_prompt(demo: gguf.GGUFReader, tokenizer: Tokenizer) -> None:
    config, weights, ids = hf_config(demo), hf_weights(demo), [BOS_ID]
    for _ in range(12):
        ids.append(int(reference_logits(config, weights, ids)[-1].argmax()))
    speaker, colon, _ = tokenizer.decode(ids[1:]).partition(":\n")
    assert colon
    assert speaker.replace(" ", "").isalpha()


def test_export_keeps_names_shapes_and_values(train_demo: ModuleType, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    config = train_demo.CONFIG | {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "vocab_size": 300}
    rng = np.random.default_rng(0)
    shapes = {"model.embed_tokens": (300, 64), "model.norm": (64,)}
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        shapes |= {prefix + "input_layernorm": (64,), prefix + "post_attention_layernorm": (64,)}
        shapes |= {prefix + f"self_attn.{p}_proj": (s, 64) for p, s in {"q": 64, "k": 32, "v": 32}.items()}
        shapes |= {prefix + "self_attn.o_proj": (64, 64), prefix + "mlp.down_proj": (64, 96)}
        shapes |= {prefix + "mlp.gate_proj": (96, 64), prefix + "mlp.up_proj": (96, 64)}
    weights = {f"{name}.weight": rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    (tmp_path / "config.json").write_text(json.dumps(config))
    safetensors.save_file(weights, tmp_path / "model.safetensors")
    train_demo.train_tokenizer(UNSEEN, 300).save(str(tmp_path / "tokenizer.json"))

    train_demo.export(tmp_path, tmp_path / "out" / "model.gguf")

    reader = gguf.GGUFReader(str(tmp_path / "out" / "model.gguf"))
    back = hf_weights(reader)
    assert back.keys() == weights.keys()
    for name, weight in weights.items():
        step = np.abs(weight).max() / 127 if weight.ndim == 2 else 0.0  # the widest step of Q8_0
        np.testing.assert_allclose(back[name], weight, rtol=0, atol=0.51 * step, err_msg=name)
    assert gguf_tokenizer(reader).decode(gguf_tokenizer(reader).encode(UNSEEN).ids) == UNSEEN


@pytest.mark.oracle
def test_training_forward_equals_the_reference(train_demo: ModuleType) -> None:
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    weights = train_demo.init_weights("cpu")
    ids = torch.randint(1024, (40,))
    with torch.no_grad():
        logits = train_demo.forward(weights, ids[None])[0].numpy()
    arrays = {name: weight.detach().numpy() for name, weight in weights.items()}
    expected = reference_logits(SimpleNamespace(**train_demo.CONFIG), arrays, ids.tolist(), dtype=np.float64)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4 * np.abs(expected).max())

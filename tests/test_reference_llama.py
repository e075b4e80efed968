"""The NumPy reference decoder itself, against transformers and by hand."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from reference_llama import mean_nll, reference_logits, rotate

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}


def test_rotate_turns_pairs_half_a_head_apart() -> None:
    x = np.array([[[1.0, 0.0, 0.0, 2.0]]])  # one head, one position; pairs (x0, x2) and (x1, x3)
    turned = rotate(x, np.array([[np.pi / 2, np.pi]]))
    np.testing.assert_allclose(turned, [[[0.0, 0.0, 1.0, -2.0]]], atol=1e-12)


def test_mean_nll_of_known_probabilities() -> None:
    logits = np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [1.0, 1.0, 1.0]]))
    assert mean_nll(logits, [0, 2, 1]) == pytest.approx(-(np.log(0.25) + np.log(0.8)) / 2)


@pytest.mark.oracle
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3"])
def test_equals_transformers(family: str, tied: bool) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    rope = {"rope_type": "default", "rope_theta": 5000.0}
    config = getattr(transformers, f"{family}Config")(**SHAPE, tie_word_embeddings=tied, rope_parameters=rope)
    model = getattr(transformers, f"{family}ForCausalLM")(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too, so that leaving one out shows
            parameter.add_(0.2 * torch.randn_like(parameter))
    weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    if tied:
        del weights["lm_head.weight"]
    ids = torch.randint(SHAPE["vocab_size"], (30,))
    with torch.no_grad():
        expected = model(ids[None]).logits[0].numpy()
    reference_config = SimpleNamespace(**SHAPE, rope_theta=5000.0)
    logits = reference_logits(reference_config, weights, ids.tolist(), dtype=np.float64)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    single = reference_logits(reference_config, weights, ids.tolist())
    np.testing.assert_allclose(single, expected, rtol=0, atol=1e-4 * np.abs(expected).max())

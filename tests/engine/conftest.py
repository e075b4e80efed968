"""Models for the tests of the engine, written once."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from engine_checks import check_idle
from kuiperllm import LLM
from tiny_models import BASE, EOS, chain_weights, random_weights, write_checkpoint

CHAIN = b"abcdefghijkl\xc3\xb8mnopqrstuvwxyz"
"""What the chain model writes after "a": letters, and one character of two tokens in their middle."""


@pytest.fixture(scope="session")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of random float32 weights."""
    return write_checkpoint(tmp_path_factory.mktemp("random"), BASE, random_weights(BASE))


@pytest.fixture(scope="session")
def chain_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that writes the alphabet and then ends the text; digits repeat for ever."""
    following = dict(pairwise(CHAIN)) | {CHAIN[-1]: EOS, EOS: CHAIN[0]}
    following |= {ord("0") + digit: ord("0") + (digit + 1) % 10 for digit in range(10)}
    config = BASE | {"hidden_size": 264, "num_hidden_layers": 1, "max_position_embeddings": 64}
    folder = tmp_path_factory.mktemp("chain")
    return write_checkpoint(folder, config, chain_weights(config, following))


@pytest.fixture(scope="module")
def llm(random_model: Path) -> LLM:
    return LLM(random_model, max_num_seqs=3, max_num_batched_tokens=24)


@pytest.fixture(scope="module")
def chain(chain_model: Path) -> LLM:
    return LLM(chain_model)


@pytest.fixture
def assert_idle() -> Callable[[LLM], None]:
    """Checks that a model holds no blocks and no sequences."""

    def check(llm: LLM) -> None:
        check_idle(llm._engine)
        assert not llm._lock.locked()

    return check

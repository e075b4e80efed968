"""`kuiper info` and `generate` on a folder of Meta's."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
from cli_result import Run

from kuiperllm import LLM, SamplingParams
from meta_checkpoints import Raw, TensorCode, container, write_meta
from tiny_models import BASE, random_weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards with Llama 3's kind of tokenizer."""
    config = BASE | {"vocab_size": 512}
    folder = write_meta(
        tmp_path_factory.mktemp("meta"), random_weights(config), config, shards=2, embedding_axis=0
    )
    ranks = [b"%s %d\n" % (base64.b64encode(bytes([byte])), byte) for byte in range(256)]
    (folder / "tokenizer.model").write_bytes(b"".join(ranks))
    return folder


def test_info(kuiper: Run, folder: Path) -> None:
    weights = random_weights(BASE | {"vocab_size": 512})
    for path in (folder, folder / "consolidated.01.pth"):
        facts = json.loads(kuiper("info", "-m", path, "--json", "--check").out)
        assert (facts["format"], facts["architecture"], facts["path"]) == ("meta", "llama", str(folder))
        assert facts["parameters_by_dtype"] == {"float32": sum(tensor.size for tensor in weights.values())}
        assert facts["file_bytes"] == sum(tensor.nbytes for tensor in weights.values())
        assert facts["config"]["max_position_embeddings"] == 4096
        assert facts["tokenizer"]["kind"] == "tiktoken"
        assert facts["tokenizer"]["vocab_size"] == 512
        assert facts["tokenizer"]["bos_token_id"] == 256
        assert facts["bad_tensors"] == []
    assert "format" in kuiper("info", "-m", folder).out


def test_generate(kuiper: Run, folder: Path) -> None:
    result = kuiper("generate", "-m", folder, "--temperature", "0", "--max-tokens", "12", "Once upon")
    params = SamplingParams(temperature=0, max_tokens=12)
    assert result.out == LLM(folder).generate("Once upon", params)[0].text + "\n"
    assert result.code == 0


def test_a_pickle_that_asks_for_more_than_tensors(kuiper: Run, tmp_path: Path) -> None:
    write_meta(tmp_path, random_weights(BASE), BASE)
    trap = Raw(b"cos\nsystem\nX\x06\0\0\0exit 1\x85R")
    path = tmp_path / "consolidated.00.pth"
    path.write_bytes(container({"a": TensorCode((1,), (1,), 1), "b": trap}, {"0": bytes(4)}))
    for command in (("info",), ("generate", "hi")):
        result = kuiper(*command, "-m", tmp_path)
        assert result.code == 1
        assert result.refused() == f"error: {path}: asks for os.system, which is no tensor; refused"

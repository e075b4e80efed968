"""From the name of a model to weights, tokenizer and chat template in memory."""

from __future__ import annotations

import importlib.resources
import logging
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from kuiperllm.checkpoint import Checkpoint, open_checkpoint
from kuiperllm.config import EngineConfig, GenerationDefaults, ModelConfig
from kuiperllm.core import Device, DType
from kuiperllm.engine.memory_plan import MemoryPlan, kv_dtype, plan_memory
from kuiperllm.errors import TokenizerError
from kuiperllm.layers import WeightLoader
from kuiperllm.models import Decoder, build_model
from kuiperllm.text import ChatTemplate, Tokenizer, load_tokenizer, tokenizer_from_gguf

log = logging.getLogger(__name__)

DEMO = "demo"
"""The name of the small model that comes with the package."""

Progress = Callable[[str, int, int], None]
"""Told of progress as (what is being done, bytes done, bytes in all)."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """Everything that generating text needs."""

    name: str
    config: ModelConfig
    format: str
    generation: GenerationDefaults
    decoder: Decoder
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    kv_dtype: DType
    plan: MemoryPlan

    @property
    def stop_ids(self) -> frozenset[int]:
        """Token ids that end a text."""
        ids = self.config.eos_token_ids, self.generation.eos_token_ids, self.tokenizer.eos_token_ids
        return frozenset(chain.from_iterable(ids))


def open_model(model: str | Path | None, progress: Progress | None = None) -> Checkpoint:
    """The checkpoint that a name stands for: a path, a hub id, or None or `demo` for the one in the package.

    Raises:
        CheckpointError: there is none, or it is damaged.
        UnsupportedError: its format or architecture is not supported.
        DownloadError: the hub cannot be reached or refuses.
    """
    if model is None or (str(model) == DEMO and not Path(DEMO).exists()):
        model = Path(str(importlib.resources.files("kuiperllm") / "data" / "demo.gguf"))
    return open_checkpoint(model, progress=progress)


def load_model(
    model: str | Path | None,
    engine: EngineConfig,
    *,
    tokenizer: str | Path | None = None,
    progress: Progress | None = None,
) -> LoadedModel:
    """Open, check, load and pack a model.

    Raises:
        KuiperError: something is wrong with the checkpoint, the tokenizer, the device or the memory.
    """
    device = Device(engine.device)
    with open_model(model, progress) as checkpoint:
        text = open_tokenizer(checkpoint, tokenizer)
        config = checkpoint.config
        if text.vocab_size > config.vocab_size:
            log.info("the tokenizer knows %d ids, the model %d", text.vocab_size, config.vocab_size)
        plan = plan_memory(checkpoint, engine, device)
        log.info("%s", plan)
        return LoadedModel(
            name=DEMO if model is None else str(model),
            config=config,
            format=checkpoint.format,
            generation=checkpoint.generation,
            decoder=load_decoder(checkpoint, engine, device, progress),
            tokenizer=text,
            chat_template=_chat_template(text),
            kv_dtype=kv_dtype(checkpoint, engine),
            plan=plan,
        )


def load_decoder(
    checkpoint: Checkpoint, engine: EngineConfig, device: Device, progress: Progress | None = None
) -> Decoder:
    """The weights of a checkpoint on a device, as the engine's configuration wants them."""
    weights = WeightLoader(
        checkpoint,
        device,
        dtype=None if engine.dtype == "auto" else DType(engine.dtype),
        quant=engine.quant if engine.quantizes else None,
        group_size=engine.group_size,
        progress=None if progress is None else lambda done, total: progress("loading", done, total),
    )
    return build_model(checkpoint.config, weights)


def open_tokenizer(checkpoint: Checkpoint, tokenizer: str | Path | None = None) -> Tokenizer:
    """The tokenizer of a checkpoint, or the one at another path.

    Raises:
        TokenizerError: there is none, or it is damaged.
    """
    source = tokenizer_source(checkpoint, tokenizer)
    return tokenizer_from_gguf(checkpoint.metadata) if source is None else load_tokenizer(source)


def tokenizer_source(checkpoint: Checkpoint, tokenizer: str | Path | None = None) -> Path | None:
    """The file or folder that a tokenizer is read from: as named, or the checkpoint's own; None: inside it.

    Raises:
        TokenizerError: there is none.
    """
    if tokenizer is not None:
        return Path(tokenizer)
    if "tokenizer.ggml.model" in checkpoint.metadata:
        return None
    path = checkpoint.path
    if path.is_dir():
        return _beside_or_above(path) if checkpoint.format == "meta" else path
    if checkpoint.format == "safetensors":
        return path.parent
    for name in ("tokenizer.bin", "tokenizer.model"):
        if (path.parent / name).is_file():
            return path.parent / name
    raise TokenizerError(
        f"{path}: there is no tokenizer.bin or tokenizer.model beside it; name one with --tokenizer"
    )


def _beside_or_above(folder: Path) -> Path:
    """Where the tokenizer of Meta's weights lies: beside them, or one folder above as with Llama 1 and 2."""
    above = folder.resolve().parent / "tokenizer.model"
    has_own = any((folder / name).exists() for name in ("tokenizer.model", "tokenizer.json"))
    return above if not has_own and above.is_file() else folder


def _chat_template(tokenizer: Tokenizer) -> ChatTemplate | None:
    if tokenizer.chat_template is None:
        return None
    texts = {number: text for text, number in tokenizer.special_tokens.items()}
    eos = tokenizer.eos_token_ids[0] if tokenizer.eos_token_ids else None
    return ChatTemplate(
        tokenizer.chat_template,
        bos_token=texts.get(tokenizer.bos_token_id, "") if tokenizer.bos_token_id is not None else "",
        eos_token=texts.get(eos, "") if eos is not None else "",
    )

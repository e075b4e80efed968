"""What all endpoints share: the model and everything around it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from kuiperllm.engine.request import Guide
from kuiperllm.server.config import ServerConfig
from kuiperllm.server.errors import ApiError, bad_request, invalid_body
from kuiperllm.server.metrics import Metrics
from kuiperllm.server.middleware import ClientGoneError
from kuiperllm.server.prompts import ChatPrompts
from kuiperllm.server.structured import Grammar, GrammarCompiler
from kuiperllm.text import ChatTemplate

if TYPE_CHECKING:
    from kuiperllm.engine.async_llm import AsyncLLM

Body = TypeVar("Body", bound=BaseModel)
Result = TypeVar("Result")

_PROMPT_THREADS = 2


class ServerState:
    """The model, and what endpoints need besides it.

    Args:
        llm: the model.
        config: how the server behaves.

    Raises:
        ChatTemplateError: the configured chat template is not valid.
    """

    def __init__(self, llm: AsyncLLM, config: ServerConfig) -> None:
        self.llm = llm
        self.config = config
        self.model_names = config.model_names or (llm.loaded.name,)
        self.started = int(time.time())
        self.fingerprint = f"kuiperllm-{version('kuiperllm')}"
        engine = llm.engine_config
        limits = {
            "block_size": engine.block_size,
            "num_gpu_blocks": llm.stats().kv_blocks,
            "enable_prefix_caching": engine.prefix_caching,
            "cache_dtype": engine.kv_cache_dtype,
        }
        self.metrics = Metrics(self.model_name, llm.stats, limits)
        template = llm.loaded.chat_template
        if config.chat_template is not None:
            tokens = {number: text for text, number in llm.tokenizer.special_tokens.items()}
            bos, eos = llm.tokenizer.bos_token_id, next(iter(llm.tokenizer.eos_token_ids), None)
            template = ChatTemplate(
                config.chat_template,
                bos_token="" if bos is None else tokens.get(bos, ""),
                eos_token="" if eos is None else tokens.get(eos, ""),
            )
        self.prompts = ChatPrompts(template, llm.tokenizer, config)
        self.grammars = GrammarCompiler(llm.tokenizer, llm.loaded.stop_ids)
        self._pool = ThreadPoolExecutor(_PROMPT_THREADS, thread_name_prefix="prompts")

    @property
    def model_name(self) -> str:
        """What answers call the model."""
        return self.model_names[0]

    async def read(self, request: Request, kind: type[Body]) -> Body:
        """The body of a request.

        Raises:
            ApiError: it is not JSON, or not of that kind, or names a model that is not served.
            ClientGoneError: the client went away in the middle of it.
        """
        content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if content_type != "application/json":  # also keeps other web pages' forms away
            raise ApiError(415, "the body must be JSON, with `Content-Type: application/json`")
        try:
            body = kind.model_validate_json(await request.body())
        except ValidationError as error:
            raise invalid_body(error.errors(include_url=False, include_input=False)) from None
        except ClientDisconnect:
            raise ClientGoneError from None
        name = getattr(body, "model", None)
        if name is not None and name not in self.model_names:
            known = ", ".join(self.model_names)
            message = f"there is no model {name!r} here; there is {known}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return body

    async def in_thread(self, function: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
        """Do what takes a while, such as rendering and encoding a prompt, off the event loop."""
        work = partial(function, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    async def compile(self, grammar: Grammar) -> Callable[[], Guide]:
        """What makes the guides of a request's outputs. Raises like `GrammarCompiler.compile`."""
        started = time.perf_counter()
        make_guide = await self.grammars.compile(grammar)
        self.metrics.guide_compile.observe(time.perf_counter() - started)
        return make_guide

    async def encode(self, prompts: list[str | list[int]]) -> list[list[int]]:
        """The token ids of texts; ids are checked.

        Raises:
            TokenizerError: a text cannot be encoded, or an id is out of range.
            ApiError: a prompt is empty.
        """
        found = await self.in_thread(lambda: [self.llm.token_ids(prompt) for prompt in prompts])
        if not all(found):
            raise bad_request(
                "a prompt is empty, and the tokenizer has no token to begin a text with", "prompt"
            )
        return found

    def close(self) -> None:
        """End the threads."""
        self.grammars.close()
        self._pool.shutdown(wait=False, cancel_futures=True)

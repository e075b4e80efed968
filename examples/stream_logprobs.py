"""Watch a model choose: each token as it comes, its probability, and what else was likely.

python examples/stream_logprobs.py [PROMPT]
"""

import math
import sys

from kuiperllm import LLM, SamplingParams

llm = LLM()
prompt = sys.argv[1] if len(sys.argv) > 1 else "KING RICHARD III:\n"

for chunk in llm.stream(prompt, SamplingParams(temperature=0, max_tokens=12, logprobs=3)):
    assert chunk.logprobs is not None
    candidates = [
        f"{llm.tokenizer.decode([token_id])!r} {math.exp(logprob):.1%}"
        for token_id, logprob in chunk.logprobs.top
    ]
    print(f"{chunk.text!r:<12} {math.exp(chunk.logprobs.logprob):7.1%}   {', '.join(candidates)}")

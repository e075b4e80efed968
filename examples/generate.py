"""Continue a text, with the demo model or the one named on the command line.

python examples/generate.py [MODEL]
"""

import sys

from kuiperllm import LLM, SamplingParams

llm = LLM(sys.argv[1] if len(sys.argv) > 1 else None)
params = SamplingParams(temperature=0.8, top_p=0.95, seed=1, max_tokens=60)

# Several prompts are worked on together.
prompts = ["ROMEO:", "First Citizen:"]
for prompt, completion in zip(prompts, llm.generate(prompts, params), strict=True):
    print(f"{prompt}{completion.text}")
    print(f"[{len(completion.token_ids)} tokens, ended by {completion.finish_reason}]\n")

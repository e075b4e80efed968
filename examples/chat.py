"""Talk with a chat model: each line of standard input is a message.

python examples/chat.py MODEL

Without MODEL the demo model takes the part of Juliet. It is no chat model and has no chat template, so the
conversation is written out as the play that it was trained on.
"""

import sys

from kuiperllm import LLM, SamplingParams

params = SamplingParams(temperature=0.8, seed=1, max_tokens=200)

if len(sys.argv) > 1:
    llm = LLM(sys.argv[1])
    messages = [{"role": "system", "content": "Answer briefly."}]
    for line in sys.stdin:
        messages.append({"role": "user", "content": line.strip()})
        answer = ""
        for chunk in llm.stream_chat(messages, params):
            print(chunk.text, end="", flush=True)
            answer += chunk.text
        print()
        messages.append({"role": "assistant", "content": answer})
else:
    llm = LLM()
    play = ""
    for line in sys.stdin:
        play += f"ROMEO:\n{line.strip()}\n\nJULIET:\n"
        for chunk in llm.stream(play, params.with_changes(stop=("\n\n",))):
            print(chunk.text, end="", flush=True)
            play += chunk.text
        print()
        play += "\n\n"

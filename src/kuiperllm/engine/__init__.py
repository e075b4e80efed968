"""From prompts to text: sequences, scheduling, the key/value cache, running the model, choosing tokens."""

"""KuiperLLM: a large-language-model inference framework, written from scratch in Python."""

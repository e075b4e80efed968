"""What goes over the wire, as pydantic models: OpenAI's names, and vLLM's for what OpenAI does not have.

Requests are strict: a wrong type, or a field that nobody knows, is an error. Models of answers are what the
OpenAPI description shows and tests check; the endpoints build plain dictionaries, which is much faster.
"""

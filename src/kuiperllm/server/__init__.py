"""The HTTP server: OpenAI's API, metrics and a chat page in front of one `AsyncLLM`. No logic of the engine.

Needs the extra `server` (FastAPI, uvicorn, prometheus-client, llguidance). `create_app` in `server.app` makes
the application, `serve` in `server.run` serves it; `kuiper serve` calls that.
"""

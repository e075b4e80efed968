"""Puts load on a server of OpenAI's API, and measures how it answers. Needs no other package."""

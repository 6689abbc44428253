"""Answers requests: an OpenAI-compatible API and the decoding engine, in two processes."""

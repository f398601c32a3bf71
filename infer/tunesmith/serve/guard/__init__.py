"""Guardrails: what may not go in to a model, or come out of it."""

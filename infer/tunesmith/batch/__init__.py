"""Answers for a file of prompts: every input row is in the output once, whatever happens."""

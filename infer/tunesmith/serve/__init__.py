"""The OpenAI API on one port: a thin gateway in this process, the engine in a supervised one."""

"""The command line. Imports nothing heavy: a command's module is imported when it runs."""

"""`python -m tunesmith.cli`: how a run starts its steps with the same interpreter."""

from tunesmith.cli.main import main

main()

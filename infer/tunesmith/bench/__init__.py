"""What a model delivers on this machine, and what a token costs: load, figures, validity, price."""

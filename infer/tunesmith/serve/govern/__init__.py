"""Who may ask for what, how much of it, and what it has cost: keys, limits, budgets, the log."""

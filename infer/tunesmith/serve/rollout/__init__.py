"""Moving a route to a new arm by evidence, and back."""

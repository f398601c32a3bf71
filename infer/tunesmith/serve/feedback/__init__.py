"""What people say of answers, and the training data that becomes of it."""

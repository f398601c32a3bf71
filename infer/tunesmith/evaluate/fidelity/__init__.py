"""What a compressed checkpoint keeps of its parent, side by side in the engine that serves it."""

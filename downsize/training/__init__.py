"""Training: one loop, and what techniques put into it."""

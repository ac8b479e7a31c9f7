"""What pruning techniques share: what to take out, and how to make up for it."""

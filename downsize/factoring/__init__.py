"""What factorizing shares: which layers can be factored, in which ways, which of these each gets, and the factors in the graph."""

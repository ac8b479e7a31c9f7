"""The Network: the one form a model has inside downsize, and everything that reads or edits its graph."""

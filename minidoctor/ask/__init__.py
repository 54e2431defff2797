"""Questions and answers in a terminal or from a file."""

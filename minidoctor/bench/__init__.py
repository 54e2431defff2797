"""Speed and memory next to other implementations and lower bounds."""

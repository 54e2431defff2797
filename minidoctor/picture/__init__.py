"""Statistics of the routing, shown in the terminal and as plots."""

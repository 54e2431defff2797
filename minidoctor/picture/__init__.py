"""Pictures of the routing: in the terminal and as plots."""

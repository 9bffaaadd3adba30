"""The process grid, its groups, and how a process joins them."""

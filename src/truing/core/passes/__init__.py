"""One pass through a module: attention over trees, the hand-written block, heads, memory."""

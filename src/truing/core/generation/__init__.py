"""How answers are written: draws, stop rules, waves of rows, key-value caches, search."""

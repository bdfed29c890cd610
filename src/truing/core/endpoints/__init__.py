"""Models behind an address: requests, replies, limits, spending."""

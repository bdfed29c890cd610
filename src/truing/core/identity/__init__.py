"""What code and files are known by: hashes of what they compute and hold."""

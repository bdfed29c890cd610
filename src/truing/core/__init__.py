"""What methods stand on. No method lives here."""

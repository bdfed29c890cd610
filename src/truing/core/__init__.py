"""What methods stand on: no method lives here. What these modules rest on is in the folders."""

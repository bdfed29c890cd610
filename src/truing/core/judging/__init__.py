"""What an answer is worth: judges' forms, agreement, rewards, process values."""

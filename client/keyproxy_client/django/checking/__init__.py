"""What the system checks look at."""

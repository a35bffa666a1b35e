"""What is asked, as text and as tokens."""

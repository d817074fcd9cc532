"""Other people's training loops; each module imports its own package only."""

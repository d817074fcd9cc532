"""Official scores of predictions, and statistics over scores."""

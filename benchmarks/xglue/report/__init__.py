"""Tables, claims and figures of finished runs."""

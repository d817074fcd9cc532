"""Which elements: plain numbers and bits. Knows no policy, no group, no device."""

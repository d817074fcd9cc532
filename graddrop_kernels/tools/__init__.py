"""The command line and its programs."""

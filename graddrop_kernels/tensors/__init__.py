"""Where elements lie: in memory, among processes."""

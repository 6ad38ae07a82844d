"""What ``make quickstart`` runs: the whole line, small, on text that every Python carries."""

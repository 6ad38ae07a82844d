"""What is in a corpus: statistics, quality rules, duplicates, contamination, patterns, a manifest, a filter."""

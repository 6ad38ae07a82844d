"""Commands that need more than one part of the package; ``parsers`` has their arguments."""

"""Commands that need more than one part of the package; ``megameta.cli`` parses their arguments."""

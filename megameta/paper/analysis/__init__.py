"""What meta-tokens do inside a model (spec §6): ``megameta analyze``."""

"""The paper's figures and tables, one command each (spec §4 and §5): ``megameta reproduce``."""

"""The paper's four synthetic tasks: generators, checkers, datasets (spec §5)."""

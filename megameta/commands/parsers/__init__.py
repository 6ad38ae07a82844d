"""Arguments of the commands. What a command needs is imported when it runs: --help stays quick."""

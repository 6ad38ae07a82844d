"""One module a command: ``add_parser`` says its arguments; what it needs is imported when it runs."""

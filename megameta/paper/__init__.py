"""The paper's experiments: its tasks, analyses, figures and tables. Of the package only commands import it."""

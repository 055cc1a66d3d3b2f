"""What `import opdkit` gives: the commands as functions, a run as data frames. `opdkit/__init__.py` has the names."""

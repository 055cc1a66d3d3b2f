"""What `import opdkit` gives: the commands as functions, and a run as data frames. The names are in `opdkit/__init__.py`."""

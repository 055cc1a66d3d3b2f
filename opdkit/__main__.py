"""`python -m opdkit`."""

from opdkit.cli import main

main()

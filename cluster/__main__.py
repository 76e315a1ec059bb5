"""`python -m cluster` is `allograft`."""

from cluster.cli import main

main()

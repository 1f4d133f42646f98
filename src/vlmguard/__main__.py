"""`python -m vlmguard` is `vlmguard`."""

from vlmguard.cli import main

main()

"""`python -m rs_gguf` is `rs-export`."""

from rs_gguf.cli.main import main

main()

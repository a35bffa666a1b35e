"""Run `rs-export` for `python -m rs_gguf`."""

from rs_gguf.cli.main import main

main()

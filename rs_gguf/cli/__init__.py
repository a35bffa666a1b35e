"""The command line: `rs-export`."""

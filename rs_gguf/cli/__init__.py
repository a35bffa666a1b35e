"""The command `rs-export`."""

"""Other tools' files: seven formats in, PEFT out."""

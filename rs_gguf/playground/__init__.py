"""The local page of `rs-export try`: a prompt goes in, the unsteered and the steered answer come out."""

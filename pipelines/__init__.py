"""The stages of the work and the command line that names them."""

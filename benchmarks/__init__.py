"""How fast the method is, beside its peers. Not part of the installed package: see README.md here."""

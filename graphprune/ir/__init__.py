"""The intermediate representation: programs, their nodes, and running parts of them."""

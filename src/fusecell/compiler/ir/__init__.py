"""The intermediate representation: primitives, graphs of them, and a reference interpreter."""

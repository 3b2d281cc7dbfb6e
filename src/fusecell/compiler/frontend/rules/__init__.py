"""How each ATen operation is written in primitives, by kind."""

"""The compiler: a cell's step over a whole sequence as one machine-code loop."""

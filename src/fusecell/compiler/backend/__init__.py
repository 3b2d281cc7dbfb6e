"""From LLVM text to machine code for a target, cached on disk."""

"""AgentRefine: procedural teacher, mistakes, verifier, thought diversity, and the released conversation format."""

"""AgentRefine: the procedural teacher, its mistakes, the verifier, and the released conversation format."""

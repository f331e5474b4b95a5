"""PDDL planning problems in words: blocksworld, gripper, barman, tyreworld."""

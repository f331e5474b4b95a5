"""Planning problems in words: blocksworld, gripper, barman, tyreworld."""

"""Text worlds, one file each; `base.py` says what they share and `play.py` plays any of them from the shell."""

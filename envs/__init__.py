"""Text worlds: `base.py` is their contract, `make.py` makes one by name, `play.py` plays any from the shell."""

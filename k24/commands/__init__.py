"""What the commands of :mod:`k24.cli` do, in the user's words: options, what is printed, and nothing of how it is done."""

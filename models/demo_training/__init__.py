"""How the demo model is made: sample generators, tokenizer, training, evaluation, export.

Nothing in the server imports this package. README.md has the commands.
"""

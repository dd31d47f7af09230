"""What happens when a GPT is fed its own estimates: the library.

The way through it: ``checkpoint.load_checkpoint`` → ``generate.generate`` (a prompt, or a given
text when nothing is to be generated) → ``recompute`` → ``model.GPT``. ``convergence`` makes numbers
of what comes out, ``oracle`` computes the fixed point exactly.
"""

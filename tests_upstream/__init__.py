"""
transformers' own test mixins over our classes: `make test-upstream`.

The mixins come from the source distribution of the installed transformers, which carries `tests/test_*.py` and none of
the folders below; `stand_ins` has an empty class or a plain value for each module that they import from those. With a
checkout of transformers (`--checkout`) the real ones are taken, and the checks of generation and export run, too.
"""

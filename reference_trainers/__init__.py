"""The ``directpred`` command: small trainers that read like the paper's algorithm box.

`byol` is the method, `data` the images and their views, `probe` the evaluation; `train` runs one
recipe, `compare` many. Importing this package imports no framework; its modules do.
"""

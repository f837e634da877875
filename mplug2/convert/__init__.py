"""Other people's checkpoints: read without their framework, mapped key by key onto modules of the zoo, and
back.

`layout` says how one foreign tensor lies in ours, `keys` which tensor goes where, `checkpoints` what a state
dict is (settings, configs, dead keys), `torch_file` reads PyTorch's files, `writing` writes modules and the
report, `stages` and `parity` compare with recorded tensors. This package is the one room that knows both
sides' names of parameters.
"""

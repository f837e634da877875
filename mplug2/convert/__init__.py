"""Other people's checkpoints: read without their framework, mapped key by key onto modules of the zoo, and
back.

Read: `torch_file`, `pickles`, `tensors`. Understand: `layout` (how one tensor lies in ours), `keys` (which
goes where), `shapes` (configs), `families` (kinds of checkpoint). Write: `conversion`, `reversal`, `writing`.
Compare with recorded tensors: `parity`, `parity_training`, `parity_generation`, `parity_parts`, `recorded`,
`stages`. `optimizer` is the official one. This package is the one room that knows both sides' names of
parameters.
"""

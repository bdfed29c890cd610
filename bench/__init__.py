"""Side by side with the peers: the same rows, order, start and precision, timed on one machine.

`python -m bench.dpo`, `bench.sft`, `bench.sampling` and `bench.beta_sweep` measure one row each,
`python -m bench.all` all of them; a part that was measured is not measured again. Each side runs in
a process of its own. Results lie in bench/results with a description of the machine.
"""

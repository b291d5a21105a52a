"""seqfuse's ops timed against PyTorch's own: `seqfuse bench`, `python -m seqfuse.benchmarks`, `pytest benchmarks/`.

registry.py          what is measured: cases with their sizes, baselines, floating-point work and bytes
norms.py losses.py projections.py attention.py recurrent.py
                     the cases of one suite each; a new suite is one more such file, named in registry.SUITES
harness.py ceilings.py how: alternating contenders, warm-up, repeats, spread; peak memory; what this machine can do
gate.py              no speed beside a wrong result
run.py cli.py        the command; report.py prints, records.py writes JSON, plot.py draws a record
"""

"""A compressed model as one file that runs without this package's Python: export, compile, run.

    python -m examples.deployment.export build/compressed -o build/model.pt2
    python -m examples.deployment.run build/model.pt2 build/prompt.txt 16
    python -m examples.deployment.compile -o build/run
    build/run PACKAGE build/model.pt2 build/prompt.txt 16

PACKAGE is the folder with the compiled libraries of rana_kernels. A prompt is a text file of token ids.
docs/deployment.md explains the steps.
"""

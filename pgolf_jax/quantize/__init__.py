"""From averaged weights to an artifact.

Letters: M outputs and N inputs of a matrix, Q matrices of one shape, J columns of a GPTQ block, R rank of a correction.
"""

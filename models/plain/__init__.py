"""The towers' tensor-parallel parts in plain torch: the tests' dense oracle, and the encoder that serving runs. Imports
no megatron-core.
"""

"""tritium.kernels: every op of a GPT, each with a plain-torch reference and any number of faster backends.

This file stays free of imports and side effects: other libraries probe for a module named ``kernels`` and may
execute it.
"""

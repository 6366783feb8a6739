"""
An OpenAI-compatible server for one model of ours, on the parts of transformers' own (`transformers serve`), that may
face strangers.
"""

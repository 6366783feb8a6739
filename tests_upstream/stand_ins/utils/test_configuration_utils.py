"""
Stands in for transformers' module of this name, which its source distribution leaves out. Its values are read for
configurations without parts only, which ours is not.
"""

config_common_kwargs = {}

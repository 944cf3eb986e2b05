"""Stands in for IPython, which SGLang's notebook helpers import but serving never uses. For tests only."""

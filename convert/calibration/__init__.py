"""Quantizes with the help of a text: GPTQ and AWQ, one layer after the other."""

"""Hugging Face checkpoints <-> native ones, one tensor slice at a time.

source              opens a folder and reads slices of its tensors
gptq_awq            what the tensors of a GPTQ or AWQ kernel hold
loader              folder -> arrays on devices
importer            folder -> native checkpoint; quantised_importer: a GPTQ or AWQ one
exporter            native checkpoint -> folder
"""

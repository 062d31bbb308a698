"""Hugging Face checkpoints <-> native ones, one tensor slice at a time.

table     which Hugging Face tensor is which parameter, and how its dimensions are laid out
source    reads slices of a Hugging Face folder's tensors
plan      cuts parameters into blocks, so that memory is known beforehand
store     the array database inside a native checkpoint
importer  Hugging Face folder -> native checkpoint
exporter  native checkpoint -> Hugging Face folder
loader    Hugging Face folder -> arrays on devices
console   the plan and a progress bar on the terminal
"""

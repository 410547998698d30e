"""Formats of examples: questions, statements and labels of pictures that are named, one file per format.

What is read here is described, not judged: whether a picture is there and what a fault costs a row is the business of
`stages/examples`.
"""
